"""The report's charts of pruning and of the curriculum: what would another fraction have kept, what
was known of the prompts round by round, and how those that were drawn most went."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from curation.artefacts import Row, calibration_rows, draw_rows, read_batches, round_rows, shown
from curation.calibration import Agreement, agreements
from curation.config import PRESETS
from curation.tallies import group_of, quotas_at, round_sums
from ground.errors import DataError
from ground.records import LABELS
from packtrain import charts
from packtrain.figures import Figure

UNJUDGED = "unjudged"
UNLABELLED = "no label"
"""Of judges that give scores only."""
_STATUS = {"active": "active", "retired": "solved", "deferred": "never solved"}
_RATES = {
    "mean": "believed, whole pool",
    "target": "believed, what is drawn",
    "aim": "aimed at",
    "pass_rate": "shown by what was drawn",
}
_MOST_DRAWN = 4


@dataclass(frozen=True, slots=True)
class Cut:
    """What a fraction leaves of the judged rows.

    Example:
        Cut("95%", Counter({("math", "hard"): 45}))
    """

    name: str
    """The share that goes; `whole set` where nothing does."""
    left: Counter[tuple[str, str]]
    """Rows by capability and label."""

    def of(self, capability: str) -> int:
        """Rows left of a capability."""
        return sum(count for (name, _), count in self.left.items() if name == capability)


def cuts(run: Path) -> list[Cut]:
    """The judged rows, and what is left of them at the run's own fraction and at Meta's two."""
    rows = list(_ranked(run))
    if not rows:
        return []
    whole = Cut("whole set", Counter((row["capability"], row["label"]) for row in rows))
    found = [whole]
    for fraction in sorted({_own_fraction(rows), *PRESETS.values()}):
        try:
            quota = quotas_at(rows, Fraction(str(fraction)))
        except DataError:
            continue  # a small set that has not a row for every capability at this fraction
        left = (row for row in rows if row["rank"] >= quota[group_of(row)])
        name = f"{fraction:.0%} dropped"
        found.append(Cut(name, Counter((row["capability"], row["label"]) for row in left)))
    return found


def labels_left(found: Sequence[Cut]) -> list[Figure]:
    """Which labels a cut leaves, as shares of what is left."""
    bars, ends = [], []
    for cut in found:
        by_label = Counter[str]()
        for (_, label), count in cut.left.items():
            by_label[label] += count
        total = sum(by_label.values())
        names = (*LABELS, *((UNLABELLED,) if by_label[UNLABELLED] else ()), UNJUDGED)
        parts = tuple((name, by_label[name] / total) for name in names)
        bars.append(charts.Bar(cut.name, parts))
        ends.append(f"{total:,} rows")
    svg = charts.bar_chart(bars, title="labels left by fraction", unit="of the rows", ends=ends)
    caption = (
        "What is left of the rows at each fraction, by the judge's label. Rows without a judgement "
        "are never taken for easy; prune.unjudged says what becomes of them."
    )
    return [Figure("What another fraction would keep", svg, caption)] if svg else []


def cut_table(found: Sequence[Cut]) -> list[tuple[str, list[int]]]:
    """Rows of each capability in the whole set and at each fraction."""
    names = sorted({capability for cut in found for capability, _ in cut.left})
    return [(name, [cut.of(name) for cut in found]) for name in names]


def agreement(run: Path) -> list[Agreement]:
    """How far the kinds of judges agree that were asked about the same rows."""
    capabilities: dict[str, str] = {}
    scores: dict[str, dict[str, float | None]] = {}
    for row in calibration_rows(run):
        capabilities[row["id"]] = row["capability"]
        scores.setdefault(row["kind"], {})[row["id"]] = row["score"]
    by_kind = {kind: [own.get(each) for each in capabilities] for kind, own in scores.items()}
    return agreements(list(capabilities.values()), by_kind) if scores else []


def curriculum(run: Path) -> list[Figure]:
    """Prompts by status, what is believed against what is shown, and the prompts drawn most."""
    sums = round_sums(round_rows(run), draw_rows(run))
    status = _lines(sums, _STATUS)
    rates = _lines(sums, _RATES)
    axes = {"x_label": "policy version", "floor": 0.0}
    figures = [
        Figure(
            "Prompts by what is known of them",
            charts.line_chart(status, y_label="prompts", title="prompts by status", **axes),
            "Solved and never solved ones are drawn seldom; a look now and then can bring them "
            "back.",
        ),
        Figure(
            "Pass rates, believed and shown",
            charts.line_chart(rates, y_label="mean pass rate", title="pass rates", **axes),
            "Where what is drawn does better than was believed of it, the policy has outgrown "
            "what the curriculum knows.",
        ),
        Figure(
            "The prompts that were drawn most",
            charts.line_chart(
                _most_drawn(run), y_label="pass rate of the group", title="histories", **axes
            ),
            "One of each capability, named by the beginning of its id: packtrain view RUN groups "
            "--prompt ID shows what was asked and answered.",
        ),
    ]
    return [figure for figure in figures if figure.svg]


def _lines(sums: Sequence[Row], names: Mapping[str, str]) -> list[charts.Series]:
    points = {
        name: tuple((row["version"], row[key]) for row in sums if row[key] is not None)
        for key, name in names.items()
    }
    return [charts.Series(name, each) for name, each in points.items() if each]


def _most_drawn(run: Path) -> list[charts.Series]:
    histories: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for row in draw_rows(run):
        if row["trials"] and row["version"] is not None:
            point = (float(row["version"]), row["successes"] / row["trials"])
            histories.setdefault((row["capability"], str(row["prompt_id"])), []).append(point)
    longest: dict[str, tuple[str, str]] = {}
    for key in sorted(histories, key=lambda key: (-len(histories[key]), key)):
        if len(histories[key]) > 1:
            longest.setdefault(key[0], key)
    return [
        charts.Series(f"{name} {prompt[:8]}", tuple(sorted(histories[name, prompt])))
        for name, prompt in sorted(longest.values())[:_MOST_DRAWN]
    ]


def _ranked(run: Path) -> Iterator[Row]:
    """Judged rows without their texts; those of a file without ranks are left out."""
    columns = ("capability", "difficulty", "meta_rank", "meta_rule", "meta_kept")
    for name in ("kept", "dropped"):
        for row in read_batches(run / "prune" / f"{name}.parquet", columns):
            difficulty = row["difficulty"] or {}
            wordless = UNJUDGED if difficulty.get("score") is None else UNLABELLED
            if row["meta_rank"] is not None and row["meta_rule"]:
                yield {
                    "capability": shown(row["capability"]),
                    "label": difficulty.get("label") or wordless,
                    "rank": row["meta_rank"],
                    "rule": row["meta_rule"],
                    "kept": row["meta_kept"],
                }


def _own_fraction(rows: Sequence[Row]) -> float:
    """The share that was dropped, to the whole per cent."""
    return round(sum(not row["kept"] for row in rows) / len(rows), 2)
