"""Records that go from process to process."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

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


def test_many_readers_of_an_arrived_segment_see_the_same() -> None:
    sent = Segment("policy", tuple(range(5000)), (-0.5,) * 5000, (Span(0, 5000),))
    with ThreadPoolExecutor(8) as readers:
        for _ in range(50):
            arrived, start = pickle.loads(pickle.dumps(sent)), Barrier(8)

            def read(number: int, arrived: Segment = arrived, start: Barrier = start) -> object:
                start.wait()
                return arrived.logprobs if number % 2 else arrived.token_ids

            seen = list(readers.map(read, range(8)))
            assert seen[0::2] == [sent.token_ids] * 4 and seen[1::2] == [sent.logprobs] * 4
