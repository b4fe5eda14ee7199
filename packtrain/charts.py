"""Charts as inline SVG: lines, intervals, bars and a timeline, without a plotting library.

Every chart is a string that the report puts into its page. Text and numbers go through
ElementTree, so data cannot open a tag; colours are the page's CSS classes `c0`…`c5`, so that one
chart serves light and dark. Coordinates are pixels of a fixed viewBox; the page scales it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 40
ROW = 26
"""Height of one row in charts that stack rows."""
NUM_COLOURS = 6
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
class Interval:
    """An estimate with its uncertainty.

    Example:
        Interval(mean=0.53, low=0.49, high=0.57)
    """

    mean: float
    low: float
    high: float


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
    plot = _Plot(
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
    plot = _Plot(title or y_label, (0.0, float(len(groups)), 1.0), (0.0, 1.0, 0.2))
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


def bar_chart(bars: Sequence[Bar], *, title: str, unit: str = "", digits: str = ",.0f") -> str:
    """Horizontal stacked bars with their sums; parts of equal name have equal colour.

    `digits` is the format of the sums.
    """
    if not bars:
        return ""
    names = list(dict.fromkeys(name for bar in bars for name, _ in bar.parts))
    largest = max((sum(value for _, value in bar.parts) for bar in bars), default=0.0) or 1.0
    height = TOP + ROW * len(bars) + 30
    canvas = _Canvas(title, height)
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
        canvas.text(start + 6, top + 15, f"{sum(v for _, v in bar.parts):{digits}}", style="tick")
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
    plot = _Plot(title, (0.0, 1.0, 0.2), nice_range(0.0, float(top)))
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
    canvas = _Canvas(title, height)
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


def nice_range(low: float, high: float, *, tight: bool = False) -> tuple[float, float, float]:
    """Round limits and a round tick step (1, 2 or 5 times a power of ten) that hold low and high.

    nice_range(0.13, 0.87) == (0.0, 1.0, 0.2); with `tight` the limits stay as they are.
    """
    if high <= low:
        low, high = low - 0.5 * (abs(low) or 1.0), high + 0.5 * (abs(high) or 1.0)
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * power for unit in (1, 2, 5, 10) if unit * power >= raw * 0.999)
    if tight:
        return low, high, step
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, step


def ticks(low: float, high: float, step: float) -> list[float]:
    """Multiples of `step` within the limits."""
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 10) for i in range(first, math.floor(high / step + 1e-9) + 1)]


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


class _Canvas:
    """An <svg> under construction, in pixels."""

    def __init__(self, title: str, height: float) -> None:
        self.height = height
        self.root = ElementTree.Element(
            "svg", {"viewBox": f"0 0 {WIDTH} {height:g}", "role": "img", "class": "chart"}
        )
        ElementTree.SubElement(self.root, "title").text = title

    def add(self, tag: str, **attributes: str | float) -> ElementTree.Element:
        """Append an element; numbers become attributes with one decimal."""
        texts = {k: v if isinstance(v, str) else f"{v:.1f}" for k, v in attributes.items()}
        return ElementTree.SubElement(self.root, tag, texts)

    def text(self, x: float, y: float, content: str, *, anchor: str = "start", style: str) -> None:
        """Write a string; `style` is a CSS class."""
        attributes: dict[str, str | float] = {"text-anchor": anchor, "class": style}
        self.add("text", x=x, y=y, **attributes).text = content

    def line(self, x1: float, y1: float, x2: float, y2: float, style: str) -> None:
        """Draw a straight line."""
        self.add("line", x1=x1, y1=y1, x2=x2, y2=y2, **{"class": style})

    def legend(self, names: Sequence[str], *, y: float, left: float) -> None:
        """Name the colours, left to right."""
        for index, name in enumerate(names):
            self.add(
                "rect",
                x=left,
                y=y - 8,
                width=9.0,
                height=9.0,
                **{"class": f"bar c{index % NUM_COLOURS}"},
            )
            self.text(left + 13, y, name, style="tick")
            left += 26 + 6.2 * len(name)

    def svg(self) -> str:
        """The finished element as a string."""
        return ElementTree.tostring(self.root, encoding="unicode")


class _Plot(_Canvas):
    """A canvas with an x and a y scale, each (low, high, tick step)."""

    def __init__(
        self, title: str, x_range: tuple[float, float, float], y_range: tuple[float, float, float]
    ) -> None:
        super().__init__(title, HEIGHT + 16)
        self.x_range, self.y_range = x_range, y_range

    def x(self, value: float) -> float:
        """Pixel column of a value."""
        low, high, _ = self.x_range
        return LEFT + (value - low) / (high - low) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Pixel row of a value."""
        low, high, _ = self.y_range
        return HEIGHT - BOTTOM - (value - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    def axes(
        self, x_label: str, y_label: str, *, x_ticks: bool = True, percent: bool = False
    ) -> None:
        """Grid lines, tick numbers and axis names."""
        for tick in ticks(*self.y_range):
            self.line(LEFT, self.y(tick), WIDTH - RIGHT, self.y(tick), "grid")
            label = f"{tick:.0%}" if percent else f"{tick:g}"
            self.text(LEFT - 6, self.y(tick) + 3.5, label, anchor="end", style="tick")
        for tick in ticks(*self.x_range) if x_ticks else []:
            self.text(
                self.x(tick), HEIGHT - BOTTOM + 15, f"{tick:g}", anchor="middle", style="tick"
            )
        self.text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 8, x_label, anchor="middle", style="label")
        middle = (TOP + HEIGHT - BOTTOM) / 2
        attributes: dict[str, str | float] = {"text-anchor": "middle", "class": "label"}
        label = self.add("text", transform=f"translate(12 {middle:g}) rotate(-90)", **attributes)
        label.text = y_label

    def whisker(self, x: float, interval: Interval, colour: int) -> None:
        """A dot at the mean with a line from low to high."""
        style = f"c{colour % NUM_COLOURS}"
        self.line(x, self.y(interval.low), x, self.y(interval.high), f"whisker {style}")
        for end in (interval.low, interval.high):
            self.line(x - 4, self.y(end), x + 4, self.y(end), f"whisker {style}")
        dot = self.add("circle", cx=x, cy=self.y(interval.mean), r=4.0, **{"class": f"dot {style}"})
        ElementTree.SubElement(
            dot, "title"
        ).text = f"{interval.mean:.1%} ({interval.low:.1%} to {interval.high:.1%})"

    def legend(self, names: Sequence[str], *, y: float = HEIGHT + 10, left: float = LEFT) -> None:
        """Name the colours below the plot."""
        super().legend(names, y=y, left=left)
