"""A long benchmark that was broken off goes on with the outcomes it had."""

from __future__ import annotations

from pathlib import Path

from benchmarks.contest import Outcome
from benchmarks.exam import Mark
from benchmarks.kept import Kept


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    path = tmp_path / "x.kept.jsonl"
    outcome = Outcome(True, 31.5, 48.0, 5120, [Mark(5, 20.0, 0.5)], 0.7, {"ready": 14.2})
    runs: list[str] = []

    def run() -> Outcome:
        runs.append("once")
        return outcome

    first = Kept(path)
    assert first.take("a", run) == first.take("a", run) == outcome
    again = Kept(path)
    assert again.take("a", run) == outcome and again.commits == first.commits != set()
    assert runs == ["once"]
    again.take("b", run)
    again.clear()
    assert not path.exists() and runs == ["once", "once"]
    Kept(None).take("a", run)
    assert len(runs) == 3
