"""`packtrain run`: the stages of a recipe in order, each as a process of its own.

planned → (skipped | begun → done | failed | stopped)

Finished stages are skipped, the first failure ends the run with that stage's exit code. What the
runner does stands in `<run>/runner.json`, for `packtrain status` in another shell.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ground.console import plain_text, say
from ground.entry import EXIT_CODE
from ground.errors import RecipeError, SetupError
from ground.lock import RunLock
from ground.logs import raw_output_redacted, redact
from ground.provenance import stage_settings
from ground.recipe import RecipeDocument, load_recipe
from ground.run import RunDir
from ground.storage import remove_directory, write_file
from ground.validation import suggest
from packtrain.child import Child, exit_name
from packtrain.doctor import shadows
from packtrain.launch_file import check_launch_file, require_launchable
from packtrain.panel import LivePanel, Panel, open_panel
from packtrain.recipe import Recipe, read_recipe
from packtrain.report import write_report
from packtrain.steps import STARTS, Step, folders_from, launch_line, start_of, steps_of
from packtrain.validate import check_runnable
from packtrain.verdict import headline

NOTE = "runner.json"
TAIL_LINES = 20
CRASHES = (1, 134, 135, 136, 137, 139)
"""Codes of an end that the stage could not explain itself: defect, abort, kill, segfault."""


@dataclass(frozen=True, slots=True)
class Order:
    """What the command line asks for.

    Example:
        Order(document, RunDir(Path("runs/tiny")), tuple(steps), None)
    """

    document: RecipeDocument
    run: RunDir
    steps: tuple[Step, ...]
    accelerate: Path | None
    discarded: tuple[str, ...] = ()
    """Folders that are removed before the start."""

    @property
    def again(self) -> str:
        """The command that goes on with this run."""
        return self.line("--resume")

    def line(self, *flags: str) -> str:
        """The command of this run with other flags, as it can be typed."""
        words = ["packtrain", "run", str(self.document.path), *self.document.overrides]
        if self.run.path != Path("runs") / self.document.head().name:
            words += ["--run", str(self.run.path)]
        if self.accelerate is not None:
            words += ["--accelerate", str(self.accelerate)]
        return shlex.join([*words, *flags])


@dataclass(frozen=True, slots=True)
class Wish:
    """How a recipe is to be run.

    Example:
        Wish(Path("runs/tiny"), resume=True)
    """

    directory: Path | None = None
    """The run directory; `runs/<name>` by default."""
    resume: bool = False
    start: str = ""
    """Stage from which all is discarded and made again."""
    overwrite: bool = False
    accelerate: Path | None = None
    """File with which sft, rl and dpo are started through `accelerate launch`."""


def command(arguments: argparse.Namespace) -> int:
    """`packtrain run`, see `run_recipe`."""
    given = arguments.run, arguments.resume, arguments.start, arguments.overwrite
    wish = Wish(*given, accelerate=arguments.accelerate)
    return run_recipe(load_recipe(arguments.recipe, arguments.overrides), wish)


def run_recipe(document: RecipeDocument, wish: Wish) -> int:
    """Run what is left of a recipe; the exit code is that of the stage that failed."""
    recipe = read_recipe(document)
    run = RunDir(wish.directory or Path("runs") / recipe.name)
    hidden = shadows(Path.cwd())
    if hidden:
        raise SetupError(
            f"{', '.join(hidden)} would hide packtrain's own modules from the stages",
            fix="start packtrain from another folder, or rename them",
        )
    steps = tuple(steps_of(document))
    start = STARTS[0] if wish.overwrite else wish.start
    check_words(recipe, steps, wish.start, wish.accelerate)
    discarded = folders_from(start, document.arms) if start else ()
    order = Order(document, run, steps, wish.accelerate, discarded)
    check_runnable(document, recipe)
    require_resumable(order, wish.resume or bool(start))
    with run.open() as lock:
        discard(order)
        run.describe(document)
        code = run_steps(order, lock)
    if code == 0 or _trail_is_done(order):
        say(f"{headline(run.path)} Report: {write_report(run.path)}")
    return code


def _trail_is_done(order: Order) -> bool:
    """Whether nothing is missing but arms and what only they read."""
    besides = (*order.document.arms, *order.document.aside)
    return all(order.run.is_done(s.folder) for s in order.steps if s.stage not in besides)


def check_words(recipe: Recipe, steps: Sequence[Step], start: str, accelerate: Path | None) -> None:
    """Refuse words of the command line that cannot be followed, before anything is touched.

    Raises:
        RecipeError: `--accelerate` names no launch file, or `--from` nothing that the recipe turns
            on.
        SetupError: a stage of the recipe cannot be started with the launch file.
    """
    if accelerate is not None:
        require_launchable(check_launch_file(accelerate), recipe)
    names = {step.stage for step in steps} | {"evaluate" for step in steps if step.is_evaluation}
    if start and start not in names:
        known = [name for name in STARTS if name in names]
        raise RecipeError(
            f"--from names '{start}', which is no stage of this recipe{suggest(start, known)}",
            fix=f"name one of {', '.join(known)}",
        )


def require_resumable(order: Order, resume: bool) -> None:
    """Refuse to go on with a half finished run unless `--resume` was given.

    Raises:
        SetupError: it is half finished, what stays was made with other settings, or a folder
            that a stage needs is somebody else's.
    """
    order.run.require_usable()
    for step in order.steps:
        order.run.require_ours(step.folder)
    states = {step.folder: order.run.state(step.folder) for step in order.steps}
    done = [folder for folder, state in states.items() if state == "done"]
    begun = [folder for folder, state in states.items() if state != "absent"]
    for step in order.steps:
        if step.folder.startswith(order.discarded):
            continue
        _require_current(order, step)
        if states[step.folder] != "done":
            break
    if begun and len(done) < len(order.steps) and not resume:
        raise SetupError(
            f"the run is half finished: {len(done)} of {len(order.steps)} steps are done",
            where=str(order.run.path),
            fix=f"{order.again} to go on, or --overwrite to discard it and start anew",
        )


def discard(order: Order) -> None:
    """Remove the folders that the command line gives up, later stages first; name them before."""
    given_up = [name for name in reversed(order.discarded) if order.run.holds(name)]
    if given_up:
        say(f"deleting {', '.join(str(order.run.stage(name)) for name in given_up)}")
    for name in given_up:
        remove_directory(order.run.stage(name))
    with suppress(OSError):
        order.run.stage("base").rmdir()


def run_steps(order: Order, lock: RunLock) -> int:
    """Carry out the steps that are left; 0 when all are done."""
    if all(order.run.is_done(step.folder) for step in order.steps):
        say(f"nothing to do: all {len(order.steps)} steps of {order.run.path} are done")
        return 0
    panel = open_panel(order.run.path, order.steps)
    try:
        for index, step in enumerate(order.steps):
            if _is_done(order, step):
                continue
            started = time.monotonic()
            code = _run_step(order, lock, panel, index, step)
            panel.end(index, time.monotonic() - started, code)
            if code:
                break
        else:
            code = 0
    finally:
        panel.close()
    if code:
        _explain(order, step, code, isinstance(panel, LivePanel))
    return code


def _run_step(order: Order, lock: RunLock, panel: Panel, index: int, step: Step) -> int:
    flags = [*order.document.overrides]
    if order.run.state(step.folder) == "unfinished":
        flags.append("--resume")
    line = launch_line(step, order.document.path, order.run.path, flags, order.accelerate)
    _note(order, step, "running")
    panel.begin(index, line)
    told = (order.run.path / "log" / f"{step.log.removesuffix('.log')}.exit").resolve()
    for file in _exit_files(told):
        file.unlink()
    with (
        raw_output_redacted(order.run.path / "log", "*.out", "*.err"),
        Child(
            line,
            {**lock.environment, EXIT_CODE: str(told)},
            keep_open=() if lock.is_guest else (lock.fileno(),),
            output=_output(order, step) if isinstance(panel, LivePanel) else None,
        ) as child,
    ):
        code = child.wait(panel.refresh)
        code, message = told_end(told, code, is_stopped=child.stopped_by is not None)
    if message and isinstance(panel, LivePanel):
        with _output(order, step).open("a", encoding="utf-8") as file:
            file.write(f"packtrain: {message}\n")
    elif message:
        sys.stderr.write(f"packtrain: {message}\n")
    if code == 0 and not order.run.is_done(step.folder):
        code = 1
    _note(order, step, _state(code, child.stopped_by), code)
    return code


def told_end(path: Path, code: int, *, is_stopped: bool = False) -> tuple[int, str]:
    """The stage's own exit code, of which a launcher makes 1; the files of all ranks go.

    The rank that failed says more than those that a launcher ended because of it, and those that
    only saw it go. Where that was not rank 0, which speaks for itself, its words come along.
    """
    ends = [end for file in _exit_files(path) if (end := _end_of(file)) and end[0]]
    if code != 1 or not ends:
        return code, ""
    if is_stopped:
        return ends[0][0], ""
    told, rank, message = min(ends, key=lambda end: (end[0] in (130, 143), end[0] == 6, end[1]))
    return told, f"rank {rank}: {message}" if rank else ""


def _exit_files(path: Path) -> list[Path]:
    """What ranks have left, rank 0 first."""
    return [file for file in (path, *path.parent.glob(f"{path.name}.rank*")) if file.is_file()]


def _end_of(file: Path) -> tuple[int, int, str] | None:
    """Exit code, rank and words of a rank, whose file goes."""
    with suppress(OSError, ValueError):
        code, _, message = file.read_text(encoding="utf-8").partition("\n")
        file.unlink()
        _, _, rank = file.name.partition(".exit.rank")
        return int(code), int(rank or 0), message
    return None


def _state(code: int, stopped_by: int | None) -> str:
    if code == 0:
        return "done"
    return "stopped" if stopped_by is not None or code in (130, 143) else "failed"


def _note(order: Order, step: Step, state: str, code: int | None = None) -> None:
    """Tell other shells what is going on."""
    note = {
        "pid": os.getpid(),
        "time": time.time(),
        "step": step.title,
        "folder": step.folder,
        "state": state,
        "exit_code": code,
        "again": order.again,
    }
    write_file(order.run.path / NOTE, json.dumps(note, indent=1) + "\n")


def _explain(order: Order, step: Step, code: int, was_hidden: bool) -> None:
    """One message: what failed, its last lines where the reader has not seen them, what to do."""
    log = order.run.path / "log" / step.log
    verb = "was stopped" if code in (130, 143) else "failed"
    lines = [f"packtrain: step '{step.title}' {verb} ({exit_name(code)}); log: {log}"]
    if was_hidden or code in CRASHES:
        shown = tail(_output(order, step)) if was_hidden else tail(log)
        lines += [f"  | {line}" for line in shown]
    lines.append(f"  fix: {'' if code in (130, 143) else 'mend the cause, then '}{order.again}")
    sys.stderr.write("\n".join(lines) + "\n")


def tail(path: Path, count: int = TAIL_LINES) -> Sequence[str]:
    """The last lines of a text file, without control characters and secrets; none if absent."""
    try:
        with path.open("rb") as file:
            file.seek(max(path.stat().st_size - 16_384, 0))
            content = file.read().decode(errors="replace")
    except OSError:
        return []
    return plain_text(redact(content)).splitlines()[-count:]


def _output(order: Order, step: Step) -> Path:
    """Where a stage's stdout and stderr go while the panel has the terminal."""
    return order.run.path / "log" / f"{step.log.removesuffix('.log')}.out"


def _is_done(order: Order, step: Step) -> bool:
    _require_current(order, step)
    return order.run.is_done(step.folder)


def _require_current(order: Order, step: Step) -> None:
    """Refuse what was made, or begun, with other settings; say the line that makes it again."""
    settings = stage_settings(order.document, order.run, step.folder)
    if changes := order.run.changes(step.folder, settings):
        line = order.line("--from", start_of(step, changes))
        fix = f"undo the change, use another --run, or make it and what follows again:\n    {line}"
        raise order.run.outdated(step.folder, changes, fix)
