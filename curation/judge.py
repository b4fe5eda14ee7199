"""What a judge is: it says of SFT rows how hard they are, and on what grounds.

    rows → Judge.judge → a Judgement for each: score 0…1 and its parts, or `unjudged` and why

Three kinds, each in a module of its own (docs/pruning.md): `label` (curation/label_judge.py), `ifd`
(curation/ifd_judge.py) and `solve_rate` (curation/solve_rate_judge.py). Scores order rows within
one kind and one model; the same number means something else to another kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from ground.errors import DataError
from ground.records import LABELS, Demonstration, Label

PARTS = (
    *(f"p_{label}" for label in LABELS),
    "label_mass",
    *("loss", "loss_alone", "ifd"),
    *("successes", "trials"),
)
"""Names of what judgements are made of; prune's files hold each as a column `meta_<name>`."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a judge thinks of one row.

    Example:
        Judgement(0.65, "hard", {"p_easy": .2, "p_medium": .3, "p_hard": .5, "label_mass": .98})
        Judgement(reason="it has no checkable answer") → unjudged
    """

    score: float | None = None
    """0 is easiest, 1 hardest; None when unjudged: what cannot be judged is never easy."""
    label: Label | None = None
    """In a word, where the judge speaks in words."""
    parts: Mapping[str, float] = field(default_factory=dict)
    """What the score was made of, by names of `PARTS`; also what there was to see of a row that is
    unjudged all the same."""
    reason: str = ""
    """Why there is no judgement; empty when there is one."""
    is_misaligned: bool = False
    """The answer has nothing to do with the question: worth nothing, however hard."""
    is_too_long: bool = False
    """It does not fit the judge's context, so that it was not asked."""

    @property
    def is_judged(self) -> bool:
        """False for garbage and for rows that could not be asked about."""
        return self.score is not None

    def as_json(self) -> list[Any]:
        """Plain values, from which `of_json` makes an equal judgement."""
        return [
            *(self.score, self.label, dict(self.parts), self.reason),
            *(self.is_misaligned, self.is_too_long),
        ]

    @staticmethod
    def of_json(values: Sequence[Any]) -> Judgement:
        """The judgement that `as_json` wrote."""
        return Judgement(*values)


def too_long(max_length: int) -> Judgement:
    """What becomes of a row that does not fit the judge's context."""
    return Judgement(reason=f"longer than the judge's {max_length} tokens", is_too_long=True)


class Judge(Protocol):
    """A model that judges rows; one of three kinds."""

    def judge(self, rows: Sequence[Demonstration]) -> list[Judgement]:
        """Judge rows, in their order; a row never fails the others, it stays unjudged.

        A judgement follows from its row alone: not from the rows around it, nor from their order.
        """
        ...


def require_judged(judgements: Sequence[Judgement], max_unjudged: float, fix: str) -> None:
    """Refuse what a judge left unjudged beyond a share of all rows.

    Raises:
        DataError: with the first reason, and the `fix` of the judge's kind.
    """
    unjudged = [each for each in judgements if not each.is_judged]
    if len(unjudged) > max_unjudged * len(judgements):
        raise DataError(
            f"at most {max_unjudged:.0%} of the rows may stay unjudged, "
            f"got {len(unjudged)} of {len(judgements)}",
            where="prune.judge",
            why=unjudged[0].reason,
            fix=fix,
        )
