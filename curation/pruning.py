"""Which rows go: an exact share of the whole set, the easiest first.

    quotas (how many of each capability) → order (easiest first) → Decision per row, none deleted

Ties and everything else follow from the rows alone, so that a second run writes the same bytes.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from statistics import fmean

import pyarrow as pa

from curation.judge import Judgement
from ground.errors import DataError
from ground.records import LABELS, Demonstration, Difficulty
from ground.rows import row_of
from ground.tables import ROW_SCHEMA

EVERYTHING = "all"
"""The one quota of a set that is not divided by capability."""

SCHEMA = pa.schema(
    [
        *ROW_SCHEMA,
        *(pa.field(f"meta_p_{label}", pa.float64()) for label in LABELS),
        pa.field("meta_label_mass", pa.float64(), nullable=False),
        pa.field("meta_given_label", pa.string()),
        pa.field("meta_rank", pa.int64(), nullable=False),
        pa.field("meta_kept", pa.bool_(), nullable=False),
        pa.field("meta_rule", pa.string(), nullable=False),
        pa.field("meta_reason", pa.string(), nullable=False),
    ]
)
"""kept.parquet and dropped.parquet: the row, what the judge said, and why it went or stayed.
`difficulty` is the judge's; the label that the row came with is `meta_given_label`."""


@dataclass(frozen=True, slots=True)
class Decision:
    """A row, its judgement and its fate.

    Example:
        Decision(row, judgement, rank=3, quota=19, group="math") is dropped: the 3rd easiest, 19 go
    """

    row: Demonstration
    judgement: Judgement
    rank: int
    """Place from the easiest, 0, to the hardest; unjudged rows stand behind the hardest."""
    quota: int
    """How many of its group are dropped."""
    group: str
    """Its capability, or `all`."""
    size: int
    """Rows of its group."""

    @property
    def kept(self) -> bool:
        """True when it is trained on."""
        return self.rank >= self.quota

    @property
    def reason(self) -> str:
        """Why, in words."""
        fate = f"rank {self.rank} of {self.size} in {self.group}, the easiest {self.quota} go"
        return fate if self.judgement.is_judged else f"unjudged: {self.judgement.reason}; {fate}"


def rule_of(fraction: object, per: str) -> str:
    """The rule of a decision in words, as the rows carry it.

    Example:
        rule_of(0.95, "capability") → "easiest 0.95 per capability"
    """
    return f"easiest {fraction} per {per}"


def per_of(rule: str) -> str:
    """Whether a rule gives every capability its share, or takes the easiest wherever they are."""
    return rule.rpartition(" per ")[2]


def quotas(counts: Mapping[str, int], share: Fraction) -> dict[str, int]:
    """How many rows of each group are dropped: floor(share · n) of all n rows together.

    Each group gives the floor of its share; what is missing to the total is taken one by one where
    the remainder is largest (ties by name), but never a group's last row.

    Example:
        {a: 3, b: 3, c: 4} at 1/2 → 5 in all: floors 1, 1, 2, one more from a → {a: 2, b: 1, c: 2}

    Raises:
        DataError: fewer rows would stay than there are groups.
    """
    num, exact = sum(counts.values()), {name: share * count for name, count in counts.items()}
    wanted = int(share * num)
    if num - wanted < len(counts):
        small = min(counts, key=lambda name: (counts[name], name))
        raise DataError(
            f"at least one row of every group must stay, but removing {float(share):g} of {num} "
            f"rows leaves {num - wanted} for {len(counts)} groups, the smallest being "
            f"{small!r} with {counts[small]}",
            where="prune",
            fix="lower prune.fraction, give more data, or set prune.per to all",
        )
    given = {name: int(part) for name, part in exact.items()}
    for _ in range(wanted - sum(given.values())):
        able = [name for name, count in counts.items() if given[name] + 1 < count]
        given[min(able, key=lambda name: (given[name] - exact[name], name))] += 1
    return given


def group_counts(rows: Iterable[Demonstration], per: str) -> dict[str, int]:
    """Sizes of the groups that each give their share."""
    return dict(Counter(_group(row, per) for row in rows))


def prune(
    rows: Sequence[Demonstration], judgements: Sequence[Judgement], share: Fraction, per: str
) -> list[Decision]:
    """Decide on every row, in the order given; nothing is deleted.

    Easiest first; of equals the one with the smaller sha256 of its id; unjudged rows last.
    """
    drops = quotas(group_counts(rows, per), share)
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[_group(row, per)].append(index)
    decisions: dict[int, Decision] = {}
    for name, members in groups.items():
        members.sort(key=lambda index: _ease(rows[index], judgements[index]))
        for rank, index in enumerate(members):
            decisions[index] = Decision(
                rows[index], judgements[index], rank, drops[name], name, len(members)
            )
    return [decisions[index] for index in range(len(rows))]


def decision_row(decision: Decision, judged_by: str, rule: str) -> dict[str, object]:
    """A row of `SCHEMA`; it reads back as a demonstration with the judge's difficulty."""
    judgement, given = decision.judgement, decision.row.difficulty
    difficulty = Difficulty(judgement.label, judgement.score, judged_by)
    columns: dict[str, object] = {
        **row_of(replace(decision.row, difficulty=difficulty)),
        "meta_label_mass": judgement.mass,
        "meta_given_label": given.label if given else None,
        "meta_rank": decision.rank,
        "meta_kept": decision.kept,
        "meta_rule": rule,
        "meta_reason": decision.reason,
    }
    votes = {f"meta_p_{label}": judgement.probabilities.get(label) for label in LABELS}
    return columns | votes


def summarise(decisions: Sequence[Decision]) -> dict[str, object]:
    """Counts, mean scores and thresholds, over all rows and per capability."""
    parts: defaultdict[str, list[Decision]] = defaultdict(list)
    for decision in decisions:
        parts[decision.row.capability].append(decision)
    return {
        **_figures(decisions),
        "by_capability": {name: _figures(part) for name, part in sorted(parts.items())},
    }


def _figures(decisions: Sequence[Decision]) -> dict[str, object]:
    kept = [_score(d) for d in decisions if d.kept]
    dropped = [_score(d) for d in decisions if not d.kept]
    labels = Counter(d.judgement.label or "unjudged" for d in decisions)
    return {
        "rows": len(decisions),
        "kept": len(kept),
        "dropped": len(dropped),
        "mean_score_kept": _mean(kept),
        "mean_score_dropped": _mean(dropped),
        "threshold": max((score for score in dropped if score is not None), default=None),
        "labels": dict(sorted(labels.items())),
    }


def _group(row: Demonstration, per: str) -> str:
    return row.capability if per == "capability" else EVERYTHING


def _ease(row: Demonstration, judgement: Judgement) -> tuple[bool, float, str]:
    lot = hashlib.sha256(row.id.encode()).hexdigest()
    return not judgement.is_judged, judgement.score or 0.0, lot


def _score(decision: Decision) -> float | None:
    return decision.judgement.score


def _mean(scores: Sequence[float | None]) -> float | None:
    judged = [score for score in scores if score is not None]
    return fmean(judged) if judged else None
