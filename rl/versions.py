"""What is known of each version of the weights, kept before anything follows from it.

rl/digests.jsonl      what its weights are, written before anybody samples with them
rl/validation.jsonl   what it scored on the validation slice, before weights are chosen by it
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Generic, TypeVar, cast

from ground.storage import write_file
from rl.journal import Journal, read_journal

Value = TypeVar("Value", str, "float | None")


class Versions(Generic[Value]):
    """One value per version, as lines of a file.

    Example:
        scores = Versions[float | None](folder / "validation.jsonl", "pass_rate")
        scores.record(10, 0.61);  10 in scores → True;  scores.get(10) → 0.61

    Args:
        key: what the value is called in the file.
    """

    def __init__(self, path: Path, key: str) -> None:
        self._path, self._key, self._journal = path, key, Journal(path)
        self._known = {
            int(str(record["version"])): cast(Value, record[key]) for record in read_journal(path)
        }

    def __contains__(self, version: int) -> bool:
        return version in self._known

    def get(self, version: int) -> Value | None:
        """A version's value; None when there is none."""
        return self._known.get(version)

    def record(self, version: int, value: Value) -> None:
        """Write a version's value down; it is on the disk when this returns."""
        self._journal.append(self._line(version, value))
        self._journal.sync()
        self._known[version] = value

    def forget_after(self, version: int) -> None:
        """Leave out later versions, which are going to be made again."""
        kept = {each: value for each, value in self._known.items() if each <= version}
        if len(kept) == len(self._known):
            return
        lines = [json.dumps(self._line(each, value)) + "\n" for each, value in kept.items()]
        self._journal.close()
        write_file(self._path, "".join(lines))
        self._journal, self._known = Journal(self._path), kept

    def _line(self, version: int, value: Value) -> dict[str, object]:
        return {"version": version, self._key: value}
