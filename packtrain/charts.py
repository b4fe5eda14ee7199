"""Charts as inline SVG: lines, intervals, bars and a timeline, without a plotting library.

Every chart is a string that the report puts into its page; one chart serves light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

from packtrain.canvas import (
    BOTTOM,
    HEIGHT,
    NUM_COLOURS,
    RIGHT,
    TOP,
    WIDTH,
    Canvas,
    Interval,
    Plot,
    nice_range,
    ticks,
)

ROW = 26
"""Height of one row in charts that stack rows."""
SEGMENT_LIMIT = 600
"""Points of a line that are drawn; longer series are thinned by averaging."""


@dataclass(frozen=True, slots=True)
class Series:
    """A named line.

    Example:
        Series("reward", ((1, 0.41), (2, 0.45), (3, 0.52)))
    """

    name: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, slots=True)
class Bar:
    """One horizontal bar, made of parts that lie one after another.

    Example:
        Bar("flat", (("all wrong", 120.0), ("all right", 340.0)))
    """

    label: str
    parts: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Span:
    """Something that took time, in seconds from the start of the timeline.

    Example:
        Span(role="learner", kind="train", start=3.2, end=4.9)
    """

    role: str
    kind: str
    start: float
    end: float


def line_chart(
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    title: str = "",
    floor: float | None = None,
) -> str:
    """Lines over a common x axis; `floor` forces the y axis to reach down to it."""
    drawn = [Series(line.name, thin(line.points)) for line in series if line.points]
    if not drawn:
        return ""
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points] + ([] if floor is None else [floor])
    plot = Plot(
        title or y_label, nice_range(min(xs), max(xs), tight=True), nice_range(min(ys), max(ys))
    )
    plot.axes(x_label, y_label)
    for index, line in enumerate(drawn):
        pixels = " ".join(f"{plot.x(x):.1f},{plot.y(y):.1f}" for x, y in line.points)
        plot.add("polyline", points=pixels, **{"class": f"line c{index % NUM_COLOURS}"})
        last_x, last_y = line.points[-1]
        plot.add(
            "circle",
            cx=plot.x(last_x),
            cy=plot.y(last_y),
            r=2.6,
            **{"class": f"dot c{index % NUM_COLOURS}"},
        )
    if len(drawn) > 1:
        plot.legend([line.name for line in drawn])
    return plot.svg()


def interval_chart(
    groups: Sequence[str],
    series: Sequence[tuple[str, Sequence[Interval | None]]],
    *,
    y_label: str,
    title: str = "",
) -> str:
    """Dots with whiskers: one cluster per group (stage), one colour per series (pass@1, pass@4)."""
    if not groups or not series:
        return ""
    plot = Plot(title or y_label, (0.0, float(len(groups)), 1.0), (0.0, 1.0, 0.2))
    plot.axes("", y_label, x_ticks=False, percent=True)
    step = 0.7 / len(series)
    for position, group in enumerate(groups):
        plot.text(
            plot.x(position + 0.5), HEIGHT - BOTTOM + 18, group, anchor="middle", style="name"
        )
    for index, (_, intervals) in enumerate(series):
        for position, interval in enumerate(intervals):
            if interval is not None:
                centre = plot.x(position + 0.15 + step * (index + 0.5))
                plot.whisker(centre, interval, index)
    plot.legend([name for name, _ in series])
    return plot.svg()


def bar_chart(
    bars: Sequence[Bar],
    *,
    title: str,
    unit: str = "",
    digits: str = ",.0f",
    ends: Sequence[str] = (),
) -> str:
    """Horizontal stacked bars with their sums; parts of equal name have equal colour.

    `digits` is the format of the sums; `ends` are texts in their place, one per bar.
    """
    if not bars:
        return ""
    names = list(dict.fromkeys(name for bar in bars for name, _ in bar.parts))
    largest = max((sum(value for _, value in bar.parts) for bar in bars), default=0.0) or 1.0
    height = TOP + ROW * len(bars) + 30
    canvas = Canvas(title, height)
    left, room = 130.0, WIDTH - 130.0 - 70.0
    for row, bar in enumerate(bars):
        top = TOP + row * ROW
        canvas.text(left - 8, top + 15, bar.label, anchor="end", style="name")
        start = left
        for name, value in bar.parts:
            width = room * value / largest
            element = canvas.add(
                "rect", x=start, y=top + 3, width=max(width, 0.0), height=ROW - 8,
                **{"class": f"bar c{names.index(name) % NUM_COLOURS}"},
            )  # fmt: skip
            ElementTree.SubElement(
                element, "title"
            ).text = f"{bar.label}, {name}: {value:,.6g} {unit}".rstrip()
            start += width
        end = ends[row] if ends else f"{sum(value for _, value in bar.parts):{digits}}"
        canvas.text(start + 6, top + 15, end, style="tick")
    if len(names) > 1:
        canvas.legend(names, y=height - 10, left=left)
    return canvas.svg()


def histogram(
    groups: Sequence[tuple[str, Sequence[float]]], *, title: str, x_label: str, num_bins: int = 20
) -> str:
    """Counts of values in [0, 1], one colour per group, drawn over one another."""
    counts = [(name, _counts(values, num_bins)) for name, values in groups if values]
    if not counts:
        return ""
    top = max(max(bins) for _, bins in counts)
    plot = Plot(title, (0.0, 1.0, 0.2), nice_range(0.0, float(top)))
    plot.axes(x_label, "rows")
    width = (plot.x(1.0) - plot.x(0.0)) / num_bins
    for index, (_, bins) in enumerate(counts):
        for position, count in enumerate(bins):
            y = plot.y(float(count))
            plot.add(
                "rect", x=plot.x(position / num_bins) + 1, y=y, width=width - 2,
                height=plot.y(0.0) - y, **{"class": f"bar veil c{index}"},
            )  # fmt: skip
    plot.legend([name for name, _ in counts])
    return plot.svg()


def timeline(spans: Sequence[Span], *, title: str) -> str:
    """One row per role, a block per span, seconds along the bottom; kinds have colours."""
    if not spans:
        return ""
    roles = list(dict.fromkeys(span.role for span in spans))
    kinds = list(dict.fromkeys(span.kind for span in spans))
    height = TOP + ROW * len(roles) + 64
    canvas = Canvas(title, height)
    left, room = 110.0, WIDTH - 110.0 - RIGHT
    first, last = min(span.start for span in spans), max(span.end for span in spans)
    low, high, step = nice_range(first, max(last, first + 1e-6), tight=True)
    scale = room / (high - low)
    for row, role in enumerate(roles):
        canvas.text(left - 8, TOP + row * ROW + 17, role, anchor="end", style="name")
        canvas.line(left, TOP + row * ROW + ROW, WIDTH - RIGHT, TOP + row * ROW + ROW, "grid")
    for span in spans:
        element = canvas.add(
            "rect", x=left + (span.start - low) * scale, y=TOP + roles.index(span.role) * ROW + 4,
            width=max((span.end - span.start) * scale, 0.6), height=ROW - 7,
            **{"class": f"bar c{kinds.index(span.kind) % NUM_COLOURS}"},
        )  # fmt: skip
        ElementTree.SubElement(
            element, "title"
        ).text = f"{span.role} {span.kind}: {span.start:.1f} to {span.end:.1f} s"
    bottom = TOP + ROW * len(roles)
    for tick in ticks(low, high, step):
        canvas.text(
            left + (tick - low) * scale, bottom + 16, f"{tick:g}", anchor="middle", style="tick"
        )
    canvas.text(left + room / 2, bottom + 32, "seconds", anchor="middle", style="label")
    canvas.legend(kinds, y=height - 8, left=left)
    return canvas.svg()


def thin(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    """At most SEGMENT_LIMIT finite points, neighbours averaged."""
    finite = [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
    width = math.ceil(len(finite) / SEGMENT_LIMIT) or 1
    buckets = [finite[i : i + width] for i in range(0, len(finite), width)]
    return tuple(
        (sum(x for x, _ in bucket) / len(bucket), sum(y for _, y in bucket) / len(bucket))
        for bucket in buckets
    )


def _counts(values: Sequence[float], num_bins: int) -> list[int]:
    bins = [0] * num_bins
    for value in values:
        bins[min(max(int(value * num_bins), 0), num_bins - 1)] += 1
    return bins
