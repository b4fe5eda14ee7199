"""What sampling while training buys, and how close the loop comes to the best schedule there is.

    python -m benchmarks.overlap            all tables       --quick: one real seed, 8 workers

Real: the `rl` stage on the tiny herd's student, the same steps once synchronous, with both cores
for whichever side is working, and once asynchronous with a core for each side. Simulated: the real
controller, books, ledger and fleet on a virtual clock with skewed lengths (lognormal), against a
lower bound that knows every duration; a share of it is a share of any schedule.
"""

from __future__ import annotations

import json
import math
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from benchmarks.harness import ROOT, Figure, Report, run_benchmark
from benchmarks.processes import EARLY
from ground.errors import InfraError
from ground.metrics import read_metrics
from rl.config import RlSection
from rl.simulate import Durations, make_pool, make_section, run_steps

SEEDS = (0, 1, 2)
_SKEW = 1.0
"""Sigma of the lognormal lengths: the longest of 64 takes about ten times the median."""
_STEPS, WARM_UP = 15, 3


def simulated(workers: int, staleness: int, seed: int, steps: int) -> tuple[float, float]:
    """Virtual seconds of a run, and the lower bound for it."""
    section = make_section(
        steps=steps,
        groups_per_step=8 * workers,
        group_size=8,
        workers=workers,
        slots=64,
        staleness=staleness,
    )

    def seconds(sample: int) -> float:
        return random.Random(sample).lognormvariate(0.0, _SKEW)

    # Balanced: the learner takes as long for a step as the fleet for its rollouts.
    train = 8 * workers * 8 * math.exp(_SKEW**2 / 2) / (workers * 64)
    durations = Durations(seconds, lambda plan: train)
    played = run_steps(section, make_pool(4000), durations, seed=seed)
    return played.seconds, lower_bound(section, played.work, lambda step: train)


def lower_bound(
    section: RlSection, work: dict[int, list[list[float]]], train: Callable[[int], float]
) -> float:
    """Seconds before which no schedule can end that keeps the bound on staleness.

    Even one that knows all durations: the slots of step u open with version u - S, its longest
    rollout takes what it takes, all rollouts of the steps up to u must fit into the places of the
    fleet, and steps follow one another.
    """
    places = section.engine.num_slots * section.fleet.num_workers
    published, done = [0.0], 0.0
    for step in range(section.steps):
        opened = published[max(0, step - section.max_staleness)]
        groups = work[step]
        done += sum(map(sum, groups))
        ready = max(opened + max(max(group) for group in groups), done / places)
        published.append(max(published[-1], ready) + train(step))
    return published[-1]


def real(mode: str, seed: int) -> float:
    """Seconds of a step of the stage, warm-up left out."""
    threads, staleness = (2, 0) if mode == "sync" else (1, 1)
    records = stage_metrics(seed, _STEPS, staleness=staleness, threads=threads)
    return statistics.fmean(float(str(record["seconds"])) for record in records[WARM_UP:])


def stage_metrics(
    seed: int, steps: int, *, staleness: int, threads: int
) -> list[dict[str, object]]:
    """A line per step of the real stage on this machine."""
    with tempfile.TemporaryDirectory() as folder:
        recipe = _write_recipe(Path(folder), steps, staleness=staleness, threads=threads)
        run = Path(folder) / "run"
        line = [sys.executable, "-m", "rl.train", str(recipe), f"seed={seed}", "--run", str(run)]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        done = subprocess.run(
            line, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900
        )
        if done.returncode:
            raise InfraError("the run must end well", why=done.stderr[-2000:])
        return [r for r in read_metrics(run / "rl" / "metrics.jsonl") if "seconds" in r]


def _write_recipe(folder: Path, steps: int, *, staleness: int, threads: int) -> Path:
    rows = [
        {
            "messages": [{"role": "user", "content": f"letters {number}"}],
            "capability": "letters",
            "reward": "early",
            "answer": "",
        }
        for number in range(256)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(EARLY)
    recipe = {
        "name": "overlap",
        "model": {"path": str(ROOT / "recipes" / "tiny" / "herd" / "student")},
        "data": {"prompts": "prompts.jsonl"},
        "rewards": ["rewards.py"],
        "rl": {
            "steps": steps,
            "groups_per_step": 32,
            "group_size": 8,
            "max_refills": 0,
            "max_staleness": staleness,
            "threads": threads,
            "sampling": {"max_new_tokens": 96},
            "engine": {"num_slots": 64, "max_length": 256, "threads": threads},
            "optimizer": {"learning_rate": 1e-6},
            "validation": {"prompts": 0},
            "checkpoint_every": 1000,
        },
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def measure(quick: bool) -> Report:
    """Both tables; a quick run has fewer seeds and fewer workers, each run as long as ever."""
    seeds = SEEDS[:1] if quick else SEEDS
    ratios = [real("sync", seed) / real("async", seed) for seed in seeds]
    figures = [Figure("real: sync / async", statistics.fmean(ratios), "x", tolerance=0.3)]
    table = []
    for workers in (1, 8) if quick else (1, 8, 64, 256):
        for staleness in (0, 1, 2, 4):
            length = 20 if workers <= 64 else 10
            runs = [simulated(workers, staleness, seed, length) for seed in SEEDS]
            shares = [bound / seconds for seconds, bound in runs]
            share, seconds = statistics.fmean(shares), statistics.fmean(run[0] for run in runs)
            row = {"workers": workers, "staleness": staleness, "seconds": seconds, "share": share}
            table.append(row)
    sync = {row["workers"]: row["seconds"] for row in table if row["staleness"] == 0}
    for row in table:
        row["speed"] = sync[row["workers"]] / row["seconds"]
        name = f"simulated: {row['workers']} workers, staleness {row['staleness']}"
        goal = 0.95 if row["staleness"] else None
        figures.append(Figure(f"{name}, of the bound", row["share"], goal=goal, tolerance=0.03))
        figures.append(Figure(f"{name}, sync / this", row["speed"], "x", tolerance=0.2))
    return Report(figures, {"skew": _SKEW, "real_ratios": ratios, "simulated": table})


if __name__ == "__main__":
    sys.exit(run_benchmark("overlap", measure, seeds=SEEDS))
