"""Charts: scales that hold the data, marks where the numbers say, no tags from data."""

from __future__ import annotations

from xml.etree import ElementTree

import pytest

from packtrain import canvas, charts
from packtrain.canvas import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Interval
from packtrain.charts import Bar, Series, Span


def test_nice_ranges_hold_the_data_with_round_steps() -> None:
    assert canvas.nice_range(0.13, 0.87) == pytest.approx((0.0, 1.0, 0.2))
    assert canvas.nice_range(3, 98) == pytest.approx((0, 100, 20))
    assert canvas.nice_range(1, 60, tight=True) == (1, 60, 20)
    assert canvas.ticks(1, 60, 20) == [20, 40, 60]


def test_a_constant_series_has_a_range_around_it() -> None:
    low, high, step = canvas.nice_range(2.0, 2.0)
    assert low < 2.0 < high and step > 0


def test_a_line_stands_where_its_numbers_say() -> None:
    root = ElementTree.fromstring(
        charts.line_chart([Series("a", ((0, 0.0), (10, 1.0)))], x_label="step", y_label="share")
    )
    line = next(element for element in root if element.tag == "polyline")
    first, last = line.attrib["points"].split()
    assert first == f"{LEFT:.1f},{HEIGHT - BOTTOM:.1f}"
    assert last == f"{WIDTH - RIGHT:.1f},{TOP:.1f}"


def test_long_series_are_thinned_by_their_means_and_lose_what_is_not_finite() -> None:
    points = [(float(i), float(i % 2)) for i in range(6000)] + [(6000.0, float("nan"))]
    thinned = charts.thin(points)
    assert len(thinned) == charts.SEGMENT_LIMIT
    assert thinned[0] == (4.5, 0.5)


def test_whiskers_reach_from_low_to_high() -> None:
    svg = charts.interval_chart(["base"], [("pass@1", [Interval(0.5, 0.25, 0.75)])], y_label="p")
    lines = [e for e in ElementTree.fromstring(svg) if "whisker" in e.attrib.get("class", "")]
    span = HEIGHT - BOTTOM - TOP
    stem = lines[0].attrib
    assert float(stem["y1"]) - float(stem["y2"]) == pytest.approx(span / 2, abs=0.2)


def test_bars_are_as_long_as_their_share_of_the_longest() -> None:
    bars = [Bar("drawn", (("drawn", 400.0),)), Bar("flat", (("zero", 40.0), ("one", 60.0)))]
    rows = [e for e in ElementTree.fromstring(charts.bar_chart(bars, title="t")) if e.tag == "rect"]
    widths = [float(e.attrib["width"]) for e in rows[:3]]
    assert widths[1] == pytest.approx(widths[0] * 0.1, abs=0.1)
    assert widths[2] == pytest.approx(widths[0] * 0.15, abs=0.1)


def test_a_histogram_counts_the_ends_into_its_outer_bins() -> None:
    assert charts._counts([0.0, 0.04, 1.0, 0.5], 2) == [2, 2]


def test_nothing_to_draw_gives_no_chart() -> None:
    assert charts.line_chart([Series("a", ())], x_label="x", y_label="y") == ""
    assert charts.bar_chart([], title="t") == ""
    assert charts.timeline([], title="t") == ""
    assert charts.histogram([("kept", [])], title="t", x_label="x") == ""


@pytest.mark.parametrize("payload", ["</svg><script>alert(1)</script>", '"><img src=x onerror=y>'])
def test_data_cannot_open_a_tag(payload: str) -> None:
    drawn = [
        charts.line_chart([Series(payload, ((1, 1), (2, 2)))] * 2, x_label="x", y_label=payload),
        charts.bar_chart([Bar(payload, ((payload, 1.0), ("b", 2.0)))], title=payload),
        charts.timeline([Span(payload, payload, 0, 1)], title=payload),
        charts.interval_chart([payload], [(payload, [Interval(0.5, 0.4, 0.6)])], y_label=payload),
    ]
    for svg in drawn:
        assert {e.tag for e in ElementTree.fromstring(svg).iter()} <= {
            *("svg", "title", "line", "rect", "text", "circle", "polyline")
        }
