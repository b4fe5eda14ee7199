"""Numbers over time: one JSON line per record in `metrics.jsonl`, and copies to optional trackers.

    {"step": 20, "time": 1763719976.1, "loss": 1.93, "grad_norm": 0.7}

The file is the truth: a line is written with one system call, a line that a crash has cut is
dropped when the file is opened again, and a number that is not finite becomes null with its name
under `nonfinite`. A tracker that is slow or down costs training nothing: each has its own thread
and a bounded queue; what does not fit is counted and reported once.
"""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

from ground.errors import DataError, SetupError
from ground.logs import redact_tree
from ground.sinks import Sink
from ground.storage import write_file

Record = dict[str, object]

logger = logging.getLogger(__name__)


class Metrics:
    """Append-only log of a stage's numbers: `open → log … log → close`."""

    def __init__(self, path: Path, sinks: Sequence[Sink] = ()) -> None:
        self.path = path
        self._sinks = list(sinks)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = _opened(path)
        _cut_torn_line(self._file)

    def log(self, step: int, numbers: Mapping[str, float], **tags: str) -> None:
        """Append a record; every number of one moment belongs into one call.

        Args:
            numbers: finite or not; anything that `float` takes.
            tags: texts that tell records apart, e.g. phase="evaluate".
        """
        values = {name: _plain(value) for name, value in numbers.items()}
        record: Record = {"step": step, "time": round(time.time(), 3), **_clean(tags), **values}
        nonfinite = sorted(name for name, value in values.items() if value is None)
        if nonfinite:
            record["nonfinite"] = nonfinite
        self._append(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        finite = {name: value for name, value in values.items() if value is not None}
        for sink in self._sinks:
            sink.put(step, finite)

    def rewind(self, step: int) -> None:
        """Forget the records of later steps: a resumed run does that work again."""
        lines = self.path.read_bytes().splitlines(keepends=True)
        steps = [_parsed(self.path, n, line)["step"] for n, line in enumerate(lines, start=1)]
        kept = [line for line, own in zip(lines, steps, strict=True) if int(str(own)) <= step]
        if len(kept) < len(lines):
            write_file(self.path, b"".join(kept))  # in one step: a kill must not cost the curves
            os.close(self._file)
            self._file = _opened(self.path)

    def close(self) -> None:
        """Close the file and give the trackers a few seconds to finish."""
        for sink in self._sinks:
            sink.close()
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _append(self, line: str) -> None:
        payload = line.encode()
        try:
            written = os.write(self._file, payload)
        except OSError as error:
            raise _unwritable(self.path, str(error)) from error
        if written != len(payload):
            _cut_torn_line(self._file)
            raise _unwritable(self.path, "the disk is full")


def read_metrics(path: Path) -> list[Record]:
    """All records in the order of steps; [] where there is no file yet.

    A last line without its end is left out. When a resumed run logs a step again, everything that
    the earlier attempt logged from that step on (under the same tags) is left out too.

    Raises:
        DataError: a line in the middle is not a record.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]
    records: list[Record] = []
    latest: dict[tuple[str, ...], int] = {}
    for number, line in enumerate(lines, start=1):
        record = _parsed(path, number, line)
        step, kind = int(str(record["step"])), _kind(record)
        if step < latest.get(kind, step):
            records = [r for r in records if _kind(r) != kind or int(str(r["step"])) < step]
        latest[kind] = step
        records.append(record)
    return records


def _opened(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)


def _kind(record: Record) -> tuple[str, ...]:
    """The tags of a record, which tell its series from others."""
    return tuple(f"{key}={value}" for key, value in record.items() if isinstance(value, str))


def _parsed(path: Path, number: int, line: bytes) -> Record:
    try:
        record = json.loads(line)
        int(record["step"])
        return record
    except (ValueError, TypeError, KeyError) as error:
        raise DataError(
            "a metrics line must be a JSON mapping with a step",
            where=f"{path}:{number}",
            why=str(error),
            fix="remove the line; only the curves lose a point",
        ) from error


def _clean(tags: Mapping[str, str]) -> dict[str, object]:
    cleaned = redact_tree(dict(tags))
    return cleaned if isinstance(cleaned, dict) else {}


def _plain(value: float) -> float | None:
    number = float(value)
    if not math.isfinite(number):
        return None
    return int(number) if isinstance(value, int) else number


def _cut_torn_line(file: int) -> None:
    """Shorten the file to its last complete line."""
    size = os.fstat(file).st_size
    position = size
    while position > 0:
        start = max(0, position - 4096)
        found = os.pread(file, position - start, start).rfind(b"\n")
        if found >= 0:
            position = start + found + 1
            break
        position = start
    if position < size:
        os.ftruncate(file, position)


def _unwritable(path: Path, why: str) -> SetupError:
    return SetupError(
        "metrics cannot be written", where=str(path), why=why, fix="free disk space and --resume"
    )
