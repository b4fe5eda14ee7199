"""An SVG under construction: text, lines and marks in pixels, and axes with round ticks.

Text and numbers go through ElementTree, so data cannot open a tag. Colours are the page's CSS
classes `c0`…`c5`. Coordinates are pixels of a fixed viewBox; the page scales it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.etree import ElementTree

WIDTH, HEIGHT = 560, 250
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 40
NUM_COLOURS = 6


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate with its uncertainty.

    Example:
        Interval(mean=0.53, low=0.49, high=0.57)
    """

    mean: float
    low: float
    high: float


class Canvas:
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


class Plot(Canvas):
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
