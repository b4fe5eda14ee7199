"""Rollouts as right-padded tensors, cut into micro-batches by a budget of tokens.

B rows (one rollout each), T tokens of the longest row. Position t speaks of token t.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ground.records import Group, Rollout
from rl.advantages import centered


@dataclass(frozen=True, slots=True)
class Row:
    """One rollout as the learner reads it: prompt, then segments, token by token.

    Example:
        prompt (1, 5), one policy segment (7, 2) → tokens (1, 5, 7, 2), trained (0, 0, 1, 1)
    """

    tokens: tuple[int, ...]
    trained: tuple[bool, ...]
    """True on the policy's own tokens; prompts and tool results are context only."""
    behavior: tuple[float, ...]
    """log mu of trained tokens, 0 elsewhere."""
    advantage: float

    @property
    def num_trained(self) -> int:
        """Tokens that carry a gradient."""
        return sum(self.trained)


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch of rows, right-padded."""

    tokens_BT: Tensor
    mask_BT: Tensor
    """1 on tokens, 0 on padding."""
    loss_mask_BT: Tensor
    """True on trained tokens."""
    behavior_logprobs_BT: Tensor
    advantages_BT: Tensor
    """The advantage of a row on its trained tokens, 0 elsewhere."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        return Batch(
            self.tokens_BT.to(device),
            self.mask_BT.to(device),
            self.loss_mask_BT.to(device),
            self.behavior_logprobs_BT.to(device),
            self.advantages_BT.to(device),
        )


def rows_of(group: Group) -> list[Row]:
    """The rows of a group with centred advantages; a rollout without policy tokens gives none."""
    advantages = centered(group.rewards)
    rows = [
        _row(group.prompt_ids, rollout, advantage)
        for rollout, advantage in zip(group.rollouts, advantages, strict=True)
    ]
    return [row for row in rows if row.num_trained]


def micro_batches(rows: Sequence[Row], max_tokens: int) -> list[list[Row]]:
    """Cut rows into batches of at most `max_tokens` with padding, like lengths together.

    A row longer than the budget gets a batch of its own.

    Example:
        lengths 3, 9, 4 and max_tokens 9 → [9], [4, 3]
    """
    batches: list[list[Row]] = []
    for row in sorted(rows, key=lambda row: -len(row.tokens)):
        longest = len(batches[-1][0].tokens) if batches else 0
        if batches and longest * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(row)
        else:
            batches.append([row])
    return batches


def collate(rows: Sequence[Row], pad_id: int) -> Batch:
    """Stack rows to tensors."""
    shape = (len(rows), max(len(row.tokens) for row in rows))
    batch = Batch(
        tokens_BT=torch.full(shape, pad_id),
        mask_BT=torch.zeros(shape, dtype=torch.long),
        loss_mask_BT=torch.zeros(shape, dtype=torch.bool),
        behavior_logprobs_BT=torch.zeros(shape),
        advantages_BT=torch.zeros(shape),
    )
    for number, row in enumerate(rows):
        length = len(row.tokens)
        batch.tokens_BT[number, :length] = torch.tensor(row.tokens)
        batch.mask_BT[number, :length] = 1
        batch.loss_mask_BT[number, :length] = torch.tensor(row.trained)
        batch.behavior_logprobs_BT[number, :length] = torch.tensor(row.behavior)
        batch.advantages_BT[number, :length] = torch.tensor(row.trained) * row.advantage
    return batch


def token_ages(groups: Sequence[Group], version: int) -> Iterator[tuple[int, int]]:
    """Yield (versions between sampling and `version`, number of tokens) of each span."""
    for group in groups:
        for rollout in group.rollouts:
            for segment in rollout.segments:
                yield from ((version - span.version, span.length) for span in segment.versions)


def _row(prompt_ids: Sequence[int], rollout: Rollout, advantage: float) -> Row:
    tokens, trained = list(prompt_ids), [False] * len(prompt_ids)
    behavior = [0.0] * len(prompt_ids)
    for segment in rollout.segments:
        is_policy = segment.source == "policy"
        tokens += segment.token_ids
        trained += [is_policy] * len(segment.token_ids)
        behavior += segment.logprobs if is_policy else [0.0] * len(segment.token_ids)
    return Row(tuple(tokens), tuple(trained), tuple(behavior), advantage)
