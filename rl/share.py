"""How many devices the learner should have of those that it and the fleet have together: pure.

    report of a step ─▶ Share.see ─▶ the split to go on with, once another one would pay

The fleet is resized while it works (rl/balance.py). A rank more or less is another group of
processes and so another life, from a cut that is made for it: that costs what a start costs. So it
is done where the planner's split (rl/placement.py) of the same devices makes a sample cheaper by
more than a band, and not before the speeds of the present one are settled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rl.config import RlSection
from rl.placement import plan
from rl.room import Consumer, Devices
from rl.speeds import BAND, WINDOW

_LEARNER, _ROLLOUT = "learner", "rollout"


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds of a sample: of the learner if it had one rank, of one worker.

    Example:
        Costs(learner=0.12, rollout=0.04)
    """

    learner: float
    rollout: float


@dataclass(frozen=True, slots=True)
class Split:
    """Who has what.

    Example:
        Split(ranks=1, workers=3)
    """

    ranks: int
    workers: int

    def seconds(self, costs: Costs, *, overlaps: bool) -> float:
        """Of a sample, side by side or in turns."""
        paces = costs.learner / self.ranks, costs.rollout / self.workers
        return (max if overlaps else sum)(paces)

    def applied(self, section: RlSection) -> RlSection:
        """The recipe's section for a life with this split; the fleet keeps to what is left."""
        learner = section.learner.model_copy(update={"num_ranks": self.ranks})
        left = (_devices(section) - self.ranks) // section.engine.tensor_parallel
        most = max(min(left, section.fleet.most_workers), self.workers)
        fleet = {"num_workers": self.workers, "max_workers": most}
        return section.model_copy(
            update={"learner": learner, "fleet": section.fleet.model_copy(update=fleet)}
        )


def best_split(now: Split, costs: Costs, section: RlSection) -> Split:
    """The planner's split of the recipe's devices; the present one unless that pays.

    Example:
        recipe: 1 rank and 3 workers at most; 1 of each works, costs 0.12 and 0.04
        → 3 ranks and 1 worker, 0.04 s a sample instead of 0.12
    """
    overlaps, width = section.max_staleness > 0, section.engine.tensor_parallel
    fleet, learner = section.fleet, section.learner
    placement = plan(
        Devices((_devices(section),)),
        [
            Consumer(_LEARNER, costs.learner, least=learner.min_ranks, most=learner.max_ranks),
            Consumer(
                _ROLLOUT,
                costs.rollout * width,
                width,
                least=fleet.min_workers,
                most=fleet.most_workers,
            ),
        ],
        overlaps=overlaps,
    )
    found = Split(placement.devices[_LEARNER], placement.devices[_ROLLOUT] // width)
    share = found.seconds(costs, overlaps=overlaps) / now.seconds(costs, overlaps=overlaps)
    return found if share < 1 - BAND else now


class Share:
    """Follows a life's reports.

    Example:
        Share(recipe, ranks=1).see(10, {"learner_seconds_per_sample": 0.12, …}) → Split(3, 1)

    Args:
        section: the recipe's, whatever this life has of it.
        ranks: of this life.
    """

    def __init__(self, section: RlSection, ranks: int) -> None:
        self._section, self._ranks, self._seen = section, ranks, 0

    def see(self, step: int, numbers: Mapping[str, float]) -> Split | None:
        """A step's numbers; returns another split than the present one at a cut's step, or None."""
        learner, rollout = (numbers.get(f"{n}_seconds_per_sample") for n in (_LEARNER, _ROLLOUT))
        if self._section.learner.max_ranks is None or not learner or not rollout:
            return None
        self._seen += 1
        if self._seen <= WINDOW // 2 or step % self._section.checkpoint_every:
            return None
        now = Split(self._ranks, max(round(numbers["workers"]), 1))
        split = best_split(now, Costs(learner * self._ranks, rollout), self._section)
        return split if split.ranks != now.ranks and step < self._section.steps else None


def _devices(section: RlSection) -> int:
    """All that the recipe gives to both: a rank's device is as good as a worker's."""
    workers = section.fleet.most_workers * section.engine.tensor_parallel
    return section.learner.num_ranks + workers
