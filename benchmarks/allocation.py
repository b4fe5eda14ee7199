"""Whether plan() chooses well, predicts well, and how soon the fleet follows a change of speed.

    python -m benchmarks.allocation       --quick: fewer cases and steps

Split: against brute force over random costs, widths, machines. Prediction: the real `rl` stage on
this machine; the speeds that its first half measured (rl/balance.py) predict the step time of its
second half, and of another run in which learner and fleet take turns. The error is the mean over
seeds of |measured / predicted - 1|, so that too much and too little do not cancel. Both runs have
one worker: a second one would share its core with the learner here, so that the real stage says
nothing about other numbers of workers. Those are predicted on a virtual clock: the speeds of eight
workers for four, on the same groups. Recovery: the real controller
and fleet on a virtual clock, for this machine has no processors to grow into; one side becomes half
as fast in the middle of a run.
"""

from __future__ import annotations

import itertools
import math
import random
import statistics
import sys
from collections.abc import Mapping, Sequence

from benchmarks.harness import Figure, Report, run_benchmark
from benchmarks.overlap import WARM_UP, stage_metrics
from rl.buffer import Plan
from rl.placement import plan
from rl.room import Consumer, Devices, fits
from rl.simulate import Durations, Played, make_pool, make_section, patient, run_steps
from rl.speeds import Speeds

SEEDS = (0, 1, 2)
_CHANGE = 20
"""Step from which one side is half as fast."""


def split_error(cases: int) -> float:
    """By how much the worst of the chosen splits is slower than the best there is."""
    errors = [0.0]
    for case in range(cases):
        chance = random.Random(case)
        devices = Devices(tuple(chance.choice((2, 4, 8)) for _ in range(chance.randint(1, 4))))
        names = ("learner", "rollout", "teacher")[: chance.randint(2, 3)]
        consumers = [
            Consumer(name, chance.lognormvariate(0, 1.5), width=chance.choice((1, 1, 2, 4)))
            for name in names
        ]
        overlaps = chance.random() < 0.5
        best = _best(devices, consumers, overlaps)
        if math.isfinite(best):
            errors.append(plan(devices, consumers, overlaps=overlaps).seconds / best - 1)
    return max(errors)


def _best(devices: Devices, consumers: Sequence[Consumer], overlaps: bool) -> float:
    """The pace of the best split that has seats; infinite where none has."""
    best = math.inf
    ranges = [range(1, devices.count // each.width + 1) for each in consumers]
    for counts in itertools.product(*ranges):
        paces = [c.seconds / (n * c.width) for c, n in zip(consumers, counts, strict=True)]
        pace = max(paces) if overlaps else sum(paces)
        if pace < best and fits(devices, consumers, counts):
            best = pace
    return best


def prediction(seed: int, steps: int) -> dict[str, float]:
    """Measured seconds of a step over predicted ones, side by side and in turns."""
    beside = stage_metrics(seed, steps, staleness=1, threads=1)[WARM_UP:]
    middle = len(beside) // 2
    before = beside[middle - 1]
    measured = _mean(beside[middle:], "seconds")
    predicted = _number(before, "predicted_seconds")
    cost = _number(before, "learner_seconds_per_sample")
    cost += _number(before, "rollout_seconds_per_sample")
    turns = stage_metrics(seed, steps, staleness=0, threads=1)[WARM_UP:]
    in_turns = _mean(turns, "rollouts") * cost + _number(before, "rest_seconds")
    return {
        "beside": measured / predicted,
        "turns": _mean(turns, "seconds") / in_turns,
        "measured_seconds": measured,
        "predicted_seconds": predicted,
        "turns_measured_seconds": _mean(turns, "seconds"),
        "turns_predicted_seconds": in_turns,
    }


def elsewhere(seed: int) -> float:
    """Measured seconds of a step of four workers over what eight workers' speeds predict."""
    eight, four = (
        drift("train", None, groups=64, workers=workers, seed=seed, change=math.inf)
        for workers in (8, 4)
    )
    predicted = _prediction_for(4, eight.gauges[_CHANGE], 64 * 8)
    return four.rates(8, -5).step_seconds / predicted


def _prediction_for(workers: int, gauges: Mapping[str, float], rollouts: int) -> float:
    names = ("learner", "rollout", "reward")
    speeds = Speeds(
        *(gauges[f"{name}_seconds_per_sample"] for name in names), rest=gauges["rest_seconds"]
    )
    return speeds.step_seconds(workers, rollouts)


def _error(ratios: Sequence[float]) -> float:
    """Mean of |measured / predicted - 1|."""
    return statistics.fmean(abs(ratio - 1) for ratio in ratios)


def _number(record: Mapping[str, object], key: str) -> float:
    return float(str(record[key]))


def _mean(records: Sequence[Mapping[str, object]], key: str) -> float:
    return statistics.fmean(_number(record, key) for record in records)


def drift(
    side: str,
    most: int | None,
    *,
    groups: int = 64,
    workers: int = 8,
    seed: int = 0,
    change: float = _CHANGE,
) -> Played:
    """48 steps with skewed answers, in which one side becomes half as fast; balanced at first if
    there are 8 groups for each worker."""
    slow = {"train": 1.0, "decode": 1.0}

    def train(step: Plan) -> float:
        if step.step == change:
            slow[side] = 2.0
        return 8.0 * math.exp(0.5**2 / 2) * slow["train"]

    durations = Durations(
        tokens=lambda sample: random.Random(sample).lognormvariate(0, 0.5),
        train_seconds=train,
        step_seconds=lambda rows: slow["decode"],
    )
    section = make_section(
        steps=48, groups_per_step=groups, group_size=8, workers=workers, slots=8, staleness=2
    )
    return run_steps(patient(section, workers, most), make_pool(2000), durations, seed=seed)


def recovery(side: str, seed: int) -> dict[str, float]:
    """Steps and seconds until the fleet has followed, and the step time then over the best."""
    played, fixed = drift(side, 32, seed=seed), drift(side, None, seed=seed)
    workers = [gauges["workers"] for gauges in played.gauges]
    moved = next(n for n in range(_CHANGE, len(workers)) if workers[n] != workers[_CHANGE])
    before = played.rates(8, _CHANGE - 1).step_seconds
    best = before * (2 if side == "train" else 1)
    return {
        "steps": moved - _CHANGE,
        "seconds": played.marks[moved].now - played.marks[_CHANGE].now,
        "over_best": played.rates(moved + 4, -5).step_seconds / best,
        "fixed_over_best": fixed.rates(moved + 4, -5).step_seconds / best,
        "workers": workers[-1],
    }


def measure(quick: bool) -> Report:
    """All of them."""
    seeds = SEEDS[:1] if quick else SEEDS
    predicted = [prediction(seed, 12 if quick else 24) for seed in seeds]
    others = [elsewhere(seed) for seed in seeds]
    followed = {side: [recovery(side, seed) for seed in seeds] for side in ("decode", "train")}
    figures = [
        Figure("split over the best, worst case", split_error(200 if quick else 1000), goal=0.05,
               better="lower", tolerance=0.05),
        *(
            Figure(
                f"step time, {name}: error of the prediction",
                _error([each[key] for each in predicted]),
                goal=0.15, better="lower", tolerance=0.15,
            )
            for name, key in (("side by side", "beside"), ("in turns", "turns"))
        ),
        Figure("step time, half the workers, simulated: error of the prediction", _error(others),
               goal=0.15, better="lower", tolerance=0.15),
        *(
            Figure(f"{side} half as fast: {name}", statistics.fmean(e[key] for e in each), unit,
                   goal=goal, better="lower", tolerance=2.0)
            for side, each in followed.items()
            for name, key, unit, goal in (
                ("followed after", "steps", "steps", 6.0),
                ("step over the best", "over_best", "x", 1.15),
            )
        ),
    ]  # fmt: skip
    return Report(
        figures, {"predictions": predicted, "half_the_workers": others, "recoveries": followed}
    )


if __name__ == "__main__":
    sys.exit(run_benchmark("allocation", measure, seeds=SEEDS))
