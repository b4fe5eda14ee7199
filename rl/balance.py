"""How fast learner, rollout and reward are, measured while they work, and what follows from it.

    next plan asked ── waited ──▶ given ── learner works ──▶ next plan asked
                          └ turn(asked, rollouts): Speeds ─▶ wanted() ─▶ fleet.resize

Device-seconds per sample, c, as in rl/placement.py: of the learner the time between two plans in
which it did not wait, of the fleet the time in which its workers were full, of the verifiers their
own. Each is the median of the last five steps: a change shows after three of them, and a single
slow step never does.

The fleet is resized when the two paces are further apart than a dead band, and then at once to
where they meet. Inside the band nothing moves, so it does not swing. What is sampled does not
depend on how many workers there are, and at `max_staleness: 0` nor does what is trained.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from rollout.config import FleetSection
from rollout.fleet import FleetUse

logger = logging.getLogger("packtrain")

WINDOW = 5
"""Steps whose median counts."""
BAND = 0.15
"""Share by which fleet and learner may be apart before the fleet is resized."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """Device-seconds for a sample, a rollout that a step consumes.

    Example:
        Speeds(learner=0.021, rollout=0.035, reward=0.002)
    """

    learner: float
    """Of all learner devices together: the whole learner's seconds."""
    rollout: float
    """Of a worker."""
    reward: float
    """Of a worker's verifiers."""

    def step_seconds(self, workers: int, rollouts: float) -> float:
        """Predicted seconds of a step of so many rollouts, side by side."""
        return rollouts * max(self.learner, self.rollout / workers)


class SpeedMeter:
    """Speeds as the median of the last `WINDOW` steps."""

    def __init__(self) -> None:
        self._seen: deque[Speeds] = deque(maxlen=WINDOW)

    def see(self, speeds: Speeds) -> None:
        """A step's speeds."""
        self._seen.append(speeds)

    @property
    def is_settled(self) -> bool:
        """Whether enough steps were seen to tell a change from an outlier."""
        return len(self._seen) > WINDOW // 2

    @property
    def speeds(self) -> Speeds | None:
        """The median of each; None before the first step."""
        if not self._seen:
            return None
        return Speeds(
            statistics.median(each.learner for each in self._seen),
            statistics.median(each.rollout for each in self._seen),
            statistics.median(each.reward for each in self._seen),
        )

    def forget(self) -> None:
        """What was measured belongs to another fleet."""
        self._seen.clear()


def wanted(speeds: Speeds, workers: int, least: int, most: int) -> int:
    """Workers that the fleet should have: as many as keep pace with the learner.

    Example:
        learner 0.02, rollout 0.07: 2 workers give 0.035 a sample, too slow; 4 give 0.0175
    """
    pace = speeds.rollout / workers
    is_slow = pace > speeds.learner * (1 + BAND)
    is_idle = workers > 1 and speeds.rollout / (workers - 1) < speeds.learner * (1 - BAND)
    if not is_slow and not is_idle:
        return workers
    return min(max(math.ceil(speeds.rollout / speeds.learner), least), most)


class Resizable(Protocol):
    """What the balance needs of rollout/fleet.py."""

    def use(self) -> FleetUse:
        """What it has done since it began."""
        ...

    def resize(self, num_workers: int) -> None:
        """Have so many workers from now on."""
        ...


class Balance:
    """Measures at every plan that is handed out, and resizes the fleet if the recipe allows it.

    Example:
        asked = now();  plan = await …;  gauges = balance.turn(asked, plan.rollouts)
    """

    def __init__(
        self,
        fleet: Resizable,
        section: FleetSection,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet, self._section, self._now = fleet, section, now
        self._meter = SpeedMeter()
        self._given: float | None = None
        self._before: FleetUse | None = None

    def turn(self, asked: float, rollouts: int) -> dict[str, float]:
        """A plan of so many rollouts, asked for then, is handed out now; returns the gauges."""
        now, use = self._now(), self._fleet.use()
        given, before = self._given, self._before
        self._given, self._before = now, use
        if given is None or before is None or not rollouts:
            return {"workers": float(use.workers)}
        sampled = use.rollouts - before.rollouts
        if sampled and asked > given:
            self._meter.see(
                Speeds(
                    (asked - given) / rollouts,
                    (use.filled_seconds - before.filled_seconds) / sampled,
                    (use.reward_seconds - before.reward_seconds) / sampled,
                )
            )
        return self._balanced(use.workers, rollouts)

    def _balanced(self, workers: int, rollouts: int) -> dict[str, float]:
        speeds = self._meter.speeds
        if speeds is None:
            return {"workers": float(workers)}
        most = self._section.max_workers
        if most is not None and self._meter.is_settled:
            number = wanted(speeds, workers, self._section.min_workers, most)
            if number != workers:
                logger.info("the fleet goes from %d to %d workers: %s", workers, number, speeds)
                self._fleet.resize(number)
                self._meter.forget()
        return {
            "workers": float(workers),
            "learner_seconds_per_sample": speeds.learner,
            "rollout_seconds_per_sample": speeds.rollout,
            "reward_seconds_per_sample": speeds.reward,
            "predicted_seconds": speeds.step_seconds(workers, rollouts),
        }
