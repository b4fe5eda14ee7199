"""Tables of prompts and demonstrations: strict reading with file and line, exact writing.

read → parsed (bad rows counted, quarantined within the budget) → deduplicated → records
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Generic, TypeVar

import pyarrow as pa
import pyarrow.parquet as pq

from ground.config import Data
from ground.errors import DataError
from ground.jsonl import Line, RowError, read_lines
from ground.records import Demonstration, Prompt
from ground.rows import Row, demonstration_of, prompt_of, row_of
from ground.schema import row_misfits
from ground.storage import replace_file, write_file

R = TypeVar("R", bound=Prompt | Demonstration)

_LOG = logging.getLogger("packtrain")
_MAX_SHOWN = 20
"""Bad rows beyond the budget after which reading stops."""
_BATCH = 32_768
"""Rows that are written at a time, a row group of the file."""
_MAX_RAW = 64 * 1024
"""Bytes of a bad row that its quarantine keeps."""

ROW_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field(
            "messages",
            pa.list_(
                pa.field(
                    "element",
                    pa.struct(
                        [
                            pa.field("role", pa.string(), nullable=False),
                            pa.field("content", pa.string(), nullable=False),
                        ]
                    ),
                    nullable=False,
                )
            ),
            nullable=False,
        ),
        pa.field("capability", pa.string(), nullable=False),
        pa.field("reward", pa.string(), nullable=False),
        pa.field("answer", pa.string(), nullable=False),
        pa.field(
            "difficulty",
            pa.struct(
                [
                    pa.field("label", pa.string()),
                    pa.field("score", pa.float64()),
                    pa.field("judged_by", pa.string()),
                    pa.field("successes", pa.int64()),
                    pa.field("trials", pa.int64()),
                    pa.field("version", pa.int64()),
                ]
            ),
        ),
    ]
)
"""Columns of prompts and of demonstrations; append `meta_…` fields for what a stage adds."""


@dataclass(slots=True)
class Table(Generic[R]):
    """What became of the rows of a file.

    Example:
        10 rows, of which one is cut off and two are equal → 8 records, 1 bad row, 1 duplicate
    """

    path: Path
    records: list[R] = field(default_factory=list)
    num_duplicates: int = 0
    """Rows equal to an earlier one, left out."""
    bad: list[Line] = field(default_factory=list)
    """Rows that could not be read, with their errors."""


def read_prompts(path: Path, data: Data, quarantine: Path | None = None) -> list[Prompt]:
    """Read the prompts of a JSONL or parquet file (see ground/rows.py for the columns).

    Args:
        quarantine: folder for `<file name>.quarantine.jsonl`, which gets the unreadable rows when
            there are no more of them than `data.max_bad_rows`.

    Raises:
        DataError: names file, line and fault; or the file holds no rows.
    """
    return _settle(read_table(path, data, prompt_of), data, quarantine)


def read_demonstrations(
    path: Path, data: Data, quarantine: Path | None = None
) -> list[Demonstration]:
    """Read the demonstrations of a JSONL or parquet file; as `read_prompts` otherwise."""
    return _settle(read_table(path, data, demonstration_of), data, quarantine)


def read_table(path: Path, data: Data, parse: Callable[[Row, Data], R]) -> Table[R]:
    """Parse every row; equal rows once, an id with two contents is a bad row."""
    return tabulate(path, lines_of(path), data, parse)


def tabulate(
    path: Path, lines: Iterable[Line], data: Data, parse: Callable[[Row, Data], R]
) -> Table[R]:
    """The same of lines that were read from `path` in another way."""
    table: Table[R] = Table(path)
    seen: dict[str, tuple[R, int]] = {}
    for line in lines:
        if line.value is None:
            table.bad.append(line)
        else:
            _take(table, line, line.value, data, parse, seen)
        if len(table.bad) > data.max_bad_rows + _MAX_SHOWN:
            break
    return table


def lines_of(path: Path) -> Iterator[Line]:
    """The rows of a JSONL or parquet file as they stand, each with its number.

    Raises:
        DataError: the file as a whole is missing, damaged, or something else.
    """
    match path.suffix:
        case ".jsonl" | ".ndjson" | ".json":
            yield from read_lines(path)
        case ".parquet":
            yield from _parquet_rows(path)
        case other:
            raise DataError(
                f"a table is a .jsonl or .parquet file, got '{other or path.name}'",
                where=str(path),
                fix="unpack or convert it, or rename it if it is one of these",
            )


def read_rows(path: Path) -> list[dict[str, object]]:
    """All rows of a parquet or JSONL file as they stand; any unreadable one is a DataError."""
    rows: list[dict[str, object]] = []
    for line in lines_of(path):
        if line.value is None:
            raise DataError(line.error, where=_where(path, line.number))
        rows.append(line.value)
    return rows


def write_rows(path: Path, rows: Iterable[Mapping[str, object]], schema: pa.Schema) -> None:
    """Write a parquet file in one step; equal rows and schema give equal bytes.

    Rows are taken as they are written, so that a generator needs memory for a part of them only.

    Raises:
        DataError: a row has other columns than the schema, or a value of another type.
        SetupError: the disk is full or not writable; an older file is untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remaining = iter(rows)
    batches = iter(lambda: list(islice(remaining, _BATCH)), [])
    with (
        replace_file(path) as staging,
        pq.ParquetWriter(staging, schema, compression="zstd", version="2.6") as file,
    ):
        for number, batch in enumerate(chain([next(batches, [])], batches)):
            file.write_table(_columns(path, batch, schema, number * _BATCH))


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write JSON lines in one step; NaN and infinities are refused with a ValueError."""
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(lines))


def write_records(path: Path, records: Sequence[Prompt] | Sequence[Demonstration]) -> None:
    """Write prompts or demonstrations as parquet or JSONL, as the name of `path` says."""
    rows = [row_of(record) for record in records]
    if path.suffix == ".parquet":
        write_rows(path, rows, ROW_SCHEMA)
    else:
        write_jsonl(path, rows)


def _columns(
    path: Path, batch: Sequence[Mapping[str, object]], schema: pa.Schema, start: int
) -> pa.Table:
    for number, row in enumerate(batch, start=start + 1):
        for what in row_misfits(row, schema):
            raise DataError(f"cannot write row {number}: {what}", where=str(path))
    try:
        return pa.Table.from_pylist(list(batch), schema=schema)
    except (pa.ArrowException, ValueError, TypeError, OverflowError) as error:
        raise DataError(f"a value does not fit its column: {error}", where=str(path)) from None


def _take(
    table: Table[R],
    line: Line,
    row: Row,
    data: Data,
    parse: Callable[[Row, Data], R],
    seen: dict[str, tuple[R, int]],
) -> None:
    """Parse one row into the table: a record, a duplicate, or a bad row."""
    try:
        record = parse(row, data)
        earlier, number = seen.setdefault(record.id, (record, line.number))
        if number == line.number:
            table.records.append(record)
        elif earlier == record:
            table.num_duplicates += 1
        else:
            raise RowError(f"id '{record.id}' has another content than in line {number}")
    except RowError as error:
        table.bad.append(Line(line.number, line.raw, None, str(error)))


def _parquet_rows(path: Path) -> Iterator[Line]:
    try:
        file = pq.ParquetFile(path)
    except FileNotFoundError:
        raise DataError("the file does not exist", where=str(path)) from None
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"not a whole parquet file: {error}", where=str(path)) from None
    number = 0
    with file:
        try:
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Line(number, repr(row).encode("utf-8", "backslashreplace"), row)
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"the file is damaged after row {number}: {error}", where=str(path)
            ) from None


def _settle(table: Table[R], data: Data, quarantine: Path | None) -> list[R]:
    """Refuse, or quarantine and report; then the records."""
    path = table.path
    if len(table.bad) > data.max_bad_rows:
        raise _refusal(table, data)
    if not table.records:
        raise DataError("the file holds no rows", where=str(path))
    if table.num_duplicates:
        _LOG.warning("%s: %d rows equal to earlier ones left out", path, table.num_duplicates)
    if table.bad:
        target = quarantine / f"{path.name}.quarantine.jsonl" if quarantine else None
        if target is not None:
            write_jsonl(target, [_quarantined(path, line) for line in table.bad])
        lines = ", ".join(str(line.number) for line in table.bad[:_MAX_SHOWN])
        _LOG.warning("%s: %d bad rows left out (lines %s)", path, len(table.bad), lines)
    return table.records


def _refusal(table: Table[R], data: Data) -> DataError:
    first, *others = table.bad
    why = ""
    if others or data.max_bad_rows:
        shown = ", ".join(str(line.number) for line in table.bad[:_MAX_SHOWN])
        more = " and more" if len(table.bad) > _MAX_SHOWN else ""
        why = f"bad rows: {shown}{more}; data.max_bad_rows allows {data.max_bad_rows}"
    return DataError(
        first.error,
        where=_where(table.path, first.number),
        why=why,
        fix="mend the row, or allow some to be set aside with data.max_bad_rows",
    )


def _where(path: Path, number: int) -> str:
    return f"{path}:row {number}" if path.suffix == ".parquet" else f"{path}:{number}"


def _quarantined(path: Path, line: Line) -> dict[str, object]:
    raw = line.raw[:_MAX_RAW].decode("utf-8", "backslashreplace").rstrip("\r\n")
    return {"file": str(path), "line": line.number, "error": line.error, "raw": raw}
