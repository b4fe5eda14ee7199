"""Outcomes of a benchmark that takes hours, kept as they come, so that a broken-off one goes on.

    take(name, run) ─▶ there already? ─▶ the outcome of then
                              └─ no ──▶ run, append a line, flush

The file lies beside the results, git ignores it, and `clear` removes it when all is measured. Each
line names the commit it was measured at; `commits` goes into the result, for a reader to see.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from benchmarks.contest import Outcome
from benchmarks.exam import Mark
from benchmarks.harness import RESULTS, facts


class Kept:
    """Outcomes by name.

    Example:
        Kept.of("time_to_target").take("trl 0.8 1 0.0008", lambda: run_trl(…))
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._outcomes: dict[str, Outcome] = {}
        self.commits: set[str] = set()
        for line in path.read_text().splitlines() if path and path.is_file() else ():
            with suppress(json.JSONDecodeError):  # the last one, of a run that was killed
                self._add(json.loads(line))
        if self._outcomes:
            sys.stdout.write(f"{len(self._outcomes)} outcomes are those of {path}, measured at ")
            sys.stdout.write(f"{', '.join(sorted(self.commits))}\n")

    @staticmethod
    def of(benchmark: str) -> Kept:
        """Those of a full run of it that was broken off, if there was one."""
        return Kept(RESULTS / f"{benchmark}.kept.jsonl")

    def take(self, name: str, run: Callable[[], Outcome]) -> Outcome:
        """The outcome of that name; it is measured now if it was not before."""
        if name not in self._outcomes:
            record = {"name": name, "commit": facts()["commit"], "outcome": asdict(run())}
            if self._path:
                with self._path.open("a") as file:
                    file.write(json.dumps(record) + "\n")
            self._add(record)
        return self._outcomes[name]

    def clear(self) -> None:
        """Forget all of it, once the result is written."""
        if self._path:
            self._path.unlink(missing_ok=True)

    def _add(self, record: dict) -> None:
        told = record["outcome"]
        marks = [Mark(**mark) if isinstance(mark, dict) else Mark(*mark) for mark in told["marks"]]
        self._outcomes[record["name"]] = Outcome(**{**told, "marks": marks})
        self.commits.add(record["commit"])
