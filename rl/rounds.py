"""What the curriculum knew, round by round: one parquet file per `round_every` versions.

    version 0, 10, 20, … published ──▶ curriculum/round_000010.parquet ──▶ curation/inspect.py

A file's number is the version from whose evidence it was made: draws of that version follow from
it. It has one row per stratum, so it costs as much as what was observed, however large the pool.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from curation.curriculum import Curriculum
from ground.disk import disk_errors, fsync_directory
from ground.storage import replace_file

SCHEMA = pa.schema(
    [
        pa.field("capability", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string()),
        pa.field("prompts", pa.int64(), nullable=False),
        pa.field("successes", pa.float64(), nullable=False),
        pa.field("trials", pa.float64(), nullable=False),
        pa.field("mean", pa.float64(), nullable=False),
        pa.field("deviation", pa.float64(), nullable=False),
        pa.field("status", pa.string(), nullable=False),
        pa.field("share", pa.float64(), nullable=False),
        pa.field("aim", pa.float64()),
    ]
)
"""The fields of `curation.known.Known`, and the pass rate that the version's draws aim at."""


class Rounds:
    """The folder of a run's rounds.

    Example:
        rounds.keep(curriculum)         # writes at versions 0, 10, 20, …, else does nothing
        rounds.forget_after(12)         # those versions are going to be made again
    """

    def __init__(self, directory: Path, every: int) -> None:
        self._directory, self._every = directory, every

    def keep(self, curriculum: Curriculum) -> None:
        """Write the round of the curriculum's version, if one is due.

        Raises:
            SetupError: the disk is full or not writable; no half file is left.
        """
        if curriculum.version % self._every:
            return
        rows = [asdict(known) | {"aim": curriculum.aim} for known in curriculum.known()]
        path = self._directory / f"round_{curriculum.version:06d}.parquet"
        with disk_errors(path):
            self._directory.mkdir(parents=True, exist_ok=True)
        table = pa.Table.from_pylist(rows, schema=SCHEMA)
        with replace_file(path) as staging:
            pq.write_table(table, staging, compression="zstd", version="2.6")

    def forget_after(self, version: int) -> None:
        """Remove the rounds of later versions."""
        doomed = [path for number, path in self._files() if number > version]
        with disk_errors(self._directory):
            for path in doomed:
                os.unlink(path)
            if doomed:
                fsync_directory(self._directory)

    def _files(self) -> Iterator[tuple[int, Path]]:
        for path in sorted(self._directory.glob(f"round_{'[0-9]' * 6}.parquet")):
            yield int(path.stem.removeprefix("round_")), path
