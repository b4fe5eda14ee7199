"""Rollouts as tensors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ground.records import Group, Message, Prompt, Rollout, Segment, Span
from rl.batch import Row, collate, micro_batches, pack, rows_of
from rl.objective_config import BaselineAdvantages

PROMPT = Prompt.make((Message("user", "2+2="),), capability="sums", reward="exact", answer="4")


def make_rollout(index: int, reward: float, *segments: Segment) -> Rollout:
    return Rollout(index, segments, text="", reward=reward, passed=reward > 0)


def policy(*tokens: int, version: int = 0) -> Segment:
    logprobs = tuple(-0.1 * token for token in tokens)
    return Segment("policy", tokens, logprobs, (Span(version, len(tokens)),))


def test_rows_carry_context_actions_and_centred_advantages() -> None:
    tool = Segment("environment", (8, 8))
    group = Group(
        "g.0",
        PROMPT,
        (1, 5),
        (
            make_rollout(0, 1.0, policy(7), tool, policy(2)),
            make_rollout(1, 0.0, policy(3, 2)),
            make_rollout(2, 0.0),
        ),
    )
    first, second = rows_of([group], BaselineAdvantages(), version=0)
    assert first.tokens == (1, 5, 7, 8, 8, 2)
    assert first.trained == (False, False, True, False, False, True)
    assert first.behavior == (0.0, 0.0, -0.7000000000000001, 0.0, 0.0, -0.2)
    assert first.advantage == 1 - 1 / 3
    assert second.advantage == -1 / 3
    assert (first.num_trained, second.num_trained) == (2, 2)
    assert first.capability == "sums"


def test_advantages_that_need_the_batch_are_made_before_any_split() -> None:
    def group(*rewards: float) -> Group:
        answers = tuple(make_rollout(n, reward, policy(7)) for n, reward in enumerate(rewards))
        return Group("g.0", PROMPT, (1,), answers)

    rows = rows_of([group(1, 0), group(3, 0)], BaselineAdvantages(kind="batch_std"), version=0)
    # Deviations ±1/2 and ±3/2, root mean square sqrt(5/4).
    expected = [0.5, -0.5, 1.5, -1.5]
    assert [row.advantage * 1.25**0.5 for row in rows] == pytest.approx(expected)


def test_ages_count_versions_since_sampling() -> None:
    swapped = Segment("policy", (7, 7, 2), (-1.0, -1.0, -1.0), (Span(3, 1), Span(4, 2)))
    tool = Segment("environment", (8,))
    answers = (
        make_rollout(0, 1.0, tool, swapped),
        make_rollout(1, 0.0, policy(9, version=5)),
    )
    first, second = rows_of([Group("g.0", PROMPT, (1, 5), answers)], BaselineAdvantages(), 5)
    assert first.ages == (0, 0, 0, 2, 1, 1)
    assert second.ages == (0, 0, 0)


def row(length: int, capability: str = "") -> Row:
    ones = (True,) * length
    return Row((9,) * length, ones, (0.0,) * length, (0,) * length, 1.0, capability)


def lengths(batches: list[list[list[Row]]]) -> list[list[list[int]]]:
    return [[[len(row) for row in sequence] for sequence in batch] for batch in batches]


def test_rows_are_packed_into_the_first_sequence_with_room() -> None:
    rows = [row(length) for length in (3, 9, 4, 12, 2, 1)]
    assert lengths([pack(rows, 9)]) == [[[12], [9], [4, 3, 2], [1]]]
    assert lengths([pack(rows, 0)]) == [[[12], [9], [4], [3], [2], [1]]]


@given(st.lists(st.integers(1, 40), max_size=60), st.integers(0, 64), st.integers(1, 200))
def test_no_row_is_lost_and_no_budget_is_passed(
    sizes: list[int], pack_tokens: int, micro_tokens: int
) -> None:
    sequences = pack([row(size) for size in sizes], pack_tokens)
    for sequence in sequences:
        assert sum(map(len, sequence)) <= max(pack_tokens, len(sequence[0]))
    batches = micro_batches(sequences, micro_tokens)
    for batch in batches:
        longest = max(sum(map(len, sequence)) for sequence in batch)
        assert len(batch) == 1 or longest * len(batch) <= micro_tokens
    found = sorted(len(row) for batch in batches for sequence in batch for row in sequence)
    assert found == sorted(sizes)


def test_micro_batches_fill_the_budget_with_like_lengths() -> None:
    sequences = [[row(length)] for length in (3, 9, 4, 12, 3, 3)]
    cut = micro_batches(sequences, max_tokens=9)
    assert lengths(cut) == [[[12]], [[9]], [[4], [3]], [[3], [3]]]


def test_collating_pads_at_the_end_and_keeps_context_out_of_the_loss() -> None:
    first = Row((1, 5, 7), (False, True, True), (0.0, -0.3, -0.4), (0, 2, 1), 0.5, "sums")
    batch = collate([[first], [row(2, "logic")]], pad_id=99)
    assert batch.tokens_BT.tolist() == [[1, 5, 7], [9, 9, 99]]
    assert batch.segments_BT.tolist() == [[1, 1, 1], [2, 2, 0]]
    assert batch.loss_mask_BT.tolist() == [[False, True, True], [True, True, False]]
    assert batch.advantages_BT.tolist() == [[0.0, 0.5, 0.5], [1.0, 1.0, 0.0]]
    assert batch.ages_BT.tolist() == [[0, 2, 1], [0, 0, 0]]
    assert batch.capability_R == ("sums", "logic")
    assert batch.num_loss_tokens == 4
    assert torch.equal(
        batch.behavior_logprobs_BT, torch.tensor([[0.0, -0.3, -0.4], [0.0, 0.0, 0.0]])
    )


def test_rows_that_share_a_sequence_keep_their_own_numbers_and_positions() -> None:
    first = Row((1, 5, 7), (False, True, True), (0.0, -0.3, -0.4), (0, 2, 1), 0.5)
    second = Row((1, 6), (False, True), (0.0, -0.9), (0, 3), -0.5)
    batch = collate([[first, second], [row(2)]], pad_id=99)
    assert batch.tokens_BT.tolist() == [[1, 5, 7, 1, 6], [9, 9, 99, 99, 99]]
    assert batch.segments_BT.tolist() == [[1, 1, 1, 2, 2], [3, 3, 0, 0, 0]]
    assert batch.positions_BT.tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]]
    assert batch.advantages_BT.tolist() == [[0, 0.5, 0.5, 0, -0.5], [1, 1, 0, 0, 0]]
    assert batch.ages_BT.tolist() == [[0, 2, 1, 0, 3], [0, 0, 0, 0, 0]]
    idle = batch.without_loss()
    assert idle.num_loss_tokens == 0
    assert torch.equal(idle.tokens_BT, batch.tokens_BT)
