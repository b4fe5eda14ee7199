"""An append-only JSON-lines file that survives kills and can be cut back to an earlier position.

    opened (a torn line is cut) → append … append → sync → rewind(position) → closed

A line is torn when its writer was killed or the disk was full in the middle of it. Whoever writes
next, in this process or another one, cuts it first, so two records never run into one line.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from ground.disk import disk_errors
from ground.errors import DataError

_BLOCK = 4096
_written = json.JSONEncoder(ensure_ascii=False).encode


class Journal:
    """One JSON object a line, written by one system call under the file's lock.

    Args:
        buffered: lines may wait in memory until the next `sync`; for a file that is cut back to its
            last sync after a kill anyway.

    Example:
        journal.append({"kind": "restart"}); position = journal.sync(); …; journal.rewind(position)

    Raises:
        SetupError: (every method) the disk is full or not writable; no half line is left.
    """

    def __init__(self, path: Path, *, buffered: bool = False) -> None:
        self._path, self._is_buffered = path, buffered
        self._lines: list[bytes] = []
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        with self._alone():
            _cut_torn_line(self._file)

    def append(self, record: Mapping[str, object]) -> None:
        """Add one line."""
        self._lines.append(_written(record).encode() + b"\n")
        if not self._is_buffered:
            self.flush()

    def flush(self) -> None:
        """Write what waits, so that others can read it."""
        waiting, self._lines = b"".join(self._lines), []
        if not waiting:
            return
        with self._alone():
            _cut_torn_line(self._file)
            written = os.write(self._file, waiting)
            if written < len(waiting):
                _cut_torn_line(self._file)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> int:
        """Bring all lines to the disk and return the position behind the last."""
        self.flush()
        with disk_errors(self._path):
            os.fsync(self._file)
            return os.fstat(self._file).st_size

    def rewind(self, position: int) -> None:
        """Forget what was appended after a position: it belongs to work that is done again.

        Raises:
            DataError: the file is shorter than that, so lines were lost that had been synced.
        """
        self._lines = []
        with self._alone():
            size = os.fstat(self._file).st_size
            if size < position:
                raise DataError(
                    f"the file must have at least {position} bytes, it has {size}",
                    where=str(self._path),
                    fix="restore it from a backup, or start the stage again (--from rl)",
                )
            os.ftruncate(self._file, position)

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        os.close(self._file)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Hold the file's lock, which other processes that append to it take as well."""
        with disk_errors(self._path):
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)


def read_journal(path: Path) -> Iterator[dict[str, object]]:
    """Yield the records of a journal; a last line that a kill cut short is left out."""
    for line in path.read_bytes().split(b"\n")[:-1]:
        yield json.loads(line)


def _cut_torn_line(file: int) -> None:
    """Shorten the file to its last whole line; costs two calls when there is nothing to cut."""
    size = end = os.fstat(file).st_size
    if size == 0 or os.pread(file, 1, size - 1) == b"\n":
        return
    while end > 0:
        start = max(0, end - _BLOCK)
        found = os.pread(file, end - start, start).rfind(b"\n")
        end = start + found + 1 if found >= 0 else start
        if found >= 0:
            break
    os.ftruncate(file, end)
