"""`packtrain validate`: everything about a recipe that can be checked without running it."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ground.config import Head
from ground.console import say
from ground.errors import RecipeError
from ground.recipe import RecipeDocument, load_recipe
from ground.trail import made_twice
from packtrain.recipe import Recipe, read_recipe
from packtrain.steps import steps_of
from rollout.bundle import need_of
from rollout.config import EngineSection
from rollout.installed import require_engine
from rollout.places import require_room

NEEDS = {
    "prune": ("teacher.path", "data.sft"),
    "targets": ("teacher.path", "model.path", "data.sft"),
    "sft": ("model.path", "data.sft"),
    "mine": ("model.path", "data.prompts"),
    "rl": ("model.path", "data.prompts"),
    "dpo": ("model.path",),
    "evaluate": ("model.path", "data.heldout"),
}
"""Section → what must be given when no `herd` makes it."""
MODELS = ("model.path", "teacher.path", "judge.model.path")


def command(arguments: argparse.Namespace) -> int:
    """Check a recipe and say what it would do."""
    document = load_recipe(arguments.recipe, arguments.overrides)
    recipe = read_recipe(document)
    steps = steps_of(document)
    check_inputs(document, recipe)
    titles = " → ".join(step.title for step in steps)
    say(f"{document.shown}: valid; run '{recipe.name}' has {len(steps)} steps: {titles}")
    return 0


def check_inputs(document: RecipeDocument, recipe: Recipe) -> None:
    """Every path that a stage will read is named and exists, and no stage lacks what it needs.

    Raises:
        RecipeError: naming all that is wrong at once.
        SetupError: an engine's library is not installed.
    """
    require_engines(recipe)
    require_files(document, recipe)


def check_runnable(document: RecipeDocument, recipe: Recipe) -> None:
    """The same, and it can be run here and now.

    Raises:
        RecipeError, SetupError: see `check_inputs`.
        PlacementError: this machine has not what replicas take of it.
    """
    check_inputs(document, recipe)
    require_processors(recipe)


def require_engines(recipe: Recipe) -> None:
    """What the engines of all stages need is installed.

    Raises:
        SetupError: an engine's library is not.
    """
    for key, engine in _engines(recipe).items():
        require_engine(engine.kind, f"{key}.kind")
    if recipe.judge:
        require_engine(recipe.judge.kind, "judge.kind")


def require_processors(recipe: Recipe) -> None:
    """This machine has what the replicas of each stage take of it, where they are to run here.

    Raises:
        PlacementError: it has not, with want and have.
    """
    from rollout.processes import cluster_address  # it brings psutil along

    if cluster_address():
        return
    stages = {"prune": recipe.prune, "mine": recipe.mine, "evaluate": recipe.evaluate}
    for name, section in stages.items():
        if section and section.replicas:
            need = need_of(section, name)
            have = os.cpu_count() or 1
            require_room(need.processors, have, "processors", where=name, fix=need.fix)


def require_files(document: RecipeDocument, recipe: Recipe) -> None:
    """Every path that a stage will read is named and exists, and no stage lacks what it needs.

    Raises:
        RecipeError: naming all that is wrong at once.
    """
    given = _given(recipe)
    problems = [
        f"{key} names {path}, which does not exist"
        for key, path in given.items()
        if path is not None and not path.exists()
    ]
    problems += [
        f"{key} names {path}, which must be a folder with config.json in it"
        for key, path in given.items()
        if key in MODELS and path is not None and path.exists()
        if not (path / "config.json").is_file()
    ]
    problems += [
        f"rewards names {path}, which is not a file"
        for path in recipe.rewards
        if not path.is_file()
    ]
    problems += made_twice(recipe, document.stages)
    if not document.has("herd"):
        problems += _absent(document, given)
    problems += _useless(recipe)
    if problems:
        raise RecipeError("\n  ".join(problems), where=document.shown)


def _engines(recipe: Recipe) -> dict[str, EngineSection]:
    """The engine of each stage that has one, by its key."""
    stages = {
        "prune": recipe.prune,
        "mine": recipe.mine,
        "rl": recipe.rl,
        "evaluate": recipe.evaluate,
    }
    return {f"{name}.engine": stage.engine for name, stage in stages.items() if stage}


def _given(head: Head) -> dict[str, Path | None]:
    """The recipe's own paths by their keys."""
    return {
        "model.path": head.model.path if head.model else None,
        "teacher.path": head.teacher.path if head.teacher else None,
        "judge.model.path": head.judge.model.path if head.judge and head.judge.model else None,
        "data.sft": head.data.sft,
        "data.prompts": head.data.prompts,
        "data.heldout": head.data.heldout,
    }


def _useless(recipe: Recipe) -> list[str]:
    """Stages that could only fail, or do nothing, once those before them are through."""
    problems = _useless_distillation(recipe)
    if recipe.rl and recipe.rl.distill and not recipe.herd and recipe.teacher is None:
        problems.append("rl.distill needs teacher.path")
    if recipe.dpo and not recipe.rl:
        problems.append("dpo needs rl: its pairs are mined from the groups that rl sampled")
    if recipe.herd and recipe.rl and recipe.rl.validation.prompts >= recipe.herd.num_prompts:
        problems.append(
            f"rl.validation.prompts must be below the {recipe.herd.num_prompts} prompts that "
            f"herd makes, got {recipe.rl.validation.prompts}"
        )
    return problems


def _useless_distillation(recipe: Recipe) -> list[str]:
    sft, targets = recipe.sft, recipe.targets
    if sft is None or sft.distill is None:
        return ["targets needs sft.distill: nothing else reads what it stores"] if targets else []
    if targets is None:
        return ["sft.distill needs targets: the teacher's word is read from its store"]
    problems = []
    if targets.max_length < sft.max_length:
        problems.append(
            f"targets.max_length must be at least sft.max_length ({sft.max_length}), "
            f"got {targets.max_length}"
        )
    if targets.format == "sampled" and sft.distill.divergence != "forward":
        problems.append(
            f"sft.distill.divergence '{sft.distill.divergence}' cannot be computed from sampled "
            "targets: set targets.format to topk_tail, or the divergence to forward"
        )
    return problems


def _absent(document: RecipeDocument, given: dict[str, Path | None]) -> list[str]:
    """Inputs that are needed and neither named nor made."""
    wanted: dict[str, list[str]] = {}
    for section, keys in NEEDS.items():
        for key in keys if document.has(section) else ():
            wanted.setdefault(key, []).append(section)
    return [
        f"{', '.join(sections)} needs {key}"
        for key, sections in wanted.items()
        if given[key] is None
    ]
