"""`packtrain data`: what a file of one's own is, what is wrong with it, and how to use it.

preview FILE            the first rows as packtrain understands them
stats FILE              layouts, kinds, lengths, every bad line, and the lines for a recipe
convert FILE TARGET     the same rows as JSON lines that every stage reads
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from ground.config import Data
from ground.console import plain_text, say
from ground.errors import DataError
from ground.jsonl import Line, RowError, is_array, read_array
from ground.records import Demonstration, Prompt
from ground.rows import Row, row_of
from ground.tables import Table, lines_of, tabulate, write_jsonl
from packtrain.data_stats import Survey, lengths, template_of
from packtrain.layouts import PAIRS, Taken, take
from packtrain.samples import shorten

Record = Demonstration | Prompt

MAX_BAD = 1000
"""Bad rows after which a survey stops: the file is something else."""
_SHOWN_BAD = 10
_NOUNS = {"demonstration": "demonstrations", "prompt": "RL prompts"}
_REWARD = "of the recipe"
"""Stands in for data.defaults.reward, which a file need not have."""


def command(arguments: argparse.Namespace) -> int:
    """Preview, survey or convert a file; 3 where it has bad rows."""
    actions = {"preview": _preview, "stats": _stats, "convert": _convert}
    return actions[arguments.action](arguments)


def _preview(arguments: argparse.Namespace) -> int:
    bad = 0
    for line in islice(_lines(arguments.file), arguments.rows):
        try:
            taken = _taken(line)
            record = taken.record(_defaults(taken))
        except RowError as error:
            bad += 1
            say(f"── {_place(arguments.file, line.number)}: bad row\n   {error}\n")
            continue
        where = _place(arguments.file, line.number)
        say(f"── {where}: {taken.layout.name}, taken for {_NOUNS[taken.kind]}")
        for name, text in _parts(record):
            say(f"  {name}")
            say("\n".join(f"    │ {each}" for each in plain_text(shorten(text)).split("\n")))
        if taken.beside:
            say(f"  not read: {', '.join(_one_line(name) for name in taken.beside)}")
        say("")
    return 3 if bad else 0


def _parts(record: Record) -> Iterator[tuple[str, str]]:
    """Name and text of all that a record says."""
    yield from ((message.role, message.content) for message in record.messages)
    yield "capability", record.capability
    if record.answer:
        yield "answer", record.answer
    if record.reward and record.reward != _REWARD:
        yield "reward", record.reward


def _stats(arguments: argparse.Namespace) -> int:
    table, survey = _surveyed(arguments.file)
    chat = template_of(arguments.model)
    for lines in (
        _report(arguments.file, table, survey),
        lengths(table.records, chat, arguments.max_length),
        _faults(arguments.file, table),
        survey.recipe(arguments.file),
    ):
        for line in lines:
            say(line)
    return 3 if table.bad else 0


def _report(path: Path, table: Table, survey: Survey) -> Iterator[str]:
    form = "one JSON array" if is_array(path) else path.suffix.removeprefix(".")
    told = f"{len(table.records)} rows, {len(table.bad)} bad, {table.num_duplicates} left out as "
    yield f"{_one_line(path.name)}: {form}; {told}equal to earlier ones"
    for (layout, kind), count in survey.layouts.items():
        yield f"  laid out as {layout}, taken for {_NOUNS[kind]}: {count} rows"
        if layout == PAIRS:
            yield "    of their chosen side; pairs for dpo are mined from rl's own groups"
    counts = Counter(record.capability for record in table.records)
    named = ", ".join(f"{_one_line(name)} {count}" for name, count in counts.most_common(8))
    if counts:
        yield f"  capabilities: {named}{' …' if len(counts) > 8 else ''}"
    if survey.beside:
        names = ", ".join(_one_line(name) for name in survey.beside)
        yield f"  columns that no stage reads: {names}"


def _faults(path: Path, table: Table) -> Iterator[str]:
    if table.bad:
        yield "bad rows"
    for line in table.bad[:_SHOWN_BAD]:
        yield f"  {_place(path, line.number)}: {_one_line(line.error)}"
    if len(table.bad) > _SHOWN_BAD:
        more = "at least " if len(table.bad) > MAX_BAD else ""
        yield f"  and {more}{len(table.bad) - _SHOWN_BAD} more"


def _convert(arguments: argparse.Namespace) -> int:
    target: Path = arguments.target
    if target.suffix != ".jsonl" or target.exists():
        what = "exists" if target.exists() else "must end in .jsonl"
        raise DataError(f"the target {what}", where=str(target), fix="name another file")
    table, survey = _surveyed(arguments.file)
    if len(table.bad) > arguments.max_bad:
        first = table.bad[0]
        raise DataError(
            f"{first.error} (and {len(table.bad) - 1} more bad rows)",
            where=_place(arguments.file, first.number),
            fix="mend the rows, or leave some out with --max-bad N",
        )
    pairs = zip(table.records, survey.rows, strict=True)
    write_jsonl(target, (_written(record, taken) for record, taken in pairs))
    told = f"{len(table.records)} rows written to {target}"
    say(f"{told}; {len(table.bad)} bad rows and {table.num_duplicates} equal ones left out")
    for line in survey.recipe(target, is_converted=True):
        say(line)
    return 0


def _written(record: Record, taken: Taken) -> dict[str, object]:
    """A row of ours without empty columns, and what stood beside it as `meta_…`."""
    row = {name: value for name, value in row_of(record).items() if value not in (None, "")}
    if isinstance(record, Prompt):
        row["answer"] = record.answer
    if row.get("reward") == _REWARD:
        del row["reward"]
    beside = {
        name if name.startswith("meta_") else f"meta_{name}": _plain(value)
        for name, value in taken.beside.items()
    }
    return row | beside


def _plain(value: object) -> object:
    """A value as JSON has it; what JSON has not, in words."""
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError):
        return repr(value)


def _surveyed(path: Path) -> tuple[Table[Record], Survey]:
    """All rows of a file, read as stages would read them."""
    first: dict[str, Taken] = {}

    def parse(row: Row, data: Data) -> Record:
        del data
        taken = take(row)
        record = taken.record(_defaults(taken))
        first.setdefault(record.id, taken)
        return record

    table = tabulate(path, _lines(path), Data(max_bad_rows=MAX_BAD), parse)
    if not table.records and not table.bad:
        raise DataError("the file holds no rows", where=str(path))
    return table, Survey([first[record.id] for record in table.records])


def _taken(line: Line) -> Taken:
    if line.value is None:
        raise RowError(line.error)
    return take(line.value)


def _defaults(taken: Taken) -> Data:
    """RL prompts may leave their reward to the recipe."""
    return Data(defaults={"reward": _REWARD} if taken.kind == "prompt" else {})


def _lines(path: Path) -> Iterator[Line]:
    return read_array(path) if is_array(path) else lines_of(path)


def _place(path: Path, number: int) -> str:
    return f"{path}:row {number}" if path.suffix == ".parquet" else f"{path}:{number}"


def _one_line(text: str) -> str:
    return " ".join(plain_text(text).split())
