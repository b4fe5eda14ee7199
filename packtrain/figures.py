"""The report's charts: what a run's files say, drawn. A figure without data is left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ground.metrics import read_metrics
from packtrain import charts
from packtrain.canvas import Interval
from packtrain.observe import (
    estimate,
    evaluation,
    mapping,
    number,
    read_lines,
    read_rows,
    series,
    text,
)
from packtrain.verdict import NAMES, evaluated

SHARES = {"kept_share": "trained on", "flat_share": "flat"}
ERRORS = {"error_share": "errors"}
GAPS = {"fresh_gap_mean": "mean", "fresh_gap_max": "largest"}
IDLE = {"learner_idle_share": "trainer", "rollout_idle_share": "rollout workers"}
WEIGHT = "distill_weight/"
FINAL = ("trained", "filtered", "withdrawn")
REASONS = {
    **{"all-0": "all wrong", "all-1": "all right", "flat": "equal rewards", "broken": "broken"},
    "surveyed": "only surveyed",
}
FOLD_LIMIT = 400
"""Blocks of a timeline row; gaps shorter than 1/FOLD_LIMIT of the whole are closed."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with its caption.

    Example:
        Figure("Entropy", "<svg …>", "Mean entropy of the next token, in nats.")
    """

    title: str
    svg: str
    caption: str = ""


def accuracy(run: Path) -> list[Figure]:
    """pass@k by model, and pass@1 by capability and by difficulty."""
    places = evaluated(run)
    names = [NAMES[place] for place in places]
    evaluations = [evaluation(run, place) for place in places]
    ks = pass_names(evaluations)
    overall = [(k, [_interval(each.get(k)) for each in evaluations]) for k in ks]
    caption = "Dots are means over held-out prompts, whiskers 95% intervals."
    figures = [
        Figure(
            "Accuracy by model",
            charts.interval_chart(names, overall, y_label="share solved", title="pass@k by model"),
            f"{caption} pass@16 far above pass@1 is what RL can turn into pass@1.",
        )
    ]
    for key, title in (("by_capability", "capability"), ("by_difficulty", "difficulty")):
        parts = _parts(evaluations, key)
        rows = [
            (
                name,
                [
                    _interval(mapping(mapping(each.get(key)).get(part)).get("pass@1"))
                    for part in parts
                ],
            )
            for name, each in zip(names, evaluations, strict=True)
        ]
        svg = charts.interval_chart(parts, rows, y_label="pass@1", title=f"pass@1 by {title}")
        figures.append(Figure(f"pass@1 by {title}", svg, caption))
    return _drawn(figures)


def pass_names(evaluations: Iterable[Mapping[str, object]]) -> list[str]:
    """`pass@1`, `pass@4`, … as far as they were measured, k rising."""
    names = {key for each in evaluations for key in each if key.startswith("pass@")}
    return sorted(names, key=lambda name: int(name.removeprefix("pass@")))


def entropy(run: Path) -> list[Figure]:
    """Entropy of the models: what SFT and DPO leave for RL to explore."""
    places = evaluated(run)
    bars = [
        charts.Bar(NAMES[place], (("entropy", value),))
        for place in places
        if (value := number(evaluation(run, place).get("entropy"))) is not None
    ]
    svg = charts.bar_chart(bars, title="entropy by model", unit="nats", digits=".3f")
    caption = "Mean entropy of the next token on held-out prompts, in nats."
    return _drawn([Figure("Entropy by model", svg, caption)])


def corner_cases(run: Path) -> list[Figure]:
    """Faults of form by model: what DPO is there to remove."""
    bars = []
    for place in evaluated(run):
        found = evaluation(run, place)
        shares = mapping(found.get("faults"))
        if number(found.get("corner_case_share")) is not None:
            parts = [
                (name.replace("_", " "), number(shares[name]) or 0.0) for name in sorted(shares)
            ]
            bars.append(charts.Bar(NAMES[place], tuple(parts)))
    svg = charts.bar_chart(bars, title="corner cases by model", unit="of the answers", digits=".1%")
    caption = "Share of the answers with a fault of form, each named by its plainest one."
    return _drawn([Figure("Corner cases by model", svg, caption)])


def training(run: Path) -> list[Figure]:
    """Losses of SFT and DPO, and what RL watches."""
    sft, rl, dpo = (steps(run, stage) for stage in ("sft", "rl", "dpo"))
    looks = steps(run, "rl", phase="validation")
    shared = by_capability(sft, "alpha/")
    pupil, name = (sft, "SFT") if shared else (steps(run, "taught"), "Taught SFT")
    targets = {"loss_hard": "the rows' own tokens", "loss_soft": "the teacher's word"}
    solved = {"pass_rate": "pass rate"}
    return _drawn(
        [
            _lines("SFT loss", sft, {"loss": "training"}, "nats per token"),
            _lines(f"{name}: what it learns", pupil, targets, "nats per token"),
            _lines(f"{name}: share of the teacher", pupil, by_capability(pupil, "alpha/"), "share"),
            _lines("RL: reward and pass rate", rl, {"reward": "reward", **solved}, "mean"),
            _lines("RL: pass rate on its validation slice", looks, solved, "mean"),
            _lines("RL: entropy", rl, {"entropy": "entropy"}, "nats per token"),
            _lines("RL: mismatch of sampler and learner", rl, {"mismatch_kl": "KL(μ‖π)"}, "nats"),
            _lines("RL: engine against learner, fresh answers", rl, GAPS, "nats"),
            _lines("RL: effective sample size", rl, {"ess": "ESS / n"}, "share"),
            _lines("RL: shares of the drawn groups", rl, SHARES, "share of the draws"),
            _lines("RL: answers that ended in an error", rl, ERRORS, "share of the answers"),
            _lines("RL: idle time", rl, IDLE, "share of the step"),
            _lines("RL: weight of the teacher", rl, by_capability(rl, WEIGHT), "mean"),
            _lines("RL: distance from the teacher", rl, by_capability(rl, "teacher_kl/"), "nats"),
            _lines("DPO loss", dpo, {"loss": "training"}, "loss"),
        ]
    )


def by_capability(rows: Iterable[Mapping[str, object]], prefix: str) -> dict[str, str]:
    """The metrics of a family that rows have, and the capability of each.

    Example:
        rows with alpha/chat and alpha/math → {"alpha/chat": "chat", "alpha/math": "math"}
    """
    keys = {key for row in rows for key in row if key.startswith(prefix)}
    return {key: key.removeprefix(prefix) for key in sorted(keys)}


def steps(run: Path, stage: str, phase: str | None = None) -> list[dict[str, object]]:
    """The lines of a stage's metrics about training steps, or about another phase."""
    rows = read_metrics(run / stage / "metrics.jsonl")
    return [row for row in rows if row.get("phase") == phase]


def funnel(run: Path) -> list[Figure]:
    """What became of every prompt that RL drew."""
    counts = ledger_counts(run)
    if not counts:
        return []
    parts: dict[str, list[tuple[str, float]]] = {state: [] for state in FINAL}
    for (state, reason), count in sorted(counts.items()):
        parts.setdefault(state, []).append((REASONS.get(reason, reason) or state, float(count)))
    drawn = sum(counts.values())
    bars = [charts.Bar("drawn", (("drawn", float(drawn)),))]
    bars += [charts.Bar(state, tuple(values)) for state, values in parts.items() if values]
    caption = (
        "Groups whose rewards are all equal have no advantage: they are filtered and their slot is "
        "filled again, so that every trained group teaches something."
    )
    svg = charts.bar_chart(bars, title="filter funnel", unit="groups")
    return [Figure("Filter funnel", svg, caption)]


def ledger_counts(run: Path) -> Counter[tuple[str, str]]:
    """Draws by their last state and reason."""
    last: dict[str, tuple[str, str]] = {}
    for record in read_lines(run / "rl" / "ledger.jsonl"):
        last[str(record.get("draw"))] = (text(record.get("state")), text(record.get("reason")))
    return Counter(last.values())


def pruning(run: Path) -> list[Figure]:
    """How the judge scored the rows that were kept and dropped."""
    groups = [(name, scores(run, name)) for name in ("kept", "dropped")]
    svg = charts.histogram(
        groups, title="judge's difficulty score", x_label="difficulty (0 easiest)"
    )
    caption = (
        "The teacher's score of every SFT row; the easiest rows of each capability are dropped."
    )
    return _drawn([Figure("Difficulty of kept and dropped rows", svg, caption)])


def scores(run: Path, name: str) -> list[float]:
    """Difficulty scores of prune/kept.parquet or prune/dropped.parquet."""
    rows = read_rows(run / "prune" / f"{name}.parquet", ["difficulty"])
    values = (number(mapping(row.get("difficulty")).get("score")) for row in rows)
    return [value for value in values if value is not None]


def timeline(run: Path) -> list[Figure]:
    """Who worked when during RL."""
    spans = list(_spans(read_lines(run / "rl" / "events.jsonl")))
    if not spans:
        return []
    start, end = min(span.start for span in spans), max(span.end for span in spans)
    moved = [
        charts.Span(span.role, span.kind, span.start - start, span.end - start) for span in spans
    ]
    folded = fold(moved, (end - start) / FOLD_LIMIT)
    svg = charts.timeline(folded, title="timeline of trainer and rollout workers")
    caption = "Trainer and rollout workers work at the same time: that is what asynchronous means."
    return [Figure("Trainer and rollout workers", svg, caption)]


def fold(spans: Sequence[charts.Span], gap: float) -> list[charts.Span]:
    """Spans of one role and kind that overlap, or are at most `gap` apart, become one.

    Example:
        rollout/0 busy from 0 to 2 and from 1 to 3 → busy from 0 to 3
    """
    folded: dict[tuple[str, str], list[charts.Span]] = {}
    for span in sorted(spans, key=lambda s: (s.role, s.start)):
        row = folded.setdefault((span.role, span.kind), [])
        if row and span.start - row[-1].end <= gap:
            row[-1] = charts.Span(span.role, span.kind, row[-1].start, max(row[-1].end, span.end))
        else:
            row.append(span)
    return [span for row in folded.values() for span in row]


def _spans(events: Iterable[Mapping[str, object]]) -> Iterable[charts.Span]:
    for event in events:
        start, end = number(event.get("start")), number(event.get("end"))
        if start is not None and end is not None and end >= start:
            yield charts.Span(text(event.get("role")), text(event.get("kind")), start, end)


def _lines(
    title: str, rows: Sequence[Mapping[str, object]], keys: Mapping[str, str], y_label: str
) -> Figure:
    lines = [charts.Series(name, series(rows, key)) for key, name in keys.items()]
    floor = 0.0 if y_label.startswith(("share", "mean")) else None
    return Figure(
        title, charts.line_chart(lines, x_label="step", y_label=y_label, title=title, floor=floor)
    )


def _parts(evaluations: Sequence[Mapping[str, object]], key: str) -> list[str]:
    """Names of the parts, in the order of difficulty where they are labels."""
    names = {name for each in evaluations for name in mapping(each.get(key))}
    labels = ("easy", "medium", "hard")
    return sorted(names, key=lambda name: (labels.index(name) if name in labels else 0, name))


def _interval(value: object) -> Interval | None:
    found = estimate(value)
    return Interval(found.mean, found.low, found.high) if found else None


def _drawn(figures: Iterable[Figure]) -> list[Figure]:
    return [figure for figure in figures if figure.svg]
