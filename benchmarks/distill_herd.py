"""Does `aligned` hold with real transformers what it does in toy worlds?

    python -m benchmarks.distill_herd            five worlds, nine ways    --quick: one, three

In each world (benchmarks/herd_worlds.py: a herd teacher that guesses at one capability and never
thinks at another) students are trained by the product from the same start on the same rows in the
same order, one for each way to weigh:

    aligned                   the default
    static 0 … 1              CE only, fixed shares, KL only
    schedule, entropy         the other rules

Measured are the loss on new demonstrations, which are right, and pass@1 on new tasks, each the mean
over the capabilities; differences to `aligned` are paired by world, with intervals of 95 %.
Only `aligned` gives rows away, to look at; the others train on all of them.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean, stdev

import torch
from scipy import stats

from benchmarks.harness import Figure, Report, run_benchmark
from benchmarks.herd_worlds import Outcome, Size, World

SHARES = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
WAYS = {
    "aligned": "aligned",
    **{f"static {share:g}": f"{{kind: static, share: {share}}}" for share in SHARES},
    "schedule": "schedule",
    "entropy": "entropy",
}
QUICK_WAYS = ("aligned", "static 0", "static 1")
SEEDS = (1, 2, 3, 4, 5)
SIZE = Size(rows_per_level=20, lessons_per_level=40, tasks_per_level=8, steps=60, samples=4)
QUICK_SIZE = Size(rows_per_level=8, lessons_per_level=12, tasks_per_level=2, steps=12, samples=2)


def measure(quick: bool) -> Report:
    """Every way in every world, two worlds at a time."""
    seeds, size = (SEEDS[:1], QUICK_SIZE) if quick else (SEEDS, SIZE)
    names = QUICK_WAYS if quick else tuple(WAYS)
    with ProcessPoolExecutor(2, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        found = list(pool.map(play, seeds, [size] * len(seeds), [names] * len(seeds)))
    figures: list[Figure] = []
    for name in names:
        outcomes = [world[name] for world in found]
        figures.append(
            Figure(f"loss, {name}", fmean(each.loss for each in outcomes), "nats", better="lower")
        )
        figures.append(Figure(f"pass@1, {name}", fmean(each.pass_at_1 for each in outcomes)))
    for rival in names[1:]:
        pairs = [(world["aligned"], world[rival]) for world in found]
        losses = [other.loss - ours.loss for ours, other in pairs]
        solved = [ours.pass_at_1 - other.pass_at_1 for ours, other in pairs]
        figures += _won("loss", rival, losses, "nats") + _won("pass@1", rival, solved, "")
    return Report(
        figures, {f"seed {seed}": _told(each) for seed, each in zip(seeds, found, strict=True)}
    )


def play(seed: int, size: Size, names: Sequence[str]) -> dict[str, Outcome]:
    """All students of a world, and its teacher."""
    with tempfile.TemporaryDirectory() as folder:
        world = World.make(Path(folder), seed, size)
        found = {name: world.play(name.replace(" ", "-"), WAYS[name]) for name in names}
        taught = world.measured(world.model("teacher"))
        return {**found, f"teacher, poor at {world.poor}, terse at {world.terse}": taught}


def _won(what: str, rival: str, differences: Sequence[float], unit: str) -> list[Figure]:
    """By how much `aligned` is better, and the lower end of the interval (Student's t)."""
    name, count = f"{what} won over {rival}", len(differences)
    goal = 0.0 if count > 1 else None
    figures = [Figure(name, fmean(differences), unit, goal=goal)]
    if count > 1:
        half = stats.t.ppf(0.975, count - 1) * stdev(differences) / math.sqrt(count)
        figures.append(Figure(f"{name}, lower end", fmean(differences) - float(half), unit))
    return figures


def _told(found: Mapping[str, Outcome]) -> dict[str, object]:
    return {
        name: {
            "loss": {key: round(value, 4) for key, value in each.losses.items()},
            "pass@1": {key: round(value, 3) for key, value in each.solved.items()},
        }
        for name, each in found.items()
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(run_benchmark("distill_herd", measure, seeds=SEEDS))
