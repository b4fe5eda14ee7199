"""What a run directory tells a reader from outside: files only, no Ray, no torch, no lock taken.

Every file may be absent, or be in the middle of being written by the run: a reader then gets what
is there. Nothing here raises because a run is unfinished.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pyarrow.parquet as pq

from ground.config import ARMS, STAGES
from ground.positions import Value
from ground.recipe import arms_in
from rollout.passk import Estimate

State = Literal["done", "running", "failed", "waiting"]


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a stage has come.

    Example:
        Progress(step=12, total=40, eta_seconds=33.0, numbers={"reward": 0.61})
    """

    step: int
    total: int
    eta_seconds: float | None
    numbers: Mapping[str, float]


def read_json(path: Path) -> dict[str, object]:
    """A JSON object, or an empty one where the file is missing or torn."""
    try:
        return _object(path.read_bytes())
    except OSError:
        return {}


def read_lines(path: Path) -> Iterator[dict[str, object]]:
    """The objects of a JSONL file that is still being appended to; a torn line is left out."""
    try:
        lines = path.open("rb")
    except OSError:
        return
    with lines:
        for line in lines:
            if record := _object(line):
                yield record


def number(value: object) -> float | None:
    """A finite or infinite number, booleans left out."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def text(value: object) -> str:
    """A string, or the empty one."""
    return value if isinstance(value, str) else ""


def mapping(value: object) -> Mapping[str, object]:
    """A mapping, or an empty one."""
    return value if isinstance(value, Mapping) else {}


def is_done(directory: Path) -> bool:
    """Whether a stage or evaluation has written its manifest, which comes last."""
    return (directory / "manifest.json").is_file()


def read_progress(directory: Path) -> Progress | None:
    """The stage's own progress.json."""
    record = read_json(directory / "progress.json")
    step, total = number(record.get("step")), number(record.get("total"))
    if step is None or total is None:
        return None
    numbers = {key: value for key, raw in record.items() if (value := number(raw)) is not None}
    for key in ("step", "total", "eta_seconds", "time", "seconds"):
        numbers.pop(key, None)
    return Progress(int(step), int(total), number(record.get("eta_seconds")), numbers)


def evaluation(run: Path, where: str) -> dict[str, object]:
    """evaluation.json of a model of the trail; empty when it has not been made."""
    return read_json(run / where / "evaluation" / "evaluation.json")


def estimate(value: object) -> Estimate | None:
    """From `{"mean", "low", "high"}` as evaluation.json holds it."""
    fields = mapping(value)
    mean = number(fields.get("mean"))
    if mean is None:
        return None
    low, high = number(fields.get("low")), number(fields.get("high"))
    return Estimate(mean, mean if low is None else low, mean if high is None else high)


def read_rows(path: Path, columns: Sequence[str] | None = None) -> list[dict[str, object]]:
    """Rows of a parquet file, none when it is missing or not whole; absent columns are left out."""
    try:
        file = pq.ParquetFile(path)
        wanted = [name for name in columns if name in file.schema_arrow.names] if columns else None
        return file.read(columns=wanted).to_pylist()
    except (OSError, ValueError):
        return []


def last_metrics(run: Path, stage: str, having: str = "") -> dict[str, object]:
    """The newest line of a stage's metrics (that has such a key), read from the file's end."""
    path = run / stage / "metrics.jsonl"
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 65_536, 0))
            lines = file.read().splitlines()
    except OSError:
        return {}
    records = (record for line in reversed(lines) if (record := _object(line)))
    return next((record for record in records if not having or having in record), {})


def series(rows: Sequence[Mapping[str, object]], key: str) -> tuple[tuple[float, float], ...]:
    """(step, value) of every row that has the key as a number."""
    points = ((number(row.get("step")), number(row.get(key))) for row in rows)
    return tuple((step, value) for step, value in points if step is not None and value is not None)


def present_stages(run: Path, recipe: Mapping[str, Value]) -> list[str]:
    """Stages that the recipe asks for or that have left a directory; arms follow their stage."""
    wanted = {*recipe, *arms_in(recipe)}
    order = [
        name for stage in STAGES for name in (stage, *(a for a in ARMS if ARMS[a].stage == stage))
    ]
    return [name for name in order if name in wanted or (run / name).is_dir()]


def _object(content: bytes) -> dict[str, object]:
    """A JSON object whose NaN and Infinity are nulls; empty where it is not one."""
    try:
        value = json.loads(content, parse_constant=lambda _: None)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
