"""Does a fault test ever fail without a cause? Each has to pass 30 times in a row.

    python -m benchmarks.repeats            until every test has its streak, or two hours are over
    python -m benchmarks.repeats --quick    one round of those that need no real run

A round is one pytest process over the files below. Those without a run of the `rl` stage take two
minutes and come first; of the rest, with real learners, controllers and supervisors, a round takes
a quarter of an hour. A streak is the number of passes since the last failure, so that a flake costs
all that a test had. Streaks are carried on from the committed file: Ctrl-C ends the round that is
under way, and what was counted is kept.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from benchmarks.harness import RESULTS, ROOT, Figure, Report, run_benchmark

GOAL = 30
BUDGET_SECONDS = 2 * 3600.0
NAME = "repeats"
LIGHT = (
    "test_rollout_faults",
    "test_rollout_failures",
    "test_rollout_fleet",
    "test_rollout_fleet_nodes",
    "test_rollout_fleet_machine",
    "test_rollout_reward_pool",
    "test_rl_edges",
    "test_rl_leftovers",
    "test_rl_pressure",
    "test_rl_supervisor",
)
"""Real processes, but no run of the stage; only what `make test` runs of them."""
HEAVY = ("test_rl_processes", "test_rl_disk", "test_rollout_handover", "test_rollout_faults")
"""Real runs; only what `make test-slow` runs of them."""

Streaks = dict[str, int]
"""Passes since the last failure, by test."""


def measure(quick: bool) -> Report:
    """Play rounds, light ones first; figures are the shortest streaks."""
    light, heavy = ({}, {}) if quick else (_committed("light"), _committed("heavy"))
    flakes: list[str] = []
    ends_at = time.monotonic() + BUDGET_SECONDS
    try:
        while True:
            is_light = quick or _shortest(light) < GOAL
            files, streaks = (LIGHT, light) if is_light else (HEAVY, heavy)
            flakes += count(_round(files, slow=not is_light), streaks)
            _tell(light, heavy, flakes)
            if quick or time.monotonic() > ends_at:
                break
            if min(_shortest(light), _shortest(heavy)) >= GOAL:
                break
    except KeyboardInterrupt:
        pass
    goal = 1 if quick else GOAL
    figures = [
        Figure("light tests", len(light), "tests"),
        Figure("light, shortest streak", _shortest(light), "passes", goal=goal),
        Figure("flakes in this run", len(flakes), "", goal=0, better="lower"),
    ]
    if not quick:
        figures += [
            Figure("heavy tests", len(heavy), "tests"),
            Figure("heavy, shortest streak", _shortest(heavy), "passes", goal=goal),
        ]
    return Report(figures, {"flakes": flakes, "light": light, "heavy": heavy})


def count(outcomes: Mapping[str, bool], streaks: Streaks) -> list[str]:
    """Add a round to the streaks; returns what failed in it.

    Example:
        count({"a": True, "b": False}, streaks := {"a": 3, "b": 7})  # ["b"]
        streaks  # {"a": 4, "b": 0}
    """
    for test, passed in outcomes.items():
        streaks[test] = streaks.get(test, 0) + 1 if passed else 0
    return [test for test, passed in outcomes.items() if not passed]


def read_outcomes(report: Path) -> dict[str, bool]:
    """Of each test in a JUnit report, whether it passed; those that were skipped are left out."""
    outcomes = {}
    for case in ElementTree.parse(report).iter("testcase"):
        if case.find("skipped") is None:
            name = f"{case.get('classname')}::{case.get('name')}"
            is_broken = case.find("failure") is not None or case.find("error") is not None
            outcomes[name] = outcomes.get(name, True) and not is_broken
    return outcomes


def _round(files: Sequence[str], *, slow: bool) -> dict[str, bool]:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        line = [sys.executable, "-m", "pytest", f"--junitxml={report}", "-p", "no:cacheprovider"]
        line += ["-m", "slow" if slow else "not slow"]
        line += [str(ROOT / "tests" / f"{name}.py") for name in files]
        output = Path(folder) / "output"
        with output.open("wb") as file:
            done = subprocess.run(line, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        if done.returncode:
            sys.stdout.write(output.read_text(errors="replace")[-20_000:])
        return read_outcomes(report)


def _committed(part: str) -> Streaks:
    path = RESULTS / f"{NAME}.json"
    return dict(json.loads(path.read_text())["details"][part]) if path.is_file() else {}


def _shortest(streaks: Streaks) -> int:
    return min(streaks.values(), default=0)


def _tell(light: Streaks, heavy: Streaks, flakes: Sequence[str]) -> None:
    now = time.strftime("%H:%M:%S")
    shortest = f"light {_shortest(light)}, heavy {_shortest(heavy)}"
    sys.stdout.write(f"{now} shortest streaks: {shortest}; flakes: {', '.join(flakes) or 'none'}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(run_benchmark(NAME, measure))
