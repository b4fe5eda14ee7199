"""What each version scored on the validation slice, kept before anything follows from it."""

from __future__ import annotations

import json
from pathlib import Path

from ground.storage import write_file
from rl.journal import Journal, read_journal


class Scores:
    """The looks that were taken, by version, as lines of `validation.jsonl`.

    Example:
        scores.record(10, 0.61);  10 in scores → True;  scores.get(10) → 0.61
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._journal = Journal(path)
        self._known: dict[int, float | None] = {}
        for record in read_journal(path):
            rate = record["pass_rate"]
            self._known[int(str(record["version"]))] = None if rate is None else float(str(rate))

    def __contains__(self, version: int) -> bool:
        return version in self._known

    def get(self, version: int) -> float | None:
        """A version's pass rate; None when there was no look, or it lost a prompt."""
        return self._known.get(version)

    def record(self, version: int, score: float | None) -> None:
        """Write a look down; it is on the disk when this returns."""
        self._journal.append({"version": version, "pass_rate": score})
        self._journal.sync()
        self._known[version] = score

    def forget_after(self, version: int) -> None:
        """Leave out the looks at later versions, which are going to be made again."""
        kept = {each: score for each, score in self._known.items() if each <= version}
        if len(kept) == len(self._known):
            return
        lines = [json.dumps({"version": v, "pass_rate": s}) + "\n" for v, s in kept.items()]
        self._journal.close()
        write_file(self._path, "".join(lines))
        self._journal, self._known = Journal(self._path), kept
