"""How many devices the learner should have of those that it and the fleet have together: pure.

    report of a step ─▶ Share.see ─▶ advice: (ranks, workers), once it would pay

The fleet is resized while it works (rl/balance.py); a rank more or less is another group of
processes, so it is a new life, from a cut. That costs what a start costs, so it is done where the
planner's split (rl/placement.py) of the same devices would make a step shorter by more than a band,
and not before the speeds of the split that there is are settled.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from rl.config import RlSection
from rl.placement import plan
from rl.room import Consumer, Devices
from rl.speeds import BAND, WINDOW

_LEARNER, _ROLLOUT = "learner", "rollout"


@dataclass(frozen=True, slots=True)
class Split:
    """Who has what.

    Example:
        Split(ranks=1, workers=3)
    """

    ranks: int
    workers: int

    def seconds(self, costs: Costs, *, overlaps: bool) -> float:
        """Seconds per sample, side by side or in turns."""
        paces = costs.learner / self.ranks, costs.rollout / self.workers
        return (max if overlaps else sum)(paces)


@dataclass(frozen=True, slots=True)
class Costs:
    """Of a sample: seconds of one rank alone and of one worker alone.

    Example:
        Costs(learner=0.12, rollout=0.04)
    """

    learner: float
    rollout: float


def best_split(now: Split, costs: Costs, section: RlSection) -> Split:
    """The planner's split of the devices that both have now; the present one unless that pays.

    Example:
        1 rank and 3 workers, costs 0.12 and 0.04 → 3 ranks and 1 worker: 0.04 s instead of 0.12
    """
    overlaps, learner = section.max_staleness > 0, section.learner
    width = section.engine.tensor_parallel
    placement = plan(
        Devices((now.ranks + now.workers * width,)),
        [
            Consumer(_LEARNER, costs.learner, least=learner.least_ranks, most=learner.most_ranks),
            Consumer(
                _ROLLOUT,
                costs.rollout * width,
                width=width,
                least=section.fleet.min_workers,
                most=section.fleet.most_workers,
            ),
        ],
        overlaps=overlaps,
    )
    found = Split(placement.devices[_LEARNER], placement.devices[_ROLLOUT] // width)
    gain = found.seconds(costs, overlaps=overlaps) / now.seconds(costs, overlaps=overlaps)
    return found if gain < 1 - BAND else now


class Share:
    """Follows the reports of a life and says when another number of ranks would pay.

    Example:
        share = Share(job.section);  share.see(report.step, report.numbers) → Split(2, 1), or None
    """

    def __init__(self, section: RlSection) -> None:
        self._section, self._settled = section, 0

    def see(self, step: int, numbers: Mapping[str, float]) -> Split | None:
        """A step's numbers; returns the split to go on with from the cut that this step makes."""
        if "learner_seconds_per_sample" not in numbers:
            return None
        self._settled += 1
        if self._settled <= WINDOW // 2 or step % self._section.checkpoint_every:
            return None
        now = Split(self._section.learner.num_ranks, round(numbers["workers"]))
        learner, rollout = (numbers[f"{name}_seconds_per_sample"] for name in (_LEARNER, _ROLLOUT))
        if not now.workers or not (learner > 0 and rollout > 0 and math.isfinite(rollout)):
            return None
        split = best_split(now, Costs(learner * now.ranks, rollout), self._section)
        return split if split.ranks != now.ranks else None
