"""Rollouts as tensors: rows, rows packed into sequences, sequences cut into micro-batches.

    rows_of ─▶ pack (rows side by side up to a number of tokens) ─▶ micro_batches ─▶ collate

B sequences, T tokens of the longest one, R rows (one rollout each). Index t speaks of token t.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from types import MappingProxyType

import torch
from torch import Tensor

from distill.word import Word
from ground.packing import positions_of
from ground.records import Group, Rollout
from rl.advantages import batch_advantages
from rl.objective_config import AdvantageSection


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
    ages: tuple[int, ...]
    """Versions between sampling and the step, of trained tokens; 0 elsewhere."""
    advantage: float
    capability: str = ""
    group: str = ""
    """Whose answer it is: `Group.id`."""
    word: Word | None = None
    """What the teacher said to the group; None where nobody teaches."""
    index: int = 0
    """Of the answer in its group, and of what was said to it."""

    def __len__(self) -> int:
        """Tokens, context included."""
        return len(self.tokens)

    @property
    def num_trained(self) -> int:
        """Tokens that carry a gradient."""
        return sum(self.trained)


Sequenced = list[Row]
"""Rows that share a sequence."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch: sequences of one or more rows, padded at the end.

    Example:
        rows of 3 and 2 tokens in one sequence → segments_BT [[1, 1, 1, 2, 2]],
        positions_BT [[0, 1, 2, 0, 1]]
    """

    tokens_BT: Tensor
    segments_BT: Tensor
    """Number of each token's row, from 1 over the whole micro-batch; 0 on padding."""
    loss_mask_BT: Tensor
    """True on trained tokens."""
    behavior_logprobs_BT: Tensor
    advantages_BT: Tensor
    """The advantage of a row on its trained tokens, 0 elsewhere."""
    ages_BT: Tensor
    capability_R: tuple[str, ...]

    @property
    def positions_BT(self) -> Tensor:
        """Place of each token in its own row."""
        return positions_of(self.segments_BT)

    @property
    def num_loss_tokens(self) -> int:
        """Tokens that carry a gradient; a step divides by their sum over all its micro-batches."""
        return int(self.loss_mask_BT.sum())

    @property
    def capabilities_of_trained(self) -> list[str]:
        """The capability of each trained token, in the order of the mask."""
        rows_N = (self.segments_BT[self.loss_mask_BT] - 1).tolist()
        return [self.capability_R[row] for row in rows_N]

    def tensors(self) -> dict[str, Tensor]:
        """Field by field, for a file."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    def to(self, device: torch.device) -> Batch:
        """The same batch on a device."""
        moved = {name: value.to(device) for name, value in self.tensors().items()}
        return Batch(**moved, capability_R=self.capability_R)

    def without_loss(self) -> Batch:
        """The same tokens with nothing to train on, for a rank that has run out of rows."""
        idle = {**self.tensors(), "loss_mask_BT": torch.zeros_like(self.loss_mask_BT)}
        return Batch(**idle, capability_R=self.capability_R)


def rows_of(
    groups: Sequence[Group],
    section: AdvantageSection,
    version: int,
    words: Mapping[str, Word] = MappingProxyType({}),
) -> list[Row]:
    """The rows of a whole step; a rollout without policy tokens gives none.

    Advantages are made here, before any split, since some look at the whole batch.

    Args:
        version: of the weights that are about to be trained.
        words: what the teacher said, by the group's id.
    """
    rows = [
        _row(group, rollout, advantage, version, words.get(group.id))
        for group, advantages in zip(groups, batch_advantages(groups, section), strict=True)
        for rollout, advantage in zip(group.rollouts, advantages, strict=True)
    ]
    return [row for row in rows if row.num_trained]


def pack(rows: Sequence[Row], max_tokens: int) -> list[Sequenced]:
    """Put rows side by side into sequences of at most `max_tokens`, the longest ones first.

    Each row goes to the first sequence with room (first-fit decreasing); one that is longer than
    `max_tokens` has a sequence of its own, so that 0 leaves every row alone.

    Example:
        lengths 3, 9, 4, 2 and max_tokens 9 → [9], [4, 3, 2]
    """
    sequences: list[Sequenced] = []
    room: list[int] = []
    for row in sorted(rows, key=len, reverse=True):
        place = next((i for i, free in enumerate(room) if free >= len(row)), None)
        if place is None:
            sequences.append([row])
            room.append(max_tokens - len(row))
        else:
            sequences[place].append(row)
            room[place] -= len(row)
    return sequences


def micro_batches(sequences: Sequence[Sequenced], max_tokens: int) -> list[list[Sequenced]]:
    """Cut sequences into batches of at most `max_tokens` with padding, like lengths together.

    A sequence longer than the budget gets a batch of its own.

    Example:
        lengths 3, 9, 4 and max_tokens 9 → [9], [4, 3]
    """
    batches: list[list[Sequenced]] = []
    for sequence in sorted(sequences, key=_length, reverse=True):
        longest = _length(batches[-1][0]) if batches else 0
        if batches and longest * (len(batches[-1]) + 1) <= max_tokens:
            batches[-1].append(sequence)
        else:
            batches.append([sequence])
    return batches


def collate(sequences: Sequence[Sequenced], pad_id: int) -> Batch:
    """Sequences as tensors."""
    shape = (len(sequences), max(_length(sequence) for sequence in sequences))
    batch = Batch(
        tokens_BT=torch.full(shape, pad_id),
        segments_BT=torch.zeros(shape, dtype=torch.long),
        loss_mask_BT=torch.zeros(shape, dtype=torch.bool),
        behavior_logprobs_BT=torch.zeros(shape),
        advantages_BT=torch.zeros(shape),
        ages_BT=torch.zeros(shape, dtype=torch.long),
        capability_R=tuple(row.capability for sequence in sequences for row in sequence),
    )
    number = 0
    for index, sequence in enumerate(sequences):
        end = 0
        for row in sequence:
            number += 1
            start, end = end, end + len(row)
            batch.tokens_BT[index, start:end] = torch.tensor(row.tokens)
            batch.segments_BT[index, start:end] = number
            batch.loss_mask_BT[index, start:end] = torch.tensor(row.trained)
            batch.behavior_logprobs_BT[index, start:end] = torch.tensor(row.behavior)
            batch.advantages_BT[index, start:end] = torch.tensor(row.trained) * row.advantage
            batch.ages_BT[index, start:end] = torch.tensor(row.ages)
    return batch


def _length(sequence: Sequenced) -> int:
    return sum(map(len, sequence))


def written_by(group: Group, rollout: Rollout) -> tuple[list[int], list[bool]]:
    """Prompt and segments, token by token, and which of these the policy wrote."""
    tokens = list(group.prompt_ids)
    trained = [False] * len(tokens)
    for segment in rollout.segments:
        tokens += segment.token_ids
        trained += [segment.source == "policy"] * len(segment.token_ids)
    return tokens, trained


def _row(group: Group, rollout: Rollout, advantage: float, version: int, word: Word | None) -> Row:
    tokens, trained = written_by(group, rollout)
    behavior, ages = [0.0] * len(group.prompt_ids), [0] * len(group.prompt_ids)
    for segment in rollout.segments:
        is_policy, length = segment.source == "policy", len(segment.token_ids)
        behavior += segment.logprobs if is_policy else [0.0] * length
        ages += [version - span.version for span in segment.versions for _ in range(span.length)]
        ages += [0] * (len(behavior) - len(ages))
    return Row(
        tuple(tokens),
        tuple(trained),
        tuple(behavior),
        tuple(ages),
        advantage,
        group.prompt.capability,
        group.id,
        word,
        rollout.index,
    )
