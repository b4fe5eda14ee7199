"""What every benchmark shares: figures with goals, facts about the run, and a quick re-check.

    python -m benchmarks.gsm8k_verdicts            measure, write benchmarks/results/<name>.json
    python -m benchmarks.gsm8k_verdicts --quick    measure a part, compare with the committed file

A benchmark is a function from `quick` to a `Report`. It fails (exit 1) when a goal is missed, or,
with --quick, when a figure is further from the committed one than its tolerance; a goal that the
committed run has missed too fails only the full run.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Literal

import psutil

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
_LIBRARIES = ("torch", "transformers", "trl", "ray", "math-verify", "reasoning-gym")


@dataclass(frozen=True, slots=True)
class Figure:
    """A number that was measured, and what it should be.

    Example:
        Figure("agreement", 0.998, goal=0.99, better="higher", tolerance=0.005)
    """

    name: str
    value: float
    unit: str = ""
    goal: float | None = None
    """None for what is reported without a promise."""
    better: Literal["higher", "lower"] = "higher"
    tolerance: float | None = None
    """How far, in its own unit, a quick run may be from the committed figure on its worse side.
    None leaves it out of the comparison: a part of the data says nothing about it."""

    @property
    def is_met(self) -> bool:
        """Whether the goal is reached; a NaN reaches none."""
        if self.goal is None:
            return True
        return self.value >= self.goal if self.better == "higher" else self.value <= self.goal

    def is_near(self, committed: float) -> bool:
        """Whether it is no worse than the committed figure by more than the tolerance."""
        if self.tolerance is None:
            return True
        worse = committed - self.value if self.better == "higher" else self.value - committed
        return worse <= self.tolerance and not math.isnan(self.value)


@dataclass(frozen=True, slots=True)
class Report:
    """What a benchmark found.

    Example:
        Report([Figure("agreement", 1.0, goal=0.99)], {"disputes": []})
    """

    figures: Sequence[Figure]
    details: Mapping[str, object] = field(default_factory=dict)
    """Whatever explains the figures; plain JSON."""


def run_benchmark(
    name: str,
    measure: Callable[[bool], Report],
    *,
    seeds: Sequence[int] = (),
    argv: Sequence[str] | None = None,
    results: Path = RESULTS,
) -> int:
    """Measure, print, and write or compare; returns the exit code."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", allow_abbrev=False)
    parser.add_argument("--quick", action="store_true", help="a part only; compare, write nothing")
    quick = bool(parser.parse_args(argv).quick)
    start = time.monotonic()
    report = measure(quick)
    seconds = time.monotonic() - start
    path = results / f"{name}.json"
    committed = _committed(path) if quick else {}
    failures = 0
    for figure in report.figures:
        verdict, failed = _verdict(figure, committed)
        failures += failed
        _tell(f"{figure.name:<40} {figure.value:>12.6g} {figure.unit:<10} {verdict}")
    if not quick:
        document = {
            "name": name,
            "figures": {figure.name: _entry(figure) for figure in report.figures},
            "met": not failures,
            "seeds": list(seeds),
            "seconds": round(seconds, 1),
            **facts(),
            "details": report.details,
        }
        results.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
        _tell(f"written: {path}")
    return 1 if failures else 0


def facts() -> dict[str, object]:
    """When, from which commit and on what machine."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD") + "+" * bool(_git("status", "--porcelain", "-uno")),
        "machine": {
            "platform": platform.platform(),
            "python": platform.python_version(),
            "cpus": os.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        },
        "libraries": {name: version for name in _LIBRARIES if (version := _version(name))},
    }


def _entry(figure: Figure) -> dict[str, object]:
    return {
        "value": figure.value,
        "unit": figure.unit,
        "goal": figure.goal,
        "better": figure.better,
        "met": figure.is_met,
    }


def _committed(path: Path) -> dict[str, float]:
    if not path.is_file():
        return {}
    figures = json.loads(path.read_text())["figures"]
    return {name: float(entry["value"]) for name, entry in figures.items()}


def _verdict(figure: Figure, committed: Mapping[str, float]) -> tuple[str, bool]:
    """What is said of a figure, and whether it fails: a goal missed, or worse than committed.

    A goal that the committed run has missed as well fails only that one: what a quick run can tell
    is that nothing got worse.
    """
    sign = ">=" if figure.better == "higher" else "<="
    goal = "" if figure.goal is None else f"goal {sign} {figure.goal:g}"
    before = committed.get(figure.name)
    if before is not None and not figure.is_near(before):
        return f"{goal} committed {before:g}, tolerance {figure.tolerance:g}: WORSE", True
    if figure.is_met:
        return goal and f"{goal}: met", False
    if (
        before is not None
        and figure.tolerance is not None
        and not replace(figure, value=before).is_met
    ):
        return f"{goal}: MISSED, as in the committed run ({before:g})", False
    return f"{goal}: MISSED", True


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    return done.stdout.strip()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _tell(line: str) -> None:
    sys.stdout.write(line + "\n")
