"""`packtrain teacher info|fill`: what the teacher's targets of a recipe take, and making them.

`info` reads rows, tokenizers and config.json; the teacher's weights are hashed, not loaded.
"""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Iterator
from pathlib import Path

from distill.config import TargetsSection
from distill.filling import Estimate, estimate, in_bytes
from distill.plan import TargetsPlan, plan_targets
from distill.store import identities
from ground.config import STAGES
from ground.console import say
from ground.errors import RecipeError
from ground.recipe import RecipeDocument, load_recipe
from ground.run import RunDir
from ground.shape import read_shape
from ground.trail import Trail
from packtrain.recipe import read_recipe
from packtrain.steps import ENTRIES, Step, launch_line
from packtrain.validate import require_files

_STAGE = "targets"
_AGAIN = {"unfinished": ["--resume"], "done": ["--overwrite"]}
"""How the stage is made once more: its store stays, so that only what is missing is asked for."""


def command(arguments: argparse.Namespace) -> int:
    """Say what filling takes; with `fill`, have the stage do it and return its exit code.

    Raises:
        RecipeError: `fill` before the stages that choose the rows.
    """
    document = load_recipe(arguments.recipe, arguments.overrides)
    recipe = read_recipe(document)
    require_files(document, recipe)
    section = document.section(_STAGE, TargetsSection)
    run = RunDir(arguments.run or Path("runs") / recipe.name)
    early = _unfinished_before(document, run)
    if early and arguments.action == "fill":
        raise RecipeError(
            f"{early[0]} comes before targets and is not finished: the rows are not known yet",
            where=str(run.path),
            fix="packtrain run RECIPE fills the store in its turn",
        )
    plan = plan_targets(section, Trail(recipe, run, document.stages), recipe.data)
    for line in _lines(plan):
        say(line)
    if early:
        say(f"rows      before {' and '.join(early)}: what they leave may be fewer, or others")
    if arguments.action == "info":
        return 0
    step = Step(_STAGE, _STAGE, ENTRIES[_STAGE])
    flags = [*document.overrides, *_AGAIN.get(run.state(_STAGE), [])]
    return subprocess.run(launch_line(step, document.path, run.path, flags), check=False).returncode


def _unfinished_before(document: RecipeDocument, run: RunDir) -> list[str]:
    """Stages of the recipe that are still to say which rows there are."""
    earlier = STAGES[: STAGES.index(_STAGE)]
    return [stage for stage in earlier if document.has(stage) and not run.is_done(stage)]


def _lines(plan: TargetsPlan) -> Iterator[str]:
    """Size and time, as far as they can be told without the teacher."""
    store = plan.open_store()
    wanted = estimate(store, plan.rows, plan.format, plan.identity.vocabulary)
    yield f"teacher   {plan.identity.teacher}"
    yield f"format    {plan.format}, {wanted.bytes_per_token} bytes a token"
    held = f"{store.num_rows} rows, {store.num_tokens} tokens, {in_bytes(store.num_bytes)}"
    yield f"store     {store.folder}: {held}"
    for other in identities(plan.folder):
        if other.name != plan.identity.name:
            yield f"beside    {other.name}: {other.teacher}, {other.format}"
    yield (
        f"wanted    {wanted.rows} rows, {wanted.missing} of them new: the teacher reads "
        f"{wanted.read_tokens} tokens and speaks to {wanted.missing_tokens}"
    )
    yield f"size      {in_bytes(wanted.num_bytes)} more"
    yield f"time      {_time(plan, store.tokens_per_second, wanted)}"


def _time(plan: TargetsPlan, tokens_per_second: float | None, wanted: Estimate) -> str:
    """From the rate of the last filling, else the work that is to be done."""
    if not wanted.missing:
        return "none: everything is there"
    if tokens_per_second:
        seconds = wanted.read_tokens / tokens_per_second
        return f"{seconds:.3g} s, at the last filling's {tokens_per_second:.3g} tokens a second"
    length = wanted.read_tokens / wanted.missing
    each = read_shape(plan.teacher).flops(length / 2, is_routed=False)
    flops = each * wanted.read_tokens
    return f"{flops:.2g} floating-point operations; `fill` tells the time after its first pass"
