"""Demonstrations as rows of token ids and labels; nothing is cut, and what is left out is told.

demonstration → encoded → kept | skipped(reason)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

from ground.chat import ChatTemplate
from ground.errors import DataError
from ground.records import Demonstration
from ground.rows import GENERAL

IGNORED = -100
"""Label of a token that is not trained."""


@dataclass(frozen=True, slots=True)
class TrainingRow:
    """A conversation ready for the model.

    Example:
        ids (256, 31, 260, 40, 260) with labels (-100, -100, -100, 40, 260)
    """

    id: str
    input_ids: tuple[int, ...]
    labels: tuple[int, ...]
    capability: str = GENERAL


@dataclass(frozen=True, slots=True)
class Skipped:
    """A demonstration that is not trained on, and why."""

    id: str
    reason: str


@dataclass(frozen=True, slots=True)
class TrainingRows:
    """All rows of a run, in the order of the file."""

    rows: tuple[TrainingRow, ...]
    skipped: tuple[Skipped, ...]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return sum(len(row.input_ids) for row in self.rows)

    @property
    def num_trained(self) -> int:
        """Tokens that carry a label."""
        return sum(label != IGNORED for row in self.rows for label in row.labels)

    @property
    def fingerprint(self) -> str:
        """sha256 over all ids and labels: what a checkpoint must have been trained on."""
        hasher = hashlib.sha256()
        for row in self.rows:
            hasher.update(json.dumps([row.input_ids, row.labels]).encode())
        return hasher.hexdigest()


def encode_demonstrations(
    demonstrations: Sequence[Demonstration], chat: ChatTemplate, max_length: int
) -> TrainingRows:
    """Encode every demonstration; those that are too long or cannot be encoded are set aside.

    Raises:
        DataError: none is left.
    """
    rows: list[TrainingRow] = []
    skipped: list[Skipped] = []
    for demonstration in demonstrations:
        try:
            ids, mask = chat.encode_demonstration(demonstration.messages)
        except DataError as error:
            skipped.append(Skipped(demonstration.id, error.what))
            continue
        if len(ids) > max_length:
            skipped.append(
                Skipped(demonstration.id, f"it has {len(ids)} tokens, more than {max_length}")
            )
            continue
        labels = [token if keep else IGNORED for token, keep in zip(ids, mask, strict=True)]
        capability = demonstration.capability
        rows.append(TrainingRow(demonstration.id, tuple(ids), tuple(labels), capability))
    if not rows:
        raise DataError(
            f"no demonstration is left to train on, of {len(demonstrations)}",
            why="; ".join(f"{skip.id}: {skip.reason}" for skip in skipped[:3]),
            fix="raise max_length, or mend the rows",
        )
    return TrainingRows(tuple(rows), tuple(skipped))
