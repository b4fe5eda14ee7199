"""`packtrain status`: how far a run is, told from its files in any shell, without Ray."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ground.console import plain_text
from ground.errors import PacktrainError
from ground.lock import Holder, is_held, read_holder
from ground.manifest import read_manifest
from ground.positions import Value
from ground.recipe import load_recipe
from ground.run import STARTED, require_run
from ground.trail import PLACES
from packtrain.advice import advice
from packtrain.loop_view import loop_lines, read_loop
from packtrain.observe import (
    Progress,
    State,
    estimate,
    evaluation,
    is_done,
    last_metrics,
    mapping,
    number,
    present_stages,
    read_json,
    read_progress,
    text,
)

STYLES: dict[State, str] = {"done": "green", "running": "cyan", "failed": "red", "waiting": "dim"}


@dataclass(frozen=True, slots=True)
class StageStatus:
    """One stage, or `base`, seen from outside.

    Example:
        StageStatus("sft", "done", None, 41.2, {"pass@1": {…}}, {"loss": 0.4}, "")
    """

    name: str
    state: State
    progress: Progress | None
    seconds: float | None
    evaluation: Mapping[str, object]
    summary: Mapping[str, object]
    problem: str
    """Why it failed, as far as files tell."""


@dataclass(frozen=True, slots=True)
class RunStatus:
    """All stages of a run, and who holds it."""

    run: Path
    stages: tuple[StageStatus, ...]
    holder: Holder | None
    """None when no process is at work."""
    again: str
    """The command that goes on with the run, when it has stopped."""
    loop: Mapping[str, object]
    """What the loop of RL said last while it is at work; else empty."""
    advice: str = ""
    """Who waits for whom in RL and what would mend it; empty where nobody does."""

    def to_json(self) -> dict[str, object]:
        """The object that `--json` prints."""
        lock = None
        if self.holder:
            age = round(time.time() - self.holder.started, 1)
            lock = {"pid": self.holder.pid, "host": self.holder.host, "age_seconds": age}
        return {
            "run": str(self.run),
            "lock": lock,
            "loop": dict(self.loop) or None,
            "advice": self.advice or None,
            "stages": {stage.name: _stage_json(stage) for stage in self.stages},
        }


def command(arguments: argparse.Namespace) -> int:
    """Print the status of a run as a table or as JSON."""
    status = read_status(arguments.run)
    if arguments.json:
        sys.stdout.write(
            json.dumps(status.to_json(), indent=1, allow_nan=False, default=str) + "\n"
        )
    else:
        _show(status)
    return 0


def read_status(run: Path) -> RunStatus:
    """What the files of a run say.

    Raises:
        DataError: there is no such directory, or it is not a run.
    """
    require_run(run)
    recipe = _recipe(run)
    stages = present_stages(run, recipe)
    note = read_json(run / "runner.json")
    holder = read_holder(run) if is_held(run) else None
    if holder and note.get("pid") == holder.pid and note.get("state") in ("failed", "stopped"):
        holder = None  # that command is about to end
    if holder and note.get("pid") != holder.pid:
        note = {}  # of a command that is gone: a stage was started by hand since
    names = [*(["base"] if "evaluate" in recipe or (run / "base").is_dir() else []), *stages]
    found = tuple(_stage_status(run, name, note, holder is not None) for name in names)
    is_looping = any(stage.name == "rl" and stage.state == "running" for stage in found)
    loop = read_loop(run) if is_looping else {}
    said = advice(last_metrics(run, "rl", having="workers"))
    return RunStatus(run, found, holder, text(note.get("again")), loop, said)


def _stage_status(run: Path, name: str, note: Mapping[str, object], held: bool) -> StageStatus:
    folder = run / name if name != "base" else run / "base" / "evaluation"
    state = _state(folder, name, note, held)
    is_over = state in ("done", "waiting")
    try:
        facts = read_manifest(folder).facts if is_done(folder) else {}
        problem = ""
    except PacktrainError as error:
        facts, state, problem = {}, "failed", str(error)
    began = number(read_json(folder / STARTED).get("started"))
    finished = number(facts.get("finished"))
    end = finished if finished is not None else time.time() if state == "running" else None
    return StageStatus(
        name,
        state,
        None if is_over else read_progress(folder),
        end - began if began is not None and end is not None else None,
        evaluation(run, name) if name in PLACES else {},
        mapping(facts.get("summary")),
        problem or _problem(name, state, note),
    )


def _state(folder: Path, name: str, note: Mapping[str, object], held: bool) -> State:
    """done: manifest there; running: begun and the run is held; failed: begun and nobody there.
    One that was begun before waits while the run is at another, as an arm may."""
    if is_done(folder):
        return "done"
    is_begun = folder.is_dir()
    is_current = text(note.get("folder")).split("/")[0] == name
    is_elsewhere = note.get("state") == "running" and not is_current
    if held and is_begun:
        return "waiting" if is_elsewhere else "running"
    if held and is_current and note.get("state") == "running":
        return "running"
    if is_begun or (is_current and note.get("state") == "failed"):
        return "failed"
    return "waiting"


def _problem(name: str, state: State, note: Mapping[str, object]) -> str:
    if state != "failed":
        return ""
    is_named = text(note.get("folder")).split("/")[0] == name
    if is_named and isinstance(note.get("exit_code"), int):
        return f"ended with exit code {note['exit_code']}"
    return "was interrupted"


def _recipe(run: Path) -> Mapping[str, Value]:
    """What the run was asked to do; empty when its recipe is missing or damaged."""
    try:
        return load_recipe(run / "recipe.resolved.yaml").values
    except PacktrainError:
        return {}


def _stage_json(stage: StageStatus) -> dict[str, object]:
    progress = stage.progress
    parts: dict[str, object] = {
        "state": stage.state,
        "seconds": round(stage.seconds, 1) if stage.seconds is not None else None,
        "progress": {
            "step": progress.step,
            "total": progress.total,
            "eta_seconds": progress.eta_seconds,
        }
        if progress
        else None,
        "evaluation": dict(stage.evaluation) or None,
        "problem": stage.problem or None,
    }
    return {key: value for key, value in parts.items() if value is not None}


def _show(status: RunStatus) -> None:
    table = Table("stage", "state", "progress", "time", "pass@1", box=None, padding=(0, 2))
    for stage in status.stages:
        score = estimate(stage.evaluation.get("pass@1"))
        progress = stage.progress
        table.add_row(
            stage.name,
            Text(stage.state, STYLES[stage.state]),
            f"{progress.step}/{progress.total}" if progress else plain_text(stage.problem),
            f"{stage.seconds:.0f} s" if stage.seconds is not None else "",
            f"{score.mean:.1%} ({score.low:.1%} to {score.high:.1%})" if score else "",
        )
    console = Console()
    console.print(table)
    told = loop_lines(status.loop) if status.loop else []
    for line in [*told, *([f"rl: {status.advice}"] if status.advice else [])]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    holder = status.holder
    if holder:
        age = time.time() - holder.started
        console.print(f"held by pid {holder.pid} on {holder.host} since {age:.0f} s")
    elif status.again and any(stage.state != "done" for stage in status.stages):
        console.print(f"nobody is at work; go on with: {status.again}", soft_wrap=True)
