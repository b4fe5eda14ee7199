"""What each stage of the quickstart adds, and whether RL beats more SFT in the same time.

    for each seed:  packtrain run recipes/tiny  →  base, SFT, RL, DPO on the held-out prompts
                    control: the SFT model trained on, on the same rows, for as long as RL took

All four models and the control answer the same held-out prompts 16 times each. Differences are
paired by prompt; intervals are 95 % bootstrap intervals over seeds and prompts. The control's
learning rate is the best of two on the first seed, chosen on the held-out prompts themselves: in
its favour. Seconds are those of the whole recipe, the arm `taught` included, at which nothing here
looks.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import yaml

from benchmarks.harness import Figure, Report, run_benchmark
from benchmarks.processes import RECIPE, stage, trail

SEEDS = (0, 1, 2)
CONTROL_RATES = (2e-4, 6e-4)
BOOTSTRAPS = 2000
QUICK = (
    "evaluate.samples=4",
    "evaluate.k=[1,4]",
    "evaluate.greedy=false",
    "evaluate.max_prompts=300",
)
"""A quick run does the whole of one trail, and only asks its models less often."""


@dataclass(frozen=True, slots=True)
class Model:
    """Solve rates of one model: (seed, prompt id) → share of its 16 answers that passed."""

    rates: Mapping[tuple[int, str], float]
    labels: Mapping[tuple[int, str], str]

    @property
    def mean(self) -> float:
        """pass@1 in percent."""
        return 100 * float(np.mean(list(self.rates.values())))


def measure(quick: bool) -> Report:
    """Three seeds with their controls; with --quick one seed, fewer answers and no control."""
    seeds, rates = (SEEDS[:1], ()) if quick else (SEEDS, CONTROL_RATES)
    parts: dict[str, list[Model]] = {name: [] for name in ("base", "sft", "rl", "dpo", "control")}
    details: dict[str, object] = {}
    seconds: list[float] = []
    for seed in seeds:
        with tempfile.TemporaryDirectory() as folder:
            run = Path(folder) / "run"
            start = time.monotonic()
            trail(RECIPE, run, f"seed={seed}", *(QUICK if quick else ()))
            seconds.append(time.monotonic() - start)
            for name in ("base", "sft", "rl", "dpo"):
                parts[name].append(_evaluated(run / name / "evaluation", seed))
            controls = {rate: _control(run, seed, rate) for rate in rates}
            details[f"seed {seed}"] = _facts(run, {rate: m.mean for rate, m in controls.items()})
            if controls:
                rates = (max(controls, key=lambda rate: controls[rate].mean),)
                parts["control"].append(controls[rates[0]])
    models = {name: _joined(each) for name, each in parts.items() if each}
    gaps = {f"rl over {name}": _difference(models["rl"], models[name]) for name in models}
    by_label = {
        f"rl over sft, {label}": _difference(models["rl"], models["sft"], label)
        for label in ("easy", "medium", "hard")
    }
    details["rl over sft by seed, in points"] = [
        rl.mean - sft.mean for rl, sft in zip(parts["rl"], parts["sft"], strict=True)
    ]
    details["differences in points: mean, low, high"] = gaps | by_label
    return Report(_figures(models, gaps, by_label, max(seconds)), details)


def _figures(
    models: Mapping[str, Model],
    gaps: Mapping[str, Sequence[float]],
    by_label: Mapping[str, Sequence[float]],
    seconds: float,
) -> list[Figure]:
    figures = [Figure(f"pass@1 of {name}", model.mean, "%") for name, model in models.items()]
    for name, goal in (("rl over sft", 15), ("rl over control", 10)):
        if name in gaps:
            mean, low, _ = gaps[name]
            figures.append(Figure(name, mean, "points", goal=goal, tolerance=6))
            figures.append(Figure(f"{name}, low", low, "points"))
    easy, medium, hard = (mean for mean, _, _ in by_label.values())
    return [
        *figures,
        Figure(
            "dpo's cost", gaps["rl over dpo"][0], "points", goal=1, better="lower", tolerance=1.5
        ),
        *(Figure(name, mean, "points") for name, (mean, _, _) in by_label.items()),
        Figure("medium and hard over easy", (medium + hard) / 2 - easy, "points", goal=0.001),
        Figure("seconds of the whole trail", seconds, "s", goal=480, better="lower"),
    ]


def _control(run: Path, seed: int, learning_rate: float) -> Model:
    """Train the SFT model on for RL's wall-clock, start-up included, and evaluate it."""
    recipe = yaml.safe_load((run / "recipe.resolved.yaml").read_text())
    trainer = {
        **recipe["sft"]["trainer"],
        "learning_rate": learning_rate,
        "epochs": 1000,
        "max_seconds": _manifest(run / "rl")["facts"]["seconds"],
        "schedule": "constant",
    }
    control = {
        "name": "control",
        "seed": seed,
        "model": {"path": str(run / "sft" / "model")},
        "data": {
            "sft": str(run / "prune" / "kept.parquet"),
            "heldout": str(run / "herd" / "data" / "heldout.jsonl"),
        },
        "sft": {**recipe["sft"], "trainer": trainer, "distill": None},
        "evaluate": recipe["evaluate"],
    }
    folder = run.parent / f"control-{learning_rate:g}"
    path = run.parent / f"control-{learning_rate:g}.yaml"
    path.write_text(yaml.safe_dump(control))
    stage("sft.train", path, folder)
    stage("rollout.evaluate", path, folder, "--of", "sft")
    return _evaluated(folder / "sft" / "evaluation", seed)


def _evaluated(folder: Path, seed: int) -> Model:
    rows = [row for row in pq.read_table(folder / "prompts.parquet").to_pylist() if row["trials"]]
    return Model(
        {(seed, row["id"]): row["successes"] / row["trials"] for row in rows},
        {(seed, row["id"]): row["label"] for row in rows},
    )


def _joined(models: Sequence[Model]) -> Model:
    return Model(
        {key: rate for model in models for key, rate in model.rates.items()},
        {key: label for model in models for key, label in model.labels.items()},
    )


def _difference(a: Model, b: Model, label: str | None = None) -> list[float]:
    """Mean of a - b in points, and its 95 % bootstrap interval over seeds and prompts.

    Both are drawn again, since all seeds answer the same prompts and share a training run each.
    """
    seeds = sorted({seed for seed, _ in a.rates})
    ids = sorted({id_ for seed, id_ in a.rates if label in (None, a.labels[seed, id_])})
    table = np.array(
        [[100 * (a.rates[seed, id_] - b.rates[seed, id_]) for id_ in ids] for seed in seeds]
    )
    rng = np.random.default_rng(0)
    means = [
        table[rng.integers(len(seeds), size=len(seeds))][
            :, rng.integers(len(ids), size=len(ids))
        ].mean()
        for _ in range(BOOTSTRAPS)
    ]
    low, high = np.quantile(means, (0.025, 0.975))
    return [float(table.mean()), float(low), float(high)]


def _facts(run: Path, controls: Mapping[float, float]) -> dict[str, object]:
    seconds = {
        path.parent.name: round(_manifest(path.parent)["facts"]["seconds"], 1)
        for path in sorted(run.glob("*/manifest.json"))
    }
    evaluations = {
        name: json.loads((run / name / "evaluation" / "evaluation.json").read_text())
        for name in ("base", "sft", "rl", "dpo")
    }
    kept = ("pass@1", "pass@4", "pass@16", "entropy", "mean_tokens", "by_difficulty")
    return {
        "seconds of stages": seconds,
        "evaluations": {
            name: {key: each[key] for key in kept if key in each}
            for name, each in evaluations.items()
        },
        "controls, pass@1 by learning rate": {f"{r:g}": v for r, v in controls.items()},
    }


def _manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


if __name__ == "__main__":
    sys.exit(run_benchmark("trail", measure, seeds=SEEDS))
