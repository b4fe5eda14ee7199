"""The journal of consumed batches: one parquet file per step, written before the step is applied.

    plan received → step_000003.parquet written and fsynced → the step is applied
                    └ survey_000003.parquet before it, where the step has askings (rl/survey.py)

Step n makes version n. From its file the plan can be rebuilt bit for bit, so the learner can repeat
every step since its last checkpoint, whenever it was killed (`LearnerLoop.repeat`).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ground import faults
from ground.disk import disk_errors, fsync_directory
from ground.errors import DataError
from ground.storage import replace_file
from rl.advantages import batch_advantages
from rl.buffer import Outcome, Plan
from rl.groups import SCHEMA, groups_path, outcome_of, row_of
from rl.objective_config import AdvantageSection, BaselineAdvantages

_STEP, _SURVEYED = b"packtrain.step", b"packtrain.surveyed"
_CENTERED = BaselineAdvantages()


class Consumed:
    """The folder of a run's step files.

    Example:
        consumed.write(plan)                      # before the learner applies plan.step
        for plan in consumed.after(10): …         # after a crash: steps 10, 11, … again
        consumed.trim(12)                         # nothing beyond version 12 has happened
    """

    def __init__(self, directory: Path, advantages: AdvantageSection = _CENTERED) -> None:
        self._directory, self._advantages = directory, advantages

    def write(self, plan: Plan) -> None:
        """Keep a plan; it is on the disk when this returns.

        Raises:
            SetupError: the disk is full; no half file is left.
        """
        path = groups_path(self._directory, plan.step + 1)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        if plan.surveyed:
            rows = [row_of(outcome, ()) for outcome in plan.surveyed]
            _write(survey_path(self._directory, plan.step + 1), rows, plan)
        trained = batch_advantages(plan.groups, self._advantages)
        shown = {group.id: each for group, each in zip(plan.groups, trained, strict=True)}
        rows = [row_of(outcome, shown.get(outcome.draw.group_id, ())) for outcome in plan.outcomes]
        _write(path, rows, plan)
        faults.point("journal.written")

    def after(self, version: int) -> Iterator[Plan]:
        """The plans of steps `version`, `version + 1` and so on, as far as there are files.

        Raises:
            DataError: a file is damaged.
        """
        while (path := groups_path(self._directory, version + 1)).exists():
            yield read_plan(path)
            version += 1

    def trim(self, version: int) -> list[Path]:
        """Remove what later steps consumed, last first; their draws are asked again."""
        doomed = [path for path in self.files() if _version_of(path) > version][::-1]
        surveys = [survey_path(self._directory, _version_of(path)) for path in doomed]
        with disk_errors(self._directory):
            for path in [*doomed, *filter(Path.exists, surveys)]:
                os.unlink(path)
            if doomed:
                fsync_directory(self._directory)
        return doomed

    def files(self) -> list[Path]:
        """All step files, oldest first."""
        return sorted(self._directory.glob("step_*.parquet"), key=_version_of)


def survey_path(directory: Path, version: int) -> Path:
    """File of what a step's askings showed, beside that of the step itself."""
    return directory / f"survey_{version:06d}.parquet"


def read_plan(path: Path) -> Plan:
    """Rebuild the plan of a step.

    Raises:
        DataError: a file is missing, cut, changed, of another schema or of another step.
    """
    version = _version_of(path)
    outcomes, surveyed = _read(path, version)
    asked = _read(survey_path(path.parent, version), version)[0] if surveyed else []
    if len(asked) != surveyed:
        raise DataError(
            f"step {version - 1} must have {surveyed} askings, its survey has {len(asked)}",
            where=str(survey_path(path.parent, version)),
        )
    return Plan.of(version - 1, outcomes, asked)


def _write(path: Path, rows: Sequence[Mapping[str, object]], plan: Plan) -> None:
    facts = {_STEP: str(plan.step), _SURVEYED: str(len(plan.surveyed))}
    table = pa.Table.from_pylist(rows, schema=SCHEMA.with_metadata(facts))
    with replace_file(path) as staging:
        faults.point("journal.staged")
        pq.write_table(table, staging, compression="zstd", version="2.6", write_page_checksum=True)


def _read(path: Path, version: int) -> tuple[list[Outcome], int]:
    """What a file of a step has, and how many askings the step had."""
    try:
        table = pq.read_table(path, page_checksum_verification=True)
        facts = table.schema.metadata or {}
        if not table.schema.equals(SCHEMA):
            raise ValueError("its columns are not those of this version of packtrain")
        outcomes = [outcome_of(row) for row in table.to_pylist()]
        if (made := int(facts.get(_STEP, b"-1")) + 1) != version:
            raise ValueError(f"it is the file of step {made}")
        return outcomes, int(facts.get(_SURVEYED, b"0"))
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            "what a step consumed cannot be read", where=str(path), why=str(error)
        ) from error


def _version_of(path: Path) -> int:
    return int(path.stem.removeprefix("step_"))
