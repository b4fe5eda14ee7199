"""Whether judges agree, by hand."""

from __future__ import annotations

from pathlib import Path

import pytest

from curation import inspect
from curation.calibration import (
    SCHEMA,
    agreements,
    calibration_rows,
    chosen,
    interval,
    rank_correlation,
)
from curation.judge import Judgement
from ground.records import Demonstration, Message
from ground.tables import write_rows
from packtrain.curation_figures import agreement


def row(number: int) -> Demonstration:
    messages = (Message("user", f"{number}?"), Message("assistant", "!"))
    return Demonstration(f"row{number}", messages, "sums" if number < 8 else "words")


def test_rank_correlation_by_hand():
    """1 - 6 · (1 + 1 + 0) / (3 · 8) = 0.5; ties take their mean rank; a constant has no order."""
    assert rank_correlation([(1, 2), (2, 1), (3, 3)]) == pytest.approx(0.5)
    assert rank_correlation([(n, n**3) for n in range(9)]) == pytest.approx(1.0)
    assert rank_correlation([(n, -n) for n in range(9)]) == pytest.approx(-1.0)
    ties = [
        (0, 0),
        (0, 1),
        (1, 1),
        (1, 2),
    ]  # ranks .5 .5 2.5 2.5 and 0 1.5 1.5 3: 3 / sqrt(4 · 4.5)
    assert rank_correlation(ties) == pytest.approx(3 / 18**0.5)
    assert rank_correlation([(1, 0), (1, 1)]) is None


def test_agreement_per_capability_counts_only_what_both_have_judged():
    """Sums in the same order, words in the opposite one; of sums one is unjudged, of eight."""
    label: list[float | None] = [n / 16 for n in range(16)]
    other = [*label[:8], *label[:7:-1]]
    label[3] = None
    found = agreements(["sums"] * 8 + ["words"] * 8, {"label": label, "ifd": other})
    assert [(each.capability, each.rows) for each in found] == [
        ("all", 15),
        ("sums", 7),
        ("words", 8),
    ]
    assert found[1].correlation is None, "seven rows say nothing"
    assert found[2].correlation == pytest.approx(-1.0) and (found[2].high or 0) < -0.9


def test_the_interval_by_hand():
    """tanh(0.5493 ± 1.96 / 5); a perfect order has an interval too."""
    assert interval(0.5, 28) == pytest.approx((0.1558, 0.7355), abs=1e-3)
    assert interval(1.0, 28)[0] > 0.99


def test_the_rows_are_chosen_by_lot_and_not_by_place():
    rows = [row(n) for n in range(50)]
    own = chosen(rows, 10)
    assert len(own) == 10 and own == sorted(own) and own != list(range(10))
    back = chosen(rows[::-1], 10)
    assert {rows[i].id for i in own} == {rows[::-1][i].id for i in back}
    assert chosen(rows[:4], 10) == [0, 1, 2, 3]


def test_what_is_written_is_read_by_frames_and_by_the_report(tmp_path: Path):
    rows = [row(n) for n in range(16)]
    said = {
        "label": [Judgement(n / 16, "easy", {"label_mass": 1.0}) for n in range(16)],
        "ifd": [Judgement(1 - n / 16) if n else Judgement(reason="long") for n in range(16)],
    }
    folder = tmp_path / "prune"
    write_rows(folder / "calibration.parquet", calibration_rows(rows, said), SCHEMA)
    frame = inspect.calibration(tmp_path)
    assert len(frame) == 32 and frame["score"].notna().tolist().count(False) == 1
    table = inspect.agreement(frame)
    assert table["capability"].tolist() == ["all", "sums", "words"]
    assert table["rows"].tolist() == [15, 7, 8]
    assert table["correlation"].iloc[0] == pytest.approx(-1.0)
    report = {(each.capability, each.rows): each.correlation for each in agreement(tmp_path)}
    assert report["all", 15] == pytest.approx(-1.0) and report["sums", 7] is None
    empty = inspect.calibration(tmp_path / "nothing")
    assert len(empty) == 0 and len(inspect.agreement(empty)) == 0
    assert agreement(tmp_path / "nothing") == []
