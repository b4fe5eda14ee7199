"""An append-only JSON-lines file that can be cut back to an earlier position."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path


class Journal:
    """One JSON object a line, flushed line by line, so that a kill costs at most the last line.

    Example:
        journal.append({"kind": "restart"}); position = journal.sync(); …; journal.rewind(position)
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab")

    def append(self, record: Mapping[str, object]) -> None:
        """Add one line."""
        self._file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
        self._file.flush()

    def sync(self) -> int:
        """Bring all lines to the disk and return the position behind the last."""
        os.fsync(self._file.fileno())
        return self._file.tell()

    def rewind(self, position: int) -> None:
        """Forget what was appended after a position: it belongs to work that is done again."""
        self._file.truncate(position)
        self._file.seek(position)

    def close(self) -> None:
        """Sync and close."""
        self.sync()
        self._file.close()


def read_journal(path: Path) -> Iterator[dict[str, object]]:
    """Yield the records of a journal; a last line that a kill cut short is left out."""
    for line in path.read_bytes().split(b"\n")[:-1]:
        yield json.loads(line)
