"""Which rows go: an exact share of the whole set, what is worth least first.

    quotas (how many of each capability) → order → Decision per row, none deleted

Rows go in one order, whatever the share: misaligned ones, near-duplicates of rows that are harder
(the easiest first), then the easiest, with the unjudged spread among both by lot. So a deeper cut
only takes more, and what another share would keep can be told from the ranks. Ties and everything
else follow from the rows alone, so that a second run writes the same bytes.
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from statistics import fmean
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from curation.judge import PARTS, Judgement
from ground.errors import DataError
from ground.records import Demonstration, Difficulty
from ground.rows import row_of
from ground.tables import ROW_SCHEMA

EVERYTHING = "all"
"""The one quota of a set that is not divided by capability."""

_WORDLESS = {True: "no label", False: "unjudged"}
"""How rows without a label are counted: some kinds of judges give scores only."""

SCHEMA = pa.schema(
    [
        *ROW_SCHEMA,
        *(pa.field(f"meta_{name}", pa.float64()) for name in PARTS),
        pa.field("meta_given_label", pa.string()),
        pa.field("meta_mark", pa.string(), nullable=False),
        pa.field("meta_duplicate_of", pa.string()),
        pa.field("meta_rank", pa.int64(), nullable=False),
        pa.field("meta_kept", pa.bool_(), nullable=False),
        pa.field("meta_rule", pa.string(), nullable=False),
        pa.field("meta_reason", pa.string(), nullable=False),
    ]
)
"""kept.parquet and dropped.parquet: the row, what the judge said, and why it went or stayed.
`difficulty` is the judge's; the label that the row came with is `meta_given_label`. `meta_mark` is
misaligned, duplicate, or empty."""

Mark = Literal["misaligned", "duplicate", ""]
Unjudged = Literal["proportional", "keep", "drop"]


@dataclass(frozen=True, slots=True)
class Decision:
    """A row, its judgement and its fate.

    Example:
        Decision(row, judgement, rank=3, quota=19, group="math") is dropped: the 3rd easiest, 19 go
    """

    row: Demonstration
    judgement: Judgement
    rank: int
    """Place in the order in which rows of its group go, from 0."""
    quota: int
    """How many of its group are dropped."""
    group: str
    """Its capability, or `all`."""
    size: int
    """Rows of its group."""
    duplicate_of: str = ""
    """Id of the row that stands for this one and for others like it."""

    @property
    def kept(self) -> bool:
        """True when it is trained on."""
        return self.rank >= self.quota

    @property
    def mark(self) -> Mark:
        """Why it goes before others, however hard it is."""
        if self.judgement.is_misaligned:
            return "misaligned"
        return "duplicate" if self.duplicate_of else ""

    @property
    def reason(self) -> str:
        """Why, in words."""
        fate = f"rank {self.rank} of {self.size} in {self.group}, the easiest {self.quota} go"
        if self.mark == "misaligned":
            return f"misaligned, goes first; {fate}"
        if self.mark:
            return f"a near-duplicate of {self.duplicate_of}, goes before the easiest; {fate}"
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
    rows: Sequence[Demonstration],
    judgements: Sequence[Judgement],
    share: Fraction,
    per: str,
    *,
    unjudged: Unjudged = "proportional",
    twins: Mapping[int, int] | None = None,
) -> list[Decision]:
    """Decide on every row, in the order given; nothing is deleted.

    Of equals the row with the smaller sha256 of its id goes first.

    Args:
        unjudged: where rows without a judgement stand in the order, see `PruneSection`.
        twins: near-duplicates, each with the row that stands for it, by index.
    """
    drops = quotas(group_counts(rows, per), share)
    groups: defaultdict[str, list[int]] = defaultdict(list)
    for index, row in enumerate(rows):
        groups[_group(row, per)].append(index)
    decisions: dict[int, Decision] = {}
    for name, members in groups.items():
        for rank, index in enumerate(_in_order(members, rows, judgements, unjudged, twins or {})):
            stands_for = (twins or {}).get(index)
            decisions[index] = Decision(
                rows[index],
                judgements[index],
                rank,
                drops[name],
                name,
                len(members),
                "" if stands_for is None else rows[stands_for].id,
            )
    return [decisions[index] for index in range(len(rows))]


def _in_order(
    members: Sequence[int],
    rows: Sequence[Demonstration],
    judgements: Sequence[Judgement],
    unjudged: Unjudged,
    twins: Mapping[int, int],
) -> list[int]:
    """The rows of a group in the order in which they go."""
    misaligned: list[int] = []
    duplicates: list[int] = []
    others: list[int] = []
    for index in sorted(members, key=lambda index: lot(rows[index].id)):
        if judgements[index].is_misaligned:
            misaligned.append(index)
        elif index in twins:
            duplicates.append(index)
        else:
            others.append(index)
    return [
        *misaligned,
        *_easiest_first(duplicates, judgements, unjudged),
        *_easiest_first(others, judgements, unjudged),
    ]


def _easiest_first(
    lots: Sequence[int], judgements: Sequence[Judgement], unjudged: Unjudged
) -> list[int]:
    """Rows by score, ties as they lie, and the unjudged among them where the rule has them."""
    plain = [index for index in lots if judgements[index].is_judged]
    blank = [index for index in lots if not judgements[index].is_judged]
    plain.sort(key=lambda index: judgements[index].score or 0.0)
    if unjudged == "proportional":
        return spread(plain, blank)
    return [*blank, *plain] if unjudged == "drop" else [*plain, *blank]


def spread(many: Sequence[int], few: Sequence[int]) -> list[int]:
    """Both in one order, each in its own, such that of the first k floor(k · share) are of `few`.

    Example:
        0 1 2 3 and 8 9, a third of all → 0 1 8 2 3 9
    """
    total, taken = len(many) + len(few), 0
    order: list[int] = []
    for place in range(1, total + 1):
        if place * len(few) // total > taken:
            order.append(few[taken])
            taken += 1
        else:
            order.append(many[place - 1 - taken])
    return order


def stand_ins(
    clusters: Sequence[int] | NDArray[np.int64],
    rows: Sequence[Demonstration],
    judgements: Sequence[Judgement],
) -> dict[int, int]:
    """The rows that are near-duplicates, each with the row that stands for its cluster.

    That is the hardest judged one, of equals the one with the smaller hash; a misaligned row only
    where all are.

    Example:
        clusters [0, 0, 2], the second row harder → {0: 1}
    """
    members: defaultdict[int, list[int]] = defaultdict(list)
    for index, cluster in enumerate(clusters):
        if cluster != index:
            members[int(cluster)].append(index)

    def worth(index: int) -> tuple[bool, float, bytes]:
        judgement = judgements[index]
        score = -1.0 if judgement.score is None else judgement.score
        return judgement.is_misaligned, -score, lot(rows[index].id)

    twins: dict[int, int] = {}
    for first, others in members.items():
        best = min([first, *others], key=worth)
        twins |= {index: best for index in (first, *others) if index != best}
    return twins


def lot(row_id: str) -> bytes:
    """What orders rows where nothing else does: a hash of the id, alike in every run."""
    return hashlib.sha256(row_id.encode()).digest()


def decision_row(decision: Decision, judged_by: str, rule: str) -> dict[str, object]:
    """A row of `SCHEMA`; it reads back as a demonstration with the judge's difficulty."""
    judgement, given = decision.judgement, decision.row.difficulty
    difficulty = Difficulty(
        judgement.label,
        judgement.score,
        judged_by,
        int(judgement.parts.get("successes", 0)),
        int(judgement.parts.get("trials", 0)),
    )
    return {
        **row_of(replace(decision.row, difficulty=difficulty)),
        **{f"meta_{name}": judgement.parts.get(name) for name in PARTS},
        "meta_given_label": given.label if given else None,
        "meta_mark": decision.mark,
        "meta_duplicate_of": decision.duplicate_of or None,
        "meta_rank": decision.rank,
        "meta_kept": decision.kept,
        "meta_rule": rule,
        "meta_reason": decision.reason,
    }


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
    kept = [d for d in decisions if d.kept]
    dropped = [d for d in decisions if not d.kept]
    labels = Counter(d.judgement.label or _WORDLESS[d.judgement.is_judged] for d in decisions)
    scores = (d.judgement.score for d in dropped if not d.mark)
    return {
        "rows": len(decisions),
        "kept": len(kept),
        "dropped": len(dropped),
        "mean_score_kept": _mean(kept),
        "mean_score_dropped": _mean(dropped),
        "threshold": max((score for score in scores if score is not None), default=None),
        "labels": dict(sorted(labels.items())),
        "set_apart": _set_apart(kept, dropped),
    }


def _set_apart(kept: Sequence[Decision], dropped: Sequence[Decision]) -> dict[str, dict[str, int]]:
    """Rows that did not go or stay for their score: how many of each kind were kept and dropped."""
    counts = {
        fate: Counter(d.mark or "unjudged" for d in part if d.mark or not d.judgement.is_judged)
        for fate, part in (("kept", kept), ("dropped", dropped))
    }
    names = sorted({name for each in counts.values() for name in each})
    return {name: {fate: counts[fate][name] for fate in counts} for name in names}


def _group(row: Demonstration, per: str) -> str:
    return row.capability if per == "capability" else EVERYTHING


def _mean(decisions: Sequence[Decision]) -> float | None:
    """Of the scores of rows that have one."""
    scores = [d.judgement.score for d in decisions]
    judged = [score for score in scores if score is not None]
    return fmean(judged) if judged else None
