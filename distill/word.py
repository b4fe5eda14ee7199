"""A teacher's word on the answers of a group: bytes that travel and are journaled; needs no torch.

    answers of a group ─ Teacher.speak ─▶ Word ─▶ plan, journal ─▶ read_word ─▶ TeacherTargets

A word says whose it is and on which tokens, as a store does: the word of another teacher, of
another format, or on other tokens is refused by whoever reads it (distill/reading.py). Log-probs
are in half precision on the way too, so that what is trained first and what is trained again from
the journal are the same bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from distill.identity import Identity
from ground.errors import DataError
from ground.provenance import weights_fingerprint


@dataclass(frozen=True, slots=True)
class SaidRow:
    """The word on one answer.

    Example:
        SaidRow(key=b"…16 bytes…", num_tokens=12, content=b"…")
    """

    key: bytes
    """`TokenRow.key` of what the teacher read."""
    num_tokens: int
    """That it spoke to."""
    content: bytes
    """The columns of a `StoredRow` as safetensors."""


@dataclass(frozen=True, slots=True)
class Word:
    """The word on a group, answer by answer.

    Example:
        Word("3f9a01bc5d2e7788", (SaidRow(…), …))    # one for each of G rollouts
    """

    identity: str
    """`Identity.name` of teacher, tokenizer, template and format."""
    rows: tuple[SaidRow, ...]


@dataclass(frozen=True, slots=True)
class Teaching:
    """Whose word RL learns from; all processes of the loop are told the same.

    Example:
        plan_teaching(section.distill, Path("models/teacher"), Path("models/student"), 512)
    """

    teacher: Path
    identity: Identity
    always: tuple[int, ...]
    """Ids of the tokens that the format keeps whatever their probability."""

    def require_teacher(self) -> None:
        """Refuse to speak for a teacher whose weights are others here and now.

        Raises:
            DataError: naming both; or there is none here.
        """
        if not (self.teacher / "config.json").is_file():
            raise DataError(
                "the teacher's folder must be readable where a teacher is seated",
                where=str(self.teacher),
                fix="show it in the same place on every machine that Ray may seat a teacher on",
            )
        here = f"{self.teacher.name}@{weights_fingerprint(self.teacher)}"
        if here != self.identity.teacher:
            raise DataError(
                f"the teacher must be {self.identity.teacher}, here it is {here}",
                where=str(self.teacher),
                fix="leave the teacher's folder as it is while a run learns from it; on other "
                "machines show the same one in the same place",
            )
