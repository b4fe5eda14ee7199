"""A benchmark's promises: a missed goal and a worse figure both fail."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from benchmarks.harness import Figure, Report, run_benchmark


@pytest.mark.parametrize(
    ("value", "goal", "better", "met"),
    [
        (0.99, 0.99, "higher", True),
        (0.98, 0.99, "higher", False),
        (3.0, 4.0, "lower", True),
        (5.0, 4.0, "lower", False),
        (math.nan, 0.0, "higher", False),
        (math.nan, 0.0, "lower", False),
        (-1.0, None, "higher", True),
    ],
)
def test_a_goal_is_met_or_missed(value: float, goal: float | None, better: str, met: bool):
    assert Figure("x", value, goal=goal, better=better).is_met is met  # pyright: ignore[reportArgumentType]


def test_near_is_one_sided():
    figure = Figure("x", 0.90, tolerance=0.05)
    assert figure.is_near(0.94) and figure.is_near(0.1) and not figure.is_near(0.96)
    slow = Figure("x", 10.0, better="lower", tolerance=1.0)
    assert slow.is_near(9.5) and slow.is_near(99.0) and not slow.is_near(8.0)
    assert Figure("x", 0.0).is_near(1.0), "without a tolerance nothing is compared"


def run(tmp_path: Path, value: float, *flags: str) -> int:
    figure = Figure("speed", value, "1/s", goal=1.0, tolerance=0.5)
    return run_benchmark(
        "toy", lambda quick: Report([figure], {"quick": quick}), seeds=[1, 2],
        argv=list(flags), results=tmp_path,
    )  # fmt: skip


def test_a_full_run_writes_figures_and_facts(tmp_path: Path):
    assert run(tmp_path, 5.0) == 0
    document = json.loads((tmp_path / "toy.json").read_text())
    entry = {"value": 5.0, "unit": "1/s", "goal": 1.0, "better": "higher", "met": True}
    assert document["figures"] == {"speed": entry}
    assert document["met"] is True and document["seeds"] == [1, 2]
    assert len(document["commit"].rstrip("+")) == 40 and document["machine"]["cpus"]
    assert document["details"] == {"quick": False}


def test_a_missed_goal_fails_and_is_written(tmp_path: Path):
    assert run(tmp_path, 0.5) == 1
    assert json.loads((tmp_path / "toy.json").read_text())["met"] is False


def test_a_quick_run_compares_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(tmp_path, 3.0, "--quick") == 0, "nothing committed yet"
    assert not (tmp_path / "toy.json").exists()
    run(tmp_path, 5.0)
    before = (tmp_path / "toy.json").read_bytes()
    assert run(tmp_path, 4.6, "--quick") == 0
    assert run(tmp_path, 4.4, "--quick") == 1
    assert "committed 5, tolerance 0.5: WORSE" in capsys.readouterr().out
    assert (tmp_path / "toy.json").read_bytes() == before


def test_a_quick_run_that_misses_as_the_committed_one_did_only_tells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert run(tmp_path, 0.8) == 1, "the full run fails"
    assert run(tmp_path, 0.9, "--quick") == 0
    assert "MISSED, as in the committed run (0.8)" in capsys.readouterr().out
    assert run(tmp_path, 0.2, "--quick") == 1, "worse than it was"
    run(tmp_path, 1.2)
    assert run(tmp_path, 0.9, "--quick") == 1, "near the committed figure, but that met the goal"


def test_every_benchmark_is_one_of_make_bench():
    root = Path(__file__).parents[1]
    makefile = (root / "Makefile").read_text()
    modules = [file for file in (root / "benchmarks").glob("*.py") if file.stem != "harness"]
    ours = [file.stem for file in modules if "run_benchmark(" in file.read_text()]
    assert len(ours) > 25
    assert not [name for name in ours if f"-m benchmarks.{name}\n" not in makefile]
