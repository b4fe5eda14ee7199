"""How every stage starts and ends: `python -m sft.train RECIPE [key=value…] [--run DIR] …`.

parsed → loaded → locked → begun → working → finished (manifest written last)

if __name__ == "__main__":
    leave(stage_entry("sft", SftSection, train))
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from ground.config import ARMS, STAGES, Head, Section
from ground.disk import disk_errors
from ground.errors import PacktrainError, RecipeError
from ground.lock import TOKEN
from ground.logs import install_redaction, raw_output_redacted, redact, setup_logging
from ground.metrics import Metrics
from ground.provenance import stage_settings
from ground.recipe import RecipeDocument, load_recipe
from ground.run import RunDir
from ground.signals import Interrupted, end_with_parent, install_signals
from ground.sinks import open_sinks
from ground.trail import PLACES, Trail, made_twice

S = TypeVar("S", bound=Section)

_Work = Callable[[Metrics, int], Mapping[str, object]]

_VERDICT_SECONDS = 600.0
"""How long rank 0 may take to lock the run and to look at what is there."""
_STOP = "stop"
EXIT_CODE = "PACKTRAIN_EXIT_CODE"
"""Names a file for rank 0's exit code, which launchers turn into 1; set by `packtrain run`.

The other ranks write files beside it, see `exit_file`. First comes the code, then what was said.
"""

_LOG = logging.getLogger("packtrain")


@dataclass(frozen=True)
class Stage(Generic[S]):
    """What a stage's function gets: its settings, its folder, and where its inputs are.

    Example:
        def train(stage: Stage[SftSection]) -> dict[str, object]:
            model = load_model(stage.trail.model_before("sft"))
    """

    name: str
    head: Head
    section: S
    run: RunDir
    directory: Path
    """`<run>/<name>`; for an arm `<run>/<arm>`, for an evaluation `<run>/<of>/evaluation`."""
    trail: Trail
    """Where the inputs are."""
    metrics: Metrics
    resume: bool
    """--resume was given: go on from the checkpoints in `directory`, if there are any."""
    of: str = ""
    """The model that an evaluation is of, one of `ground.trail.PLACES`."""
    arm: str = ""
    """As what the stage is made once more, see `ground.config.ARMS`; empty on the trail itself."""
    incarnation: int = 0
    """Which acquisition of the run's lock this is, from 1."""

    @property
    def record(self) -> Path:
        """Where a stage that starts processes notes them, so that its next start can end those
        that this one left behind."""
        place = f"{self.of}.evaluation" if self.of else self.arm or self.name
        return self.run.path / "log" / f"{place}.processes.json"


@dataclass(frozen=True, slots=True)
class _Order:
    """What the command line says."""

    name: str
    recipe: Path
    overrides: tuple[str, ...]
    run: Path | None
    resume: bool
    overwrite: bool
    of: str
    arm: str
    rank: int

    @property
    def place(self) -> str:
        """The stage's folder within the run."""
        return f"{self.of}/evaluation" if self.of else self.arm or self.name

    @property
    def log_name(self) -> str:
        """`sft.log`, `sft.evaluation.log`; further ranks have their own."""
        rank = f".rank{self.rank}" if self.rank else ""
        return f"{self.place.replace('/', '.')}{rank}.log"


def stage_entry(
    name: str,
    model: type[S],
    function: Callable[[Stage[S]], Mapping[str, object]],
    argv: Sequence[str] | None = None,
) -> int:
    """Run one stage from the command line and return its exit code (DESIGN: exit codes).

    Under `accelerate launch` every rank comes through here; only rank 0 locks the run, writes the
    manifest and speaks, the others do the work.
    """
    order = _parse(name, argv)
    install_redaction()
    code, message = _ended(order, model, function)
    if message:
        _say(order, message)
    if path := os.environ.get(EXIT_CODE):
        word = f"{code}\n{redact(message)}"
        exit_file(Path(path), order.rank).write_text(word, encoding="utf-8")
    return code


def exit_file(path: Path, rank: int) -> Path:
    """Where a rank leaves its exit code: `sft.exit`, `sft.exit.rank1`."""
    return path.with_name(f"{path.name}.rank{rank}") if rank else path


def _ended(
    order: _Order, model: type[S], function: Callable[[Stage[S]], Mapping[str, object]]
) -> tuple[int, str]:
    """Exit code, and what is to be said."""
    try:
        _carry_out(order, model, function)
    except PacktrainError as error:
        return error.exit_code, str(error)
    except Interrupted as interruption:
        said = f"{order.place} was interrupted ({interruption}); continue it with --resume"
        return interruption.exit_code, said
    except KeyboardInterrupt:
        return 130, f"{order.place} was interrupted; continue it with --resume"
    except Exception:
        trace = traceback.format_exc()
        return 1, f"{order.place} failed by a defect of packtrain:\n{redact(trace)}"
    return 0, ""


def _parse(name: str, argv: Sequence[str] | None) -> _Order:
    parser = argparse.ArgumentParser(description=f"the {name} stage of a packtrain recipe")
    parser.add_argument("recipe", type=Path, help="recipe.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value")
    parser.add_argument("--run", type=Path, help="directory of the run (default: runs/<name>)")
    parser.add_argument("--resume", action="store_true", help="continue what was interrupted")
    parser.add_argument("--overwrite", action="store_true", help="make the stage again")
    if name not in STAGES:
        parser.add_argument("--of", choices=PLACES, required=True, help="the model to evaluate")
    parser.set_defaults(of="", arm="")
    if arms := [each for each, arm in ARMS.items() if arm.stage == name]:
        parser.add_argument("--as", dest="arm", choices=arms, help="make it for comparison")
    given = parser.parse_intermixed_args(argv)
    return _Order(
        name,
        given.recipe,
        tuple(given.overrides),
        given.run,
        given.resume,
        given.overwrite,
        of=given.of,
        arm=given.arm,
        rank=int(os.environ.get("RANK", "0")),
    )


def _carry_out(
    order: _Order, model: type[S], function: Callable[[Stage[S]], Mapping[str, object]]
) -> None:
    if TOKEN in os.environ or "RANK" in os.environ:
        end_with_parent()
    install_signals()
    document = load_recipe(order.recipe, order.overrides)
    head, section = document.stage(order.name, model)
    if doubled := made_twice(head, document.stages):
        raise RecipeError("\n  ".join(doubled), where=document.shown)
    if order.arm and order.arm not in document.arms:
        raise RecipeError(
            f"the recipe wants no arm '{order.arm}'",
            where=document.shown,
            fix=f"set {ARMS[order.arm].switch}: true, or leave out --as {order.arm}",
        )
    run = RunDir(order.run or Path("runs") / head.name)

    def work(metrics: Metrics, incarnation: int) -> Mapping[str, object]:
        directory = run.stage(order.place)
        return function(
            Stage(
                name=order.name,
                head=head,
                section=section,
                run=run,
                directory=directory,
                trail=Trail(head, run, (*document.stages, *document.arms)),
                metrics=metrics,
                resume=order.resume,
                of=order.of,
                arm=order.arm,
                incarnation=incarnation,
            )
        )

    if order.rank:
        _follow(order, run, work)
    else:
        _lead(order, run, document, head, work)


def _lead(order: _Order, run: RunDir, document: RecipeDocument, head: Head, work: _Work) -> None:
    """Rank 0: lock, decide, tell the other ranks, work, write the manifest."""
    with _told_to_others(order) as tell, run.open() as lock:
        setup_logging(run.path / "log" / order.log_name)
        _warn_of_gaps(order, run, document)
        settings = stage_settings(document, run, order.place)
        if order.of:
            run.discard(order.place)
        if not run.begin(order.place, settings, resume=order.resume, overwrite=order.overwrite):
            _say(order, f"{order.place} is finished already; nothing to do")
            return
        if not lock.is_guest:
            run.describe(document)
        tell(str(lock.incarnation))
        directory = run.stage(order.place)
        sinks = open_sinks(head.sinks, directory, f"{head.name}/{order.place}")
        with (
            raw_output_redacted(run.path / "log", "*.err"),
            disk_errors(directory),
            Metrics(directory / "metrics.jsonl", sinks) as metrics,
        ):
            summary = work(metrics, lock.incarnation)
        run.finish(order.place, settings, summary)
        _LOG.info("%s is finished", order.place)


def _follow(order: _Order, run: RunDir, work: _Work) -> None:
    """Any other rank: rank 0 has the lock and decides; nothing is touched before it has."""
    from ground.roll import Roll

    purpose = "hear whether rank 0 begins"
    word = Roll(os.environ).hear(f"{order.place}/verdict", purpose, _VERDICT_SECONDS)
    if word == _STOP:
        return
    log = run.path / "log"
    setup_logging(log / order.log_name)
    with Metrics(log / f"{order.log_name}.metrics.jsonl") as metrics:
        work(metrics, int(word))


@contextmanager
def _told_to_others(order: _Order) -> Iterator[Callable[[str], None]]:
    """A way to tell the other ranks to begin; they are told to stop when rank 0 is through."""
    if "RANK" not in os.environ:
        yield lambda word: None
        return
    from ground.roll import Roll  # brings torch along, which one process alone does not need here

    roll = Roll(os.environ)
    try:
        yield lambda word: roll.tell(f"{order.place}/verdict", word)
    finally:
        with suppress(PacktrainError):
            roll.tell(f"{order.place}/verdict", _STOP)


def _warn_of_gaps(order: _Order, run: RunDir, document: RecipeDocument) -> None:
    """Say when a stage that the recipe turns on comes before this one and is not finished."""
    if order.of:
        return
    for stage in STAGES[: STAGES.index(order.name)]:
        is_read = order.arm or stage not in document.aside
        if is_read and document.has(stage) and not run.is_done(stage):
            _LOG.warning("%s goes without %s, which is not finished", order.place, stage)


def _say(order: _Order, message: str) -> None:
    """Tell the person once: on stderr, and in the log (whose terminal half shows warnings only)."""
    _LOG.info("%s", message)
    if not order.rank:
        sys.stderr.write(f"packtrain: {redact(message)}\n")
        sys.stderr.flush()
