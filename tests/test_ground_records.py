"""Records that go from process to process."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest

from ground.records import Segment, Span


def make_segment() -> Segment:
    return Segment("policy", (17, 4, 2**31 - 1), (-0.1, -1e-300, 0.0), (Span(3, 2), Span(4, 1)))


def test_a_segment_arrives_as_it_was_and_is_unpacked_by_its_reader_alone() -> None:
    sent = make_segment()
    passed_on = pickle.loads(pickle.dumps(sent))
    arrived = pickle.loads(pickle.dumps(passed_on))
    assert (arrived.num_tokens, passed_on.num_tokens, sent.num_tokens) == (3, 3, 3)
    assert passed_on._bytes is not None, "passing on reads no token"
    assert arrived == sent and hash(arrived) == hash(sent) and repr(arrived) == repr(sent)
    assert arrived._bytes is None and arrived.logprobs[1] == -1e-300
    assert replace(passed_on, source="environment").token_ids == sent.token_ids
    assert pickle.loads(pickle.dumps(arrived)) == sent


def test_a_segment_has_no_other_names() -> None:
    segment = pickle.loads(pickle.dumps(make_segment()))
    with pytest.raises(AttributeError, match="tokens"):
        _ = segment.tokens
    empty = pickle.loads(pickle.dumps(Segment("environment", ())))
    assert (empty.num_tokens, empty.token_ids, empty.logprobs) == (0, (), ())


def test_two_readers_of_an_arrived_segment_see_the_same() -> None:
    arrived = pickle.loads(pickle.dumps(make_segment()))
    assert arrived.logprobs == make_segment().logprobs
    assert arrived.token_ids == make_segment().token_ids
