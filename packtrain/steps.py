"""What a recipe means as a list of processes: one step per stage and per evaluation, in order."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ground.config import ARMS, STAGES
from ground.errors import RecipeError
from ground.recipe import RecipeDocument
from ground.trail import PLACES

ENTRIES = {
    "herd": "ground.herd.train",
    "prune": "curation.prune",
    "targets": "distill.fill",
    "sft": "sft.train",
    "mine": "curation.mine",
    "rl": "rl.train",
    "dpo": "dpo.train",
}
"""Stage → the module that is run with -m."""
EVALUATION = "rollout.evaluate"
LAUNCHED = ("sft", "rl", "dpo")
"""Stages that `accelerate launch` may start."""
STARTS = (STAGES[0], "base", *STAGES[1:], *ARMS, "evaluate")
"""Where `--from` can begin: the trail in order, or with an arm or the evaluations alone."""


@dataclass(frozen=True, slots=True)
class Step:
    """One process of a run: a stage, or the evaluation that follows it.

    Example:
        Step("evaluate sft", "sft/evaluation", "rollout.evaluate", ("--of", "sft"))
    """

    title: str
    folder: str
    """Relative to the run; its manifest.json means that the step is done."""
    module: str
    arguments: tuple[str, ...] = ()

    @property
    def stage(self) -> str:
        """The stage or arm this belongs to: `sft` for both sft and its evaluation."""
        return self.folder.split("/")[0]

    @property
    def log(self) -> str:
        """Name of its log file under log/, as ground.entry names it."""
        return f"{self.folder.replace('/', '.')}.log"

    @property
    def is_evaluation(self) -> bool:
        """True for the evaluation of a model, False for a stage."""
        return self.module == EVALUATION


def steps_of(document: RecipeDocument) -> list[Step]:
    """The steps of a recipe, in the order of the trail.

    The base is evaluated as soon as it exists: after `herd`, or first. Arms come last, and so does
    what only they read: nothing waits for them.

    Raises:
        RecipeError: no stage is on.
    """
    stages = document.stages
    if not stages and not document.has("evaluate"):
        raise RecipeError(
            "a recipe needs at least one stage",
            where=document.shown,
            fix=f"add a section: {', '.join([*ENTRIES, 'evaluate'])}",
        )
    steps = [] if "herd" in stages else _evaluations(document, "base")
    for stage in (each for each in stages if each not in document.aside):
        steps.append(Step(stage, stage, ENTRIES[stage]))
        steps += _evaluations(document, "base" if stage == "herd" else stage)
    for stage in document.aside:
        steps += [Step(stage, stage, ENTRIES[stage])] if document.has(stage) else []
    for arm in document.arms:
        steps.append(Step(arm, arm, ENTRIES[ARMS[arm].stage], ("--as", arm)))
        steps += _evaluations(document, arm)
    return steps


def folders_from(start: str, arms: Sequence[str] = ()) -> tuple[str, ...]:
    """Folders of the trail from `start` on, whether a recipe turns them on or not.

    Example:
        folders_from("rl") → ("rl", "dpo");  folders_from("evaluate") → every evaluation's;
        folders_from("targets", ["taught"]) → ("targets", "taught"), for nothing else reads them

    Args:
        arms: those that the recipe wants.
    """
    if start == "evaluate":
        return tuple(f"{place}/evaluation" for place in PLACES)
    if start in ARMS:
        return (start,)
    if readers := tuple(arm for arm in arms if ARMS[arm].reads == start):
        return (start, *readers)
    folders: list[str] = []
    for name in STARTS[STARTS.index(start) : STARTS.index(STAGES[-1]) + 1]:
        folders.append("base/evaluation" if name == "base" else name)
        folders += [arm for arm in ARMS if ARMS[arm].stage == name]
    return tuple(folders)


def start_of(step: Step, changes: Sequence[str]) -> str:
    """The word for `--from` that makes a step again whose settings changed, and what follows it."""
    if step.is_evaluation and (step.stage != "base" or list(changes) == ["evaluate"]):
        return "evaluate"
    return step.stage


def launch_line(
    step: Step, recipe: Path, run: Path, flags: Sequence[str], accelerate: Path | None = None
) -> list[str]:
    """The command of a step, as it is run and printed: it can be typed again as it stands."""
    own = ["-m", step.module, str(recipe), *step.arguments, "--run", str(run), *flags]
    stage = ARMS[step.title].stage if step.title in ARMS else step.title
    if accelerate is not None and stage in LAUNCHED:
        module = ["-m", "accelerate.commands.launch", "--config_file", str(accelerate)]
        return [sys.executable, *module, *own]
    return [sys.executable, *own]


def _evaluations(document: RecipeDocument, where: str) -> list[Step]:
    if not document.has("evaluate") or where not in PLACES:
        return []
    return [Step(f"evaluate {where}", f"{where}/evaluation", EVALUATION, ("--of", where))]
