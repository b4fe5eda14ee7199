"""Strict JSON lines: every line is one object, and every fault has its line number.

Accepted, because nothing is lost: a UTF-8 byte-order mark, CRLF, blank lines, no newline at the
end. Refused by name: other encodings, archives, one big array, NUL bytes, merge markers, NaN and
infinities, numbers beyond 64 bits, duplicate keys, half surrogates, lines without end.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ground.errors import DataError

MAX_LINE_BYTES = 16 * 1024 * 1024
MAX_ARRAY_BYTES = 1024 * 1024 * 1024
_MARKERS = (b"<<<<<<<", b"=======", b">>>>>>>", b"|||||||")
_FOREIGN = (
    (b"\xff\xfe", "is UTF-16, must be UTF-8", "iconv -f UTF-16 -t UTF-8"),
    (b"\xfe\xff", "is UTF-16, must be UTF-8", "iconv -f UTF-16 -t UTF-8"),
    (b"\x1f\x8b", "is gzip-compressed, must be plain text", "unpack it with gunzip"),
    (b"PAR1", "is parquet, named like JSON lines", "rename it to .parquet"),
    (b"PK\x03\x04", "is a zip archive, must be plain text", "unpack it"),
)


class RowError(ValueError):
    """What is wrong with one row; its reader adds file and line."""


@dataclass(frozen=True, slots=True)
class Line:
    """One line that is not blank: an object, or the reason why it is none.

    Example:
        Line(number=14, raw=b'{"id": 1', value=None, error="the last line is cut off")
    """

    number: int
    """From 1, blank lines counted."""
    raw: bytes
    """As it stands in the file, at most MAX_LINE_BYTES of it."""
    value: dict[str, object] | None
    error: str = ""


def read_lines(path: Path) -> Iterator[Line]:
    """Yield the lines of a file in order; the memory needed is bounded by the longest line.

    Raises:
        DataError: the file as a whole is missing, or is something other than JSON lines.
    """
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise DataError("the file does not exist", where=str(path)) from None
    except OSError as error:
        raise DataError(f"the file cannot be read: {error.strerror}", where=str(path)) from None
    with file:
        _refuse_foreign(path, file)
        yield from _lines(file)


def is_array(path: Path) -> bool:
    """Whether a file begins like one JSON array rather than like lines of objects."""
    try:
        with path.open("rb") as file:
            return _begins_array(file.read(4096))
    except OSError:
        return False


def read_array(path: Path) -> Iterator[Line]:
    """Yield the objects of a file that is one JSON array, each with the line it begins in.

    As strict as `read_lines`, but whole in memory, so stages do not read arrays: a person's file is
    made into lines by `packtrain data convert`.

    Raises:
        DataError: the file is no array of JSON, or larger than MAX_ARRAY_BYTES.
    """
    if path.stat().st_size > MAX_ARRAY_BYTES:
        raise DataError(
            f"an array may have {MAX_ARRAY_BYTES // 2**20} MB, it has "
            f"{path.stat().st_size // 2**20}",
            where=str(path),
            fix="jq -c '.[]' turns an array into lines",
        )
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        what = f"not UTF-8: byte 0x{raw[error.start]:02x}"
        raise DataError(what, where=f"{path}:{line}") from None
    yield from _items(path, text)


def _items(path: Path, text: str) -> Iterator[Line]:
    place, line, counted = _past_space(text, text.index("[") + 1), 1, 0
    while not text.startswith("]", place):
        line, counted = line + text.count("\n", counted, place), place
        try:
            value, place = _DECODER.raw_decode(text, place)
        except json.JSONDecodeError as error:
            what = f"not JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
            raise DataError(what, where=f"{path}:{error.lineno}") from None
        except (RowError, RecursionError) as error:
            what = str(error) if isinstance(error, RowError) else "nested too deep"
            raise DataError(what, where=f"{path}:{line}") from None
        is_row = isinstance(value, dict)
        wrong = "" if is_row else f"a row must be an object, got {kind_of(value)}"
        yield Line(line, text[counted:place].encode(), value if is_row else None, wrong)
        place = _past_space(text, place)
        if text.startswith(",", place):
            place = _past_space(text, place + 1)
        elif not text.startswith("]", place):
            raise DataError("the array is cut off or broken here", where=f"{path}:{line}")
    if text[place + 1 :].strip():
        raise DataError("something stands behind the array", where=str(path))


def _past_space(text: str, place: int) -> int:
    while place < len(text) and text[place] in " \t\r\n":
        place += 1
    return place


def _begins_array(start: bytes) -> bool:
    return start.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _refuse_foreign(path: Path, file: BinaryIO) -> None:
    start = file.read(4096)
    for magic, what, fix in _FOREIGN:
        if start.startswith(magic):
            raise DataError(f"the file {what}", where=str(path), fix=fix)
    if _begins_array(start):
        start = start.removeprefix(b"\xef\xbb\xbf")
        line = start[: len(start) - len(start.lstrip())].count(b"\n") + 1
        raise DataError(
            "the file is one JSON array, must be one object per line",
            where=f"{path}:{line}",
            fix=f"packtrain data convert {path} {path.stem}.lines.jsonl makes lines of it",
        )
    file.seek(0)


def _lines(file: BinaryIO) -> Iterator[Line]:
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        if len(raw) > MAX_LINE_BYTES:
            _skip_line(file)
            error = f"the line is longer than {MAX_LINE_BYTES // 2**20} MB"
            yield Line(number, raw[:MAX_LINE_BYTES], None, error)
            continue
        text = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        if not text.strip():
            continue
        try:
            yield Line(number, raw, _object(text))
        except RowError as error:
            whole = raw.endswith(b"\n") or not isinstance(error, _NotJson)
            yield Line(number, raw, None, str(error) if whole else f"the line is cut off: {error}")


def _skip_line(file: BinaryIO) -> None:
    while (chunk := file.readline(MAX_LINE_BYTES)) and not chunk.endswith(b"\n"):
        pass


class _NotJson(RowError):
    """The text ends or breaks where JSON does not allow it."""


def _object(raw: bytes) -> dict[str, object]:
    if b"\0" in raw:
        raise RowError(f"a NUL byte stands at column {raw.index(0) + 1}; the file is damaged")
    if raw.startswith(_MARKERS):
        raise RowError("a merge marker: the file has an unresolved merge conflict")
    try:
        text = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        at = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
        raise RowError(f"not UTF-8: {at}") from None
    try:
        value = _DECODER.decode(text)
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        raise _NotJson(f"not JSON: {what} at column {error.colno}") from None
    except RecursionError:
        raise RowError("nested too deep") from None
    if not isinstance(value, dict):
        raise RowError(f"a row must be an object, got {kind_of(value)}")
    return value


def _pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RowError(f"the key '{twice}' stands there twice")
    return value


def _whole_number(text: str) -> int:
    if len(text) > 20 or abs(int(text)) >= 2**63:
        raise RowError(f"the number {_cut(text)} does not fit in 64 bits")
    return int(text)


def _fraction(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise RowError(f"the number {_cut(text)} is not finite")
    return value


def _constant(text: str) -> float:
    raise RowError(f"{text} is not a number in JSON")


_DECODER = json.JSONDecoder(
    object_pairs_hook=_pairs,
    parse_int=_whole_number,
    parse_float=_fraction,
    parse_constant=_constant,
)


def _cut(text: str) -> str:
    return text if len(text) <= 24 else f"{text[:21]}…"


def kind_of(value: object) -> str:
    """How JSON calls a value, with the value itself where it is short."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (int, float)):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text '{_cut(value)}'"
    return "a list" if isinstance(value, list) else "an object"
