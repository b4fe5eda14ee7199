"""Do judges agree? Some of the rows are judged by further kinds, and the orders are compared.

    rows by lot → each kind's scores → rank correlation per pair of kinds and per capability

No kind is the truth. `solve_rate` is a measurement, though of the judge model and not of the one
to be trained; a judge that disagrees with it about a capability prunes something else than what is
easy there.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pyarrow as pa

from curation.judge import PARTS, Judgement
from curation.pruning import EVERYTHING, lot
from ground.records import Demonstration

FEWEST = 8
"""Rows below which a correlation says nothing."""

SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("capability", pa.string(), nullable=False),
        pa.field("kind", pa.string(), nullable=False),
        pa.field("score", pa.float64()),
        *(pa.field(name, pa.float64()) for name in PARTS),
        pa.field("reason", pa.string(), nullable=False),
    ]
)
"""calibration.parquet: what each kind of judge said of each row that was chosen."""

Scored = Mapping[str, Sequence[float | None]]
"""Scores by kind, in the order of one list of rows; None where unjudged."""


@dataclass(frozen=True, slots=True)
class Agreement:
    """How alike two kinds of judges order the rows of a capability.

    Example:
        Agreement("math", "label", "solve_rate", rows=48, correlation=0.61, low=0.40, high=0.77)
    """

    capability: str
    """`all` for the rows of all of them together."""
    one: str
    other: str
    rows: int
    """That both have judged."""
    correlation: float | None
    """Spearman's, 1 for the same order; None of fewer than `FEWEST` rows, or where one kind gives
    all of them the same score."""
    low: float | None
    high: float | None
    """Its 95 % interval by Fisher's z; a few dozen rows leave much room."""


def chosen(rows: Sequence[Demonstration], number: int) -> list[int]:
    """So many rows by lot, as indices: the same ones in every run."""
    return sorted(
        heapq.nsmallest(
            number, range(len(rows)), key=lambda index: lot(f"calibration/{rows[index].id}")
        )
    )


def calibration_rows(
    rows: Sequence[Demonstration], judgements: Mapping[str, Sequence[Judgement]]
) -> list[dict[str, object]]:
    """Rows of `SCHEMA`, from judgements by kind."""
    return [
        {
            "id": row.id,
            "capability": row.capability,
            "kind": kind,
            "score": judgement.score,
            **{name: judgement.parts.get(name) for name in PARTS},
            "reason": judgement.reason,
        }
        for kind, own in judgements.items()
        for row, judgement in zip(rows, own, strict=True)
    ]


def agreements(capabilities: Sequence[str], scores: Scored) -> list[Agreement]:
    """Each pair of kinds, over all rows and per capability.

    Args:
        capabilities: of the rows, in the order of the scores.
    """
    found: list[Agreement] = []
    for name in (EVERYTHING, *sorted(set(capabilities))):
        own = [at for at, each in enumerate(capabilities) if name in (EVERYTHING, each)]
        for one, other in combinations(scores, 2):
            pairs = [(scores[one][at], scores[other][at]) for at in own]
            both = [(x, y) for x, y in pairs if x is not None and y is not None]
            value = rank_correlation(both) if len(both) >= FEWEST else None
            low, high = (None, None) if value is None else interval(value, len(both))
            found.append(Agreement(name, one, other, len(both), value, low, high))
    return found


def rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Spearman's rank correlation, ties at their mean rank; None where one side is constant.

    Example:
        (1, 2), (2, 1), (3, 3) → 0.5
    """
    x, y = (_ranks([pair[side] for pair in pairs]) for side in (0, 1))
    dx, dy = x - x.mean(), y - y.mean()
    norm = math.sqrt(float((dx * dx).sum() * (dy * dy).sum()))
    return float((dx * dy).sum()) / norm if norm else None


def interval(correlation: float, number: int) -> tuple[float, float]:
    """95 % of Fisher's z for a correlation of so many pairs.

    Example:
        interval(0.5, 28) → 0.16 and 0.74: atanh(0.5) ± 1.96 / 5
    """
    middle = math.atanh(max(min(correlation, 1 - 1e-12), -1 + 1e-12))
    half = 1.96 / math.sqrt(number - 3)
    return math.tanh(middle - half), math.tanh(middle + half)


def _ranks(values: Sequence[float]) -> np.ndarray:
    """Ranks from 0; of equal values their mean."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return ((ends - counts + ends - 1) / 2)[places]
