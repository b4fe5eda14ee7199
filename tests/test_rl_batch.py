"""Rollouts as tensors."""

from __future__ import annotations

import torch

from ground.records import Group, Message, Prompt, Rollout, Segment, Span
from rl.batch import Row, collate, micro_batches, rows_of, token_ages

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
    first, second = rows_of(group)
    assert first.tokens == (1, 5, 7, 8, 8, 2)
    assert first.trained == (False, False, True, False, False, True)
    assert first.behavior == (0.0, 0.0, -0.7000000000000001, 0.0, 0.0, -0.2)
    assert first.advantage == 1 - 1 / 3
    assert second.advantage == -1 / 3
    assert (first.num_trained, second.num_trained) == (2, 2)


def row(length: int) -> Row:
    return Row((9,) * length, (True,) * length, (0.0,) * length, 1.0)


def test_micro_batches_fill_the_budget_with_like_lengths_and_lose_no_row() -> None:
    rows = [row(length) for length in (3, 9, 4, 12, 3, 3)]
    cut = micro_batches(rows, max_tokens=9)
    assert [[len(r.tokens) for r in batch] for batch in cut] == [[12], [9], [4, 3], [3, 3]]


def test_collating_pads_on_the_right_and_keeps_context_out_of_the_loss() -> None:
    rows = [Row((1, 5, 7), (False, True, True), (0.0, -0.3, -0.4), 0.5), row(2)]
    batch = collate(rows, pad_id=99)
    assert batch.tokens_BT.tolist() == [[1, 5, 7], [9, 9, 99]]
    assert batch.mask_BT.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch.loss_mask_BT.tolist() == [[False, True, True], [True, True, False]]
    assert batch.advantages_BT.tolist() == [[0.0, 0.5, 0.5], [1.0, 1.0, 0.0]]
    assert torch.equal(
        batch.behavior_logprobs_BT, torch.tensor([[0.0, -0.3, -0.4], [0.0, 0.0, 0.0]])
    )


def test_token_ages_count_versions_since_sampling() -> None:
    swapped = Segment("policy", (7, 7, 2), (-1.0, -1.0, -1.0), (Span(3, 1), Span(4, 2)))
    group = Group("g.0", PROMPT, (1,), (make_rollout(0, 1.0, swapped),))
    assert list(token_ages([group], version=5)) == [(2, 1), (1, 2)]
