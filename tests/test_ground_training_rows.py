"""Rows of SFT: labels by hand, nothing cut in silence."""

from __future__ import annotations

import pytest
from conftest import make_tiny_tokenizer

from ground.chat import ChatTemplate
from ground.errors import DataError
from ground.records import Demonstration, Message
from ground.training_rows import IGNORED, encode_demonstrations

CHAT = ChatTemplate(make_tiny_tokenizer())


def demonstration(name: str, question: str, answer: str) -> Demonstration:
    return Demonstration(name, (Message("user", question), Message("assistant", answer)), "sums")


def test_labels_are_the_answers_ids_and_nothing_else():
    result = encode_demonstrations([demonstration("a", "1+1", "2")], CHAT, 100)
    (row,) = result.rows
    two = CHAT.encode_text("2")[0]
    assert row.labels[-2:] == (two, 260) == row.input_ids[-2:]
    assert set(row.labels[:-2]) == {IGNORED}
    assert (result.num_tokens, result.num_trained) == (len(row.input_ids), 2)


def test_long_and_unusable_rows_are_set_aside_with_their_reasons():
    rows = [
        demonstration("fits", "1+1", "2"),
        demonstration("long", "1+1", "2" * 60),
        Demonstration("mute", (Message("user", "hi"),), "sums"),
        demonstration("surrogate", "\ud800", "x"),
    ]
    result = encode_demonstrations(rows, CHAT, 60)
    assert [row.id for row in result.rows] == ["fits"]
    reasons = {skip.id: skip.reason for skip in result.skipped}
    # BOS, the user turn of 1+4+1+2+3+1 tokens, the assistant turn of 1+9+1+2+60+1.
    assert reasons["long"] == "it has 87 tokens, more than 60"
    assert "at least one assistant turn" in reasons["mute"]
    assert "valid Unicode" in reasons["surrogate"]


def test_a_row_of_exactly_the_limit_stays():
    (row,) = encode_demonstrations([demonstration("a", "1+1", "2")], CHAT, 100).rows
    length = len(row.input_ids)
    assert encode_demonstrations([demonstration("a", "1+1", "2")], CHAT, length).rows
    with pytest.raises(DataError, match="no demonstration is left") as caught:
        encode_demonstrations([demonstration("a", "1+1", "2")], CHAT, length - 1)
    assert f"a: it has {length} tokens" in caught.value.why


def test_the_fingerprint_follows_every_id_and_label():
    first = encode_demonstrations([demonstration("a", "1+1", "2")], CHAT, 100)
    again = encode_demonstrations([demonstration("b", "1+1", "2")], CHAT, 100)
    other = encode_demonstrations([demonstration("a", "1+1", "3")], CHAT, 100)
    assert first.fingerprint == again.fingerprint != other.fingerprint
