"""From a group's answers to a teacher's word on them, and from the word to targets again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from safetensors import SafetensorError
from safetensors.numpy import load, save
from torch import Tensor

from distill.config import FormatKind
from distill.identity import Identity
from distill.shard import StoredRow
from distill.store import TokenRow
from distill.targets import TeacherTargets, fitted
from distill.word import SaidRow, Word
from ground.errors import DataError


def asked_row(ids: Sequence[int], is_trained: Sequence[bool], vocabulary: int) -> TokenRow:
    """A row as the teacher is asked about it: up to the first id that stands for no token.

    A model's head may have more rows than the tokenizer has ids, so a student may say such an id;
    a teacher cannot read it.

    Example:
        ids (5, 9, 300, 7), vocabulary 262 → TokenRow((5, 9), …)
    """
    end = next((place for place, each in enumerate(ids) if each >= vocabulary), len(ids))
    return TokenRow(tuple(ids[:end]), tuple(is_trained[:end]))


def word_of(
    identity: Identity, rows: Sequence[TokenRow], spoken: Mapping[bytes, TeacherTargets]
) -> Word:
    """What was said to each row, by its key, as bytes."""
    columns = [StoredRow.of(row.key, spoken[row.key]).columns for row in rows]
    said = zip(rows, columns, strict=True)
    return Word(
        identity.name,
        tuple(SaidRow(row.key, len(row.places), save(dict(each))) for row, each in said),
    )


def read_word(
    said: SaidRow, row: TokenRow, labels_T: Tensor, kind: FormatKind, where: str
) -> tuple[TeacherTargets, int]:
    """The targets of each trained token of a row, and how many of them do not fit and are silent.

    Args:
        labels_T: all trained tokens of the row, those included that the teacher could not read.
        where: names the row in an error.

    Raises:
        DataError: the word is on other tokens, or damaged.
    """
    if said.key != row.key:
        raise DataError(
            "the teacher's word must be on the tokens that are trained, it is on others",
            where=where,
        )
    try:
        targets = StoredRow(said.key, load(said.content)).targets(kind)
    except (SafetensorError, KeyError, ValueError) as error:
        raise DataError("the teacher's word is damaged", where=where, why=str(error)) from error
    return fitted(targets, labels_T)
