"""packtrain from Python: run a recipe, and look at what a run has left.

    run = packtrain.run("recipe.yaml", **{"rl.steps": 50})       # or packtrain.Run("runs/tiny")
    run.metrics["rl"].to_pandas();  run.groups();  run.curriculum();  run.report()

Everything is read from the run's files, also while it runs in another process. Tables are Arrow's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ground.config import ARMS, STAGES
from ground.errors import PacktrainError
from ground.metrics import read_metrics
from ground.recipe import load_recipe
from ground.run import require_run
from packtrain.report import write_report
from packtrain.runner import Wish, run_recipe
from packtrain.status import RunStatus, read_status

_SEEN = ["prompt_id", "capability", "draw", "opened_at", "reason", "successes", "trials"]
"""Columns of rl/groups that tell what became of a prompt."""


class Run:
    """A run directory, finished or not.

    Example:
        run = Run("runs/tiny");  run.status.stages;  run.groups().to_pandas()

    Raises:
        DataError: `path` is not a run directory.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        require_run(self.path)

    @property
    def status(self) -> RunStatus:
        """How far each stage is, and what its evaluation says."""
        return read_status(self.path)

    @property
    def metrics(self) -> Mapping[str, pa.Table]:
        """The numbers of each stage that has any, one row per record, in order."""
        found = {
            name: read_metrics(self.path / name / "metrics.jsonl") for name in (*STAGES, *ARMS)
        }
        return {name: pa.Table.from_pylist(_even(rows)) for name, rows in found.items() if rows}

    def groups(self) -> pa.Table:
        """Every draw that RL's learner consumed, with its rollouts, as in rl/groups, by step."""
        return self._consumed()

    def curriculum(self) -> pa.Table:
        """What was seen of each prompt, draw by draw: its outcome, passes and trials."""
        return self._consumed(_SEEN)

    def report(self, output: Path | str | None = None) -> Path:
        """Write the page about the run; returns its path."""
        return write_report(self.path, None if output is None else Path(output))

    def _consumed(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of all consumed steps, oldest first, with their step: step n made version n."""
        parts = []
        for path in sorted((self.path / "rl" / "groups").glob("step_*.parquet")):
            rows = pq.read_table(path, columns=columns)
            step = [int(path.stem.removeprefix("step_"))] * rows.num_rows
            parts.append(rows.append_column("step", pa.array(step, pa.int64())))
        return pa.concat_tables(parts) if parts else pa.table({})


def run(
    recipe: Path | str,
    directory: Path | str | None = None,
    *,
    resume: bool = False,
    start: str = "",
    overwrite: bool = False,
    **overrides: object,
) -> Run:
    """Do what is left of a recipe, as `packtrain run` does: each stage in processes of its own.

    Args:
        directory: the run directory; `runs/<name>` by default.
        resume, start, overwrite: the flags `--resume`, `--from` and `--overwrite`.
        overrides: values of the recipe by their paths, `**{"rl.steps": 50}`, as JSON has them.

    Raises:
        PacktrainError: a stage failed (its own message is above, on stderr), or the recipe, the
            data or the machine do not allow a start.
    """
    words = [f"{key}={json.dumps(value, default=str)}" for key, value in overrides.items()]
    document = load_recipe(Path(recipe), words)
    place = Path(directory) if directory else Path("runs") / document.head().name
    code = run_recipe(document, Wish(place, resume=resume, start=start, overwrite=overwrite))
    if code:
        raise PacktrainError(
            f"the run ended with exit code {code}",
            where=str(place),
            fix="see the message above and the run's log folder, then call run(…, resume=True)",
        )
    return Run(place)


def _even(records: list[dict[str, object]]) -> list[dict[str, object]]:
    """Records with all keys in each, in the order of their first appearance."""
    keys = dict.fromkeys(key for record in records for key in record)
    return [{key: record.get(key) for key in keys} for record in records]
