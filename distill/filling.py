"""Filling a store: what is there is not asked for again, what is missing or damaged is.

rows → estimate (size, room on the disk) → hits | misses → teacher, by length → inserted
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from distill.config import FormatKind
from distill.store import TargetStore, TokenRow
from distill.targets import TargetFormat
from distill.teacher import Teacher
from ground.errors import RecipeError, SetupError

FULL_VOCABULARY = 8192
"""Ids beyond which `full` is refused: 32 KiB a token in memory."""
_ROW_BYTES = 32
"""Key, place and checksum of a row."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What filling will take, told before a teacher is loaded.

    Example:
        Estimate(rows=1000, missing=400, missing_tokens=36_000, read_tokens=90_000, …)
    """

    rows: int
    """Different rows that are wanted."""
    missing: int
    """Of which the teacher has to speak to so many."""
    missing_tokens: int
    """Trained tokens of these: what is stored."""
    read_tokens: int
    """All tokens of these: what the teacher reads."""
    bytes_per_token: int

    @property
    def num_bytes(self) -> int:
        """What the missing rows will take on the disk."""
        return self.missing_tokens * self.bytes_per_token + self.missing * _ROW_BYTES


@dataclass(frozen=True, slots=True)
class Filled:
    """What filling took.

    Example:
        Filled(rows=1000, hits=600, passes=400, tokens=36_000, seconds=12.5)
    """

    rows: int
    hits: int
    passes: int
    """Rows that the teacher read: 0 when all were there."""
    tokens: int
    """Trained tokens of these."""
    seconds: float


def estimate(
    store: TargetStore, rows: Sequence[TokenRow], format: TargetFormat, vocabulary: int
) -> Estimate:
    """Size of what is missing."""
    wanted = {row.key: row for row in rows}
    missing = [row for key, row in wanted.items() if key not in store]
    return Estimate(
        len(wanted),
        len(missing),
        sum(len(row.places) for row in missing),
        sum(len(row.ids) for row in missing),
        format.bytes_per_token(vocabulary),
    )


def require_room(store: TargetStore, wanted: Estimate) -> None:
    """Refuse to begin what the disk cannot hold.

    Raises:
        SetupError: with both sizes.
    """
    place = next(path for path in (store.folder, *store.folder.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if wanted.num_bytes > free:
        raise SetupError(
            f"the targets of {wanted.missing} rows need {in_bytes(wanted.num_bytes)}, "
            f"{in_bytes(free)} are free",
            where=str(place),
            fix="set targets.store to a larger disk, targets.k lower, or prune more",
        )


def require_vocabulary(kind: FormatKind, vocabulary: int, key: str) -> None:
    """Refuse `full` where it would fill disk and memory.

    Raises:
        RecipeError: the vocabulary is too large for it.
    """
    if kind == "full" and vocabulary > FULL_VOCABULARY:
        raise RecipeError(
            f"{key} full is for vocabularies of up to {FULL_VOCABULARY} ids, got {vocabulary}",
            fix=f"set {key} to topk_tail or sampled",
        )


def fill(
    store: TargetStore,
    rows: Sequence[TokenRow],
    teacher_of: Callable[[], Teacher],
    progress: Callable[[int, int], None] | None = None,
) -> Filled:
    """Have the teacher speak to the rows that the store does not have.

    Args:
        teacher_of: loads the teacher; not called when nothing is missing.
        progress: called with (tokens read, tokens to read).
    """
    wanted = {row.key: row for row in rows}
    store.drop_damaged(list(wanted))
    missing = [row for key, row in wanted.items() if key not in store]
    began = time.monotonic()
    if not missing:
        return Filled(len(wanted), len(wanted), 0, 0, 0.0)
    teacher = teacher_of()
    total, read, tokens = sum(len(row.ids) for row in missing), 0, 0
    with store.writer() as writer:
        for row, targets in teacher.speak(missing):
            writer.insert(row.key, targets)
            read, tokens = read + len(row.ids), tokens + len(targets)
            if progress is not None:
                progress(read, total)
    seconds = time.monotonic() - began
    store.note_rate(total / max(seconds, 1e-9))
    return Filled(len(wanted), len(wanted) - len(missing), teacher.num_rows, tokens, seconds)


def in_bytes(number: float) -> str:
    """A size as people say it: 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
