"""How many devices the learner should have of those that it and the fleet have together: pure.

    report of a step ─▶ Share.see ─▶ the split to go on with, once another one would pay

The fleet is resized while it works (rl/balance.py). A rank more or less is another group of
processes and so another life, from a cut that is made for it: that costs what a start costs. So it
is done where another split of the same devices makes a sample cheaper by more than a band, and not
before the speeds of the present one are settled.

The split is the planner's (rl/placement.py, to which tests/test_rl_share.py holds it). With two
sides there are no more splits than ranks, so all are tried, and each by what is known of it: so
many ranks cost together what they did when they were there, or else their part of what one costs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rl.config import RlSection
from rl.speeds import BAND, WINDOW


@dataclass(frozen=True, slots=True)
class Split:
    """Who has what.

    Example:
        Split(ranks=1, workers=3)
    """

    ranks: int
    workers: int

    def applied(self, section: RlSection) -> RlSection:
        """The recipe's section for a life with this split; the fleet shrinks from there."""
        learner = section.learner.model_copy(update={"num_ranks": self.ranks})
        workers = {"num_workers": self.workers, "max_workers": self.workers}
        fleet = section.fleet.model_copy(update=workers)
        return section.model_copy(update={"learner": learner, "fleet": fleet})


def splits(section: RlSection) -> list[Split]:
    """All that the recipe's devices and bounds allow, each with as many workers as are left.

    Example:
        1 rank and at most 3 workers, at most 3 ranks → (1, 3), (2, 2), (3, 1)
    """
    learner, fleet, width = section.learner, section.fleet, section.engine.tensor_parallel
    devices = learner.num_ranks + fleet.most_workers * width
    most = learner.num_ranks if learner.max_ranks is None else learner.max_ranks
    found = [
        Split(ranks, min((devices - ranks) // width, fleet.most_workers))
        for ranks in range(learner.min_ranks, most + 1)
    ]
    return [split for split in found if split.workers >= fleet.min_workers]


def best_split(
    now: Split, learner: Mapping[int, float], rollout: float, section: RlSection
) -> Split:
    """The split with the cheapest sample; the present one unless another is so by more than a band.

    Args:
        learner: seconds of a sample by number of ranks, the present one among them.
        rollout: seconds of a sample if there were one worker.

    Example:
        of (1, 3), (2, 2), (3, 1); now one each, {1: 0.12}, 0.04 → (3, 1): 0.04 instead of 0.12
    """
    alone = learner[now.ranks] * now.ranks

    def seconds(split: Split) -> float:
        paces = learner.get(split.ranks, alone / split.ranks), rollout / split.workers
        return max(paces) if section.max_staleness else sum(paces)

    best = min(splits(section), key=lambda split: (seconds(split), abs(split.ranks - now.ranks)))
    return best if seconds(best) < seconds(now) * (1 - BAND) else now


class Share:
    """Follows the reports of one life after another.

    Example:
        share = Share(recipe)
        share.begin(ranks=1);  share.see(10, {"learner_seconds_per_sample": 0.12, …}) → Split(3, 1)

    Args:
        section: the recipe's, whatever a life has of it.
    """

    def __init__(self, section: RlSection) -> None:
        self._section = section
        self._ranks, self._seen = section.learner.num_ranks, 0
        self._learner: dict[int, float] = {}

    def begin(self, ranks: int) -> None:
        """A life with so many ranks begins."""
        self._ranks, self._seen = ranks, 0

    def see(self, step: int, numbers: Mapping[str, float]) -> Split | None:
        """A step's numbers; returns another split than the present one at a cut's step, or None."""
        learner = numbers.get("learner_seconds_per_sample")
        rollout = numbers.get("rollout_seconds_per_sample")
        if self._section.learner.max_ranks is None or not learner or not rollout:
            return None
        self._seen += 1
        is_last = step == self._section.steps
        if self._seen <= WINDOW // 2 or is_last or step % self._section.checkpoint_every:
            return None
        self._learner[self._ranks] = learner
        now = Split(self._ranks, max(round(numbers["workers"]), 1))
        split = best_split(now, self._learner, rollout, self._section)
        return split if split.ranks != now.ranks else None
