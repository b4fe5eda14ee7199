"""Does the share of the soft target that `aligned` finds beat every fixed one?

    python -m benchmarks.distill_worlds            eight worlds, all seeds      --quick: one seed

In each world (benchmarks/toy_worlds.py: teacher wrong where it is sure, good, wrong where it is
unsure, over-smoothed; many epochs over few tokens, or new tokens in every step) students are
trained side by side, from the same start on the same batches, one for each of

    aligned, schedule, entropy       the product's rules as they stand
    fixed shares in GRID             the same for both domains
    best pair by the truth           each domain's best share in GRID, which nobody can know
    best pair by held-out            each domain's best by the held-out tokens, after a whole sweep

The pairs are trained anew with their two shares. What is measured is KL(truth || student), mean
over all contexts of both domains.

The rule was developed on the seeds below 100 and frozen; SEEDS were drawn afterwards and used once.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from statistics import mean, stdev

import torch
from torch import Tensor

from benchmarks.harness import Figure, Report, run_benchmark
from benchmarks.toy_worlds import DOMAINS, KINDS, REGIMES, VOCABULARY, World, train
from distill.config import AlignedShare, EntropyShare, ScheduleShare
from distill.signal import Gains
from distill.weighting import HeldoutWeighting, weighting_of

GRID = (0.0, 0.25, 0.5, 0.75, 0.9, 1.0)
LEARNED = ("aligned", "schedule", "entropy")
SEEDS = (6393, 29299, 62595, 84588, 99158)
STEPS, EARLY = 400, 100


class FixedPair:
    """A fixed share for each domain."""

    observe_every = 0

    def __init__(self, shares: Sequence[float]) -> None:
        self.shares: Mapping[str, float] = dict(zip(DOMAINS, shares, strict=True))

    def weights(
        self, step: int, capability_B: Sequence[str], entropy_BT: Tensor, supported_BT: Tensor
    ) -> Tensor:
        shares_B = torch.tensor([self.shares[name] for name in capability_B])
        return shares_B[:, None] * supported_BT

    def observe(self, step: int, capability: str, gains: Gains, entropy_N: Tensor) -> None:
        """Nothing is learned."""

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """There is no state."""


@dataclass(frozen=True, slots=True)
class Found:
    """What came of a world with one seed: KL to the truth by way of weighing.

    Example:
        Found({"aligned": 0.21, "fixed 0.75": 0.24, …}, early=[{"first": 0.9, …}])
    """

    distances: Mapping[str, float]
    early: Mapping[str, float]
    """Shares of `aligned` after 100 steps, by domain."""


def play(kind: str, regime: str, seed: int) -> Found:
    """All students of a world; then the two pairs that its fixed shares point to."""
    world = World.draw(kind, regime, seed)
    rules = [*_learned(), *(FixedPair((share, share)) for share in GRID)]
    outcome = train(world, rules, seed, STEPS)
    ways = [*LEARNED, *(f"fixed {share:g}" for share in GRID)]
    sweep = slice(len(LEARNED), None)
    pairs = [_best(outcome.distance_S2[sweep]), _best(outcome.heldout_S2[sweep])]
    again = train(world, [FixedPair(pair) for pair in pairs], seed, STEPS)
    distances = torch.cat([outcome.distance_S2, again.distance_S2]).mean(-1).tolist()
    ways += ["best pair by the truth", "best pair by held-out"]
    return Found(dict(zip(ways, distances, strict=True)), outcome.shares[EARLY][0])


def drive(kind: str, regime: str, seed: int) -> list[float]:
    """Shares of `aligned` after 100 of the run's steps, by domain."""
    found = train(World.draw(kind, regime, seed), _learned()[:1], seed, STEPS, stop=EARLY)
    return list(found.shares[EARLY][0].values())


def _learned() -> list[HeldoutWeighting]:
    sections = (AlignedShare(), ScheduleShare(kind="schedule"), EntropyShare(kind="entropy"))
    return [weighting_of(section, num_steps=STEPS, vocab_size=VOCABULARY) for section in sections]


def _best(losses_G2: Tensor) -> list[float]:
    """The share of GRID with the lowest loss, for each domain."""
    return [GRID[place] for place in losses_G2.argmin(0).tolist()]


def measure(quick: bool) -> Report:
    """Every world with every seed; figures of the means over the seeds."""
    seeds = SEEDS[:1] if quick else SEEDS
    names = list(product(KINDS, REGIMES))
    orders = [(*name, seed) for name in names for seed in seeds]
    drives = [("random", regime, seed) for regime in REGIMES for seed in seeds]
    with ProcessPoolExecutor(2, get_context("spawn"), torch.set_num_threads, (1,)) as pool:
        driven = [share for each in pool.map(drive, *zip(*drives, strict=True)) for share in each]
        found = list(pool.map(play, *zip(*orders, strict=True)))
    count = len(seeds)
    worlds = {
        f"{kind}, {regime}": found[index * count : (index + 1) * count]
        for index, (kind, regime) in enumerate(names)
    }
    return Report([*_figures(worlds), *_drive(worlds, driven)], {"worlds": _table(worlds)})


def _figures(worlds: Mapping[str, Sequence[Found]]) -> list[Figure]:
    means = {name: _means(found) for name, found in worlds.items()}
    ways = list(next(iter(means.values())))
    overall = {way: mean(of[way] for of in means.values()) for way in ways}
    fixed = [f"fixed {share:g}" for share in GRID]
    ratios = {name: of["aligned"] / min(of[way] for way in fixed) for name, of in means.items()}
    figures = [
        Figure("mean KL", overall["aligned"], "nats", tolerance=0.2, better="lower"),
        Figure(
            "mean KL over best fixed share",
            overall["aligned"] / min(overall[way] for way in fixed),
            goal=1.0,
            better="lower",
            tolerance=0.1,
        ),
        Figure("worlds won over their best fixed share", _below_one(ratios), "of 8", goal=4),
        Figure(
            "worst ratio to a world's best fixed share",
            max(ratios.values()),
            goal=1.25,
            better="lower",
            tolerance=0.2,
        ),
    ]
    for rival in ways:
        if rival != "aligned":
            figures += _against(rival, worlds)
    return figures


def _against(rival: str, worlds: Mapping[str, Sequence[Found]]) -> list[Figure]:
    """Geometric mean of the ratios over all worlds and seeds, and its interval of 95 %."""
    logs = [
        math.log(found.distances["aligned"] / found.distances[rival])
        for runs in worlds.values()
        for found in runs
    ]
    half = 1.96 * stdev(logs) / math.sqrt(len(logs))
    return [
        Figure(f"ratio to {rival}", math.exp(mean(logs)), better="lower"),
        Figure(f"ratio to {rival}, upper end", math.exp(mean(logs) + half), better="lower"),
    ]


def _drive(worlds: Mapping[str, Sequence[Found]], driven: Sequence[float]) -> list[Figure]:
    """Where a teacher that is good, and one that is random, have driven the shares early."""
    good = [
        share
        for name, runs in worlds.items()
        if name.startswith("good")
        for found in runs
        for share in found.early.values()
    ]
    return [
        Figure("lowest share of a good teacher at step 100", min(good), goal=0.85),
        Figure("mean share of a good teacher at step 100", mean(good), tolerance=0.1),
        Figure(
            "highest share of a random one at step 100",
            max(driven),
            goal=0.1,
            better="lower",
            tolerance=0.1,
        ),
    ]


def _means(found: Sequence[Found]) -> dict[str, float]:
    return {way: mean(each.distances[way] for each in found) for way in found[0].distances}


def _below_one(ratios: Mapping[str, float]) -> int:
    return sum(ratio < 1 for ratio in ratios.values())


def _table(worlds: Mapping[str, Sequence[Found]]) -> dict[str, object]:
    return {
        name: {
            "mean": {way: round(value, 4) for way, value in _means(found).items()},
            "aligned by seed": [round(each.distances["aligned"], 4) for each in found],
            "shares at step 100": [
                {domain: round(share, 3) for domain, share in each.early.items()} for each in found
            ],
        }
        for name, found in worlds.items()
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(run_benchmark("distill_worlds", measure, seeds=SEEDS))
