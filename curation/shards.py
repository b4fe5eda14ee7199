"""Long work in shards: what an interrupted run has committed is not done again.

    shards of items → done, committed one by one ─▶ results in the order of the items

A shard on disk counts if it is whole, was made by the same (`made_by`) and of the same items.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from ground.errors import DataError
from ground.storage import commit_directory, verify_directory

logger = logging.getLogger("packtrain")

Item = TypeVar("Item")
Result = TypeVar("Result")

_FILE = "outcomes.json"


@dataclass(frozen=True, slots=True)
class Done(Generic[Item, Result]):
    """One shard and what came of it.

    Example:
        Done(rows, judgements, seconds=2.5) of a shard of 512;  seconds 0 if it lay on disk
    """

    items: Sequence[Item]
    results: Sequence[Result]
    seconds: float
    """That the work took just now."""


@dataclass(frozen=True, slots=True)
class Shards(Generic[Item, Result]):
    """How results of some work lie on disk.

    Example:
        Shards(stage.directory / "shards", "mine:sft@3f9a01bc", key=lambda prompt: prompt.id,
               freeze=lambda mined: [mined.successes, mined.trials], thaw=...)
    """

    folder: Path
    made_by: str
    """What a result depends on besides its item: the model. A stage that goes on has the settings
    that it began with (ground/run.py)."""
    key: Callable[[Item], str]
    freeze: Callable[[Result], list[Any]]
    """A result as JSON."""
    thaw: Callable[[Item, list[Any]], Result]

    def each(
        self, shards: Iterable[Sequence[Item]], work: Callable[[Sequence[Item]], Sequence[Result]]
    ) -> Iterator[Done[Item, Result]]:
        """Do, or read, one shard after another."""
        for number, items in enumerate(shards):
            place = self.folder / f"{number:08d}"
            results = self._read(place, items)
            started = time.monotonic()
            if results is None:
                results = work(items)
                seconds = time.monotonic() - started
                self._write(place, items, results)
                yield Done(items, results, seconds)
            else:
                yield Done(items, results, 0.0)

    def _write(self, place: Path, items: Sequence[Item], results: Sequence[Result]) -> None:
        outcomes = [
            [self.key(item), *self.freeze(result)]
            for item, result in zip(items, results, strict=True)
        ]
        with commit_directory(place, {"judged_by": self.made_by}) as staging:
            (staging / _FILE).write_text(json.dumps(outcomes))

    def _read(self, place: Path, items: Sequence[Item]) -> list[Result] | None:
        """What an earlier run found for exactly these items; None when it has to be done."""
        if not place.is_dir():
            return None
        try:
            facts = verify_directory(place).facts
        except DataError as error:
            logger.warning("a shard is done again: %s", error)
            return None
        outcomes = json.loads((place / _FILE).read_text())
        same = [outcome[0] for outcome in outcomes] == [self.key(item) for item in items]
        if facts.get("judged_by") != self.made_by or not same:
            return None
        return [self.thaw(item, frozen) for item, (_, *frozen) in zip(items, outcomes, strict=True)]
