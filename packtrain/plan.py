"""`packtrain plan`: what a recipe's RL would do on given devices, before anything is started.

All that is printed is computed from the recipe, the model's config.json and data sheets: neither
torch nor ray is imported, and no model needs to be on this disk.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Iterator
from pathlib import Path

from ground.config import ModelSource
from ground.console import say
from ground.errors import DataError, RecipeError, SetupError
from ground.lora import LoraSection
from ground.recipe import RecipeDocument, load_recipe
from ground.shape import ModelShape, read_shape
from ground.validation import suggest
from packtrain import plan_text
from packtrain.recipe import Recipe, read_recipe
from packtrain.recipes import FOLDER
from packtrain.validate import require_engines, require_files
from rl.config import RlSection
from rl.footprint import require_machine
from rl.forecast import Forecast, Judges, forecast
from rl.hardware import DEVICES, Device
from rl.roofline import Workload, workload_of
from rollout.places import PlacementError

_HERD = FOLDER / "tiny" / "herd"
"""The student and the teacher that `herd` puts into place."""


def command(arguments: argparse.Namespace) -> int:
    """Print the plan.

    Raises:
        PlacementError: the models do not fit, told after all that can be told without.
    """
    document = load_recipe(arguments.recipe, arguments.overrides)
    recipe = read_recipe(document)
    section = _section(document, recipe)
    shape, source = _shape(document, recipe)
    device, count = _devices(arguments.gpu, arguments.gpus)
    load = workload_of(section, arguments.tokens)
    for line in plan_text.model_lines(recipe.name, shape, source):
        say(line)
    for line in plan_text.step_lines(section, load):
        say(line)
    teacher = _teacher(document, recipe) if section.distill else None
    judges = _judges(document, recipe)
    planned = forecast(shape, section, device, count, load=load, teacher=teacher, judges=judges)
    for line in _lines(section, shape, device, count, planned, load):
        say(line)
    if arguments.simulate:
        simulate = importlib.import_module("packtrain.simulate")  # it takes a second to import
        lost = {"skew": arguments.skew, "switch_seconds": arguments.switch}
        others = planned.num_beside
        for line in simulate.simulation_lines(shape, section, device, count - others, load, **lost):
            say(line)
        if others:
            say(f"  teachers and judges are not played; they keep {others:,} of {count:,} devices")
    for line in plan_text.judge_lines(judges, device) if judges else ():
        say(line)
    has_tokens = arguments.tokens is not None
    for line in plan_text.assumption_lines(shape, device, has_tokens, section.lora):
        say(line)
    for line in _refused(document, recipe, shape, device, section.lora):
        say(line)
    return 0


def _lines(
    section: RlSection,
    shape: ModelShape,
    device: Device,
    count: int,
    planned: Forecast,
    load: Workload,
) -> Iterator[str]:
    yield from plan_text.batch_lines(section, planned, load)
    yield from plan_text.placement_lines(section, device, count, planned)
    yield from plan_text.memory_lines(shape, device, planned, section.lora)
    yield from plan_text.time_lines(section, planned)


def _section(document: RecipeDocument, recipe: Recipe) -> RlSection:
    if recipe.rl is None:
        raise RecipeError(
            "a plan is made for the rl stage, and this recipe has none",
            where=document.shown,
            fix="add a section: rl",
        )
    return recipe.rl


def _shape(document: RecipeDocument, recipe: Recipe) -> tuple[ModelShape, str]:
    """The model's own config.json, or the one that stands in for it."""
    return _shape_of("model", recipe.model, _HERD / "student", document)


def _teacher(document: RecipeDocument, recipe: Recipe) -> ModelShape:
    """The same of the teacher."""
    return _shape_of("teacher", recipe.teacher, _HERD / "teacher", document)[0]


def _judges(document: RecipeDocument, recipe: Recipe) -> Judges | None:
    """The judge's shape, which is the teacher's where the recipe names no other."""
    if recipe.judge is None:
        return None
    if recipe.judge.model is None:
        return Judges(_teacher(document, recipe), recipe.judge)
    shape, _ = _shape_of("judge.model", recipe.judge.model, recipe.judge.model.path, document)
    return Judges(shape, recipe.judge)


def _shape_of(
    key: str, model: ModelSource | None, made: Path, document: RecipeDocument
) -> tuple[ModelShape, str]:
    folders = [made] if model is None else [model.path, *([model.shape] if model.shape else [])]
    for folder in folders:
        if (folder / "config.json").is_file():
            return read_shape(folder), os.path.relpath(folder / "config.json")
    raise DataError(
        f"a plan needs the {key}'s config.json, there is none",
        where=document.shown,
        why=f"looked in {', '.join(map(str, folders))}",
        fix=f"copy the {key}'s config.json alone into a folder and name it as {key}.shape",
    )


def _devices(name: str, count: int | None) -> tuple[Device, int]:
    """The devices that were asked for; without a number, this machine's processors."""
    name = name or ("cpu" if count is None else "h100")
    if name not in DEVICES:
        raise RecipeError(
            f"'{name}' is not a device{suggest(name, DEVICES)}",
            fix=f"--gpu is one of {', '.join(DEVICES)}",
        )
    if count is not None and count < 1:
        raise RecipeError(f"--gpus must be at least 1, got {count}", fix="--gpus 8")
    return DEVICES[name], count or os.cpu_count() or 1


def _refused(
    document: RecipeDocument,
    recipe: Recipe,
    shape: ModelShape,
    device: Device,
    lora: LoraSection | None,
) -> Iterator[str]:
    """What stands in the way of this plan on its devices, and of `packtrain run` here and now."""
    try:
        require_machine(shape, device, lora)
    except PlacementError as error:
        yield ""
        yield f"not to be had on machines with {device.name}:"
        yield from (f"  {line}" for line in str(error).splitlines())
    problems = list[str]()
    for check in (lambda: require_engines(recipe), lambda: require_files(document, recipe)):
        try:
            check()
        except (RecipeError, SetupError) as error:
            problems += [line.strip() for line in error.what.splitlines()]
    if problems:
        yield ""
        yield "packtrain run would refuse, on this machine:"
        yield from (f"  {line}" for line in problems)
