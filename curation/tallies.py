"""Sums over the rows of a run that frames and report both show; see curation/artefacts.py."""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction

from curation.artefacts import Row
from curation.pruning import EVERYTHING, per_of, quotas

STATUSES = ("active", "retired", "deferred", "refused")
CURRICULUM = ("version", *STATUSES, "mean", "target", "aim", "drawn", "trained", "pass_rate")


def round_sums(rounds: Iterable[Row], draws: Iterable[Row]) -> list[Row]:
    """A row of `CURRICULUM` per round of the curriculum, versions rising.

    `mean` is that of the posterior over the pool, `target` that over what the round was to draw, by
    weight; `aim` is what `order: target` aimed at. `drawn`, `trained` and `pass_rate` are of the
    draws from this round up to the next.

    Example:
        10 prompts believed to be solved half of the time, 2 of them refused → active 8, mean 0.5
    """
    sums: dict[int, Counter[str]] = {}
    aims: dict[int, float | None] = {}
    for row in rounds:
        own = sums.setdefault(row["version"], Counter())
        aims[row["version"]] = row["aim"]
        own[row["status"]] += row["prompts"]
        if row["status"] != "refused":
            own["pool"] += row["prompts"]
            own["pool mean"] += row["mean"] * row["prompts"]
            own["share"] += row["share"]
            own["share mean"] += row["mean"] * row["share"]
    versions = sorted(sums)
    for draw in draws if versions else ():
        own = sums[versions[max(bisect_right(versions, draw["opened_at"]) - 1, 0)]]
        own["drawn"] += 1
        own["trained"] += draw["state"] == "trained"
        own["successes"] += draw["successes"]
        own["trials"] += draw["trials"]
    return [{**_round(version, sums[version]), "aim": aims[version]} for version in versions]


def quotas_at(rows: Sequence[Row], share: Fraction) -> dict[str, int]:
    """How many rows of each group a share would have dropped, by the rule that the rows name."""
    return quotas(Counter(group_of(row) for row in rows), share) if rows else {}


def group_of(row: Row) -> str:
    """The group in which a judged row has its rank: its capability, or all."""
    return EVERYTHING if per_of(row["rule"]) == EVERYTHING else row["capability"]


def _round(version: int, own: Counter[str]) -> Row:
    def ratio(part: str, whole: str) -> float | None:
        return own[part] / own[whole] if own[whole] else None

    return {
        "version": version,
        **{name: own[name] for name in (*STATUSES, "drawn", "trained")},
        "mean": ratio("pool mean", "pool"),
        "target": ratio("share mean", "share"),
        "pass_rate": ratio("successes", "trials"),
    }
