"""What the teacher's word buys in RL: reward against wall-clock, with and without the term.

    python -m benchmarks.rl_distill            three paired seeds      --quick: one seed, few steps

The `rl` stage on the tiny herd, the same prompts and seeds for each arm: rewards alone, the term at
a fixed weight, and `aligned`. Student and teacher are the herd's. All arms have the same machine;
the teacher is a process more on it, so an arm with one has slower steps, and is compared with the
others at equal time as well as at equal steps. Rewards are those of the prompts that each run chose
to draw, which are harder the better it is; so the models at the end also answer held-out prompts.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import Figure, Report, run_benchmark
from benchmarks.processes import stage
from ground.metrics import read_metrics

SEEDS = (0, 1, 2)
ARMS: Mapping[str, object] = {
    "rewards alone": None,
    "static 0.3": {"kind": "static", "share": 0.3},
    "aligned": {"kind": "aligned"},
}
_STEPS, _QUICK_STEPS = 30, 4
_WINDOW = 5
"""Steps whose mean reward is what a run has come to."""


@dataclass(frozen=True, slots=True)
class Curve:
    """A run's reward by the clock.

    Example:
        Curve(seconds=(3.1, 6.0), rewards=(0.41, 0.47), weights={"logic": 0.35}, heldout=0.8)
    """

    seconds: tuple[float, ...]
    """Since the first step began, at the end of each."""
    rewards: tuple[float, ...]
    """Mean over the answers that each step's slots cost."""
    weights: Mapping[str, float]
    """Of the soft term in the last step, by capability."""
    heldout: float
    """pass@1 of the last model on held-out prompts."""

    def reward_at(self, seconds: float) -> float:
        """Mean of the last steps that were through by then."""
        through = [r for s, r in zip(self.seconds, self.rewards, strict=True) if s <= seconds]
        return statistics.fmean(through[-_WINDOW:] or self.rewards[:1])


def run(seed: int, arm: str, steps: int) -> Curve:
    """One run of the stage."""
    with tempfile.TemporaryDirectory() as folder:
        recipe, directory = Path(folder) / "recipe.yaml", Path(folder) / "run"
        recipe.write_text(json.dumps(_recipe(seed, ARMS[arm], steps)))
        stage("ground.herd.train", recipe, directory)
        stage("rl.train", recipe, directory)
        stage("rollout.evaluate", recipe, directory, "--of", "rl")
        evaluation = directory / "rl" / "evaluation" / "evaluation.json"
        heldout = float(json.loads(evaluation.read_text())["pass@1"]["mean"])
        records = read_metrics(directory / "rl" / "metrics.jsonl")
        lines = [record for record in records if "reward" in record]
    seconds, total = list[float](), 0.0
    for line in lines:
        total += float(str(line["seconds"]))
        seconds.append(total)
    prefix = "distill_weight/"
    weights = {
        name.removeprefix(prefix): float(str(value))
        for name, value in (lines[-1].items() if lines else ())
        if name.startswith(prefix)
    }
    rewards = tuple(float(str(line["reward"])) for line in lines)
    return Curve(tuple(seconds), rewards, weights, heldout)


def measure(quick: bool) -> Report:
    """The curves of all arms; differences are paired by seed."""
    seeds, steps = (SEEDS[:1], _QUICK_STEPS) if quick else (SEEDS, _STEPS)
    arms = ("rewards alone", "aligned") if quick else tuple(ARMS)
    curves: dict[str, list[Curve]] = {arm: [] for arm in arms}
    for seed in seeds:
        for arm in arms:  # in turns: whatever the machine does meanwhile, it does to all
            curves[arm].append(run(seed, arm, steps))
    plain = curves["rewards alone"]
    figures = []
    for arm, own in curves.items():
        figures.append(Figure(f"{arm}: held-out pass@1", _mean([each.heldout for each in own])))
        figures.append(Figure(f"{arm}: reward of the last steps", _mean(_last(own))))
        seconds = [curve.seconds[-1] / steps for curve in own]
        figures.append(Figure(f"{arm}: seconds a step", _mean(seconds), "s", better="lower"))
        if arm == "rewards alone":
            continue
        further = [a.heldout - b.heldout for a, b in zip(own, plain, strict=True)]
        figures.append(Figure(f"{arm} - rewards alone, held-out pass@1", _mean(further)))
        figures.append(Figure(f"{arm} - rewards alone, held-out, least", min(further)))
        figures.append(Figure(f"{arm} - rewards alone, held-out, most", max(further)))
        gains = [a - b for a, b in zip(_last(own), _last(plain), strict=True)]
        figures.append(Figure(f"{arm} - rewards alone, at equal steps", _mean(gains)))
        pairs = zip(own, plain, strict=True)
        ends = [(a, b, min(a.seconds[-1], b.seconds[-1])) for a, b in pairs]
        timed = [a.reward_at(end) - b.reward_at(end) for a, b, end in ends]
        figures.append(Figure(f"{arm} - rewards alone, at equal time", _mean(timed)))
    details = {
        arm: [
            {
                "seconds": list(c.seconds),
                "rewards": list(c.rewards),
                "weights": dict(c.weights),
                "held-out pass@1": c.heldout,
            }
            for c in own
        ]
        for arm, own in curves.items()
    }
    return Report(figures, {"steps": steps, "curves": details})


def _recipe(seed: int, weighting: object, steps: int) -> dict[str, object]:
    rl: dict[str, object] = {
        "steps": steps,
        "groups_per_step": 32,
        "group_size": 8,
        "max_staleness": 1,
        "sampling": {"max_new_tokens": 64},
        "engine": {"num_slots": 64, "max_length": 256},
        "fleet": {"cpus_per_worker": 0.5},
        "optimizer": {"learning_rate": 4e-4, "warmup_steps": 3},
        "validation": {"prompts": 0},
        "checkpoint_every": 1000,
        "micro_batch_tokens": 2048,
    }
    if weighting is not None:
        rl["distill"] = {"weighting": weighting, "k": 32, "cpus_per_teacher": 0.5}
    herd = {"prompts_per_level": 72, "heldout_per_level": 28}
    evaluate = {
        **{"samples": 8, "k": [1], "max_new_tokens": 64},
        **{"engine": {"num_slots": 256, "max_length": 256, "threads": 2}},
    }
    head = {"name": "rl-distill", "seed": seed, "herd": herd}
    return {**head, "rl": rl, "evaluate": evaluate}


def _last(curves: Sequence[Curve]) -> list[float]:
    return [curve.reward_at(curve.seconds[-1]) for curve in curves]


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


if __name__ == "__main__":
    sys.exit(run_benchmark("rl_distill", measure, seeds=SEEDS))
