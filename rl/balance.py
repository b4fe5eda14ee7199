"""How fast learner, rollout and reward are, measured while they work, and what follows from it.

    next plan asked ── waited ──▶ given ── learner works ──▶ next plan asked
                          └ turn(asked, rollouts): Speeds ─▶ wanted() ─▶ fleet.resize

Device-seconds per sample, c, as in rl/placement.py: of the learner the time between two plans in
which it did not wait, of the fleet the time in which its workers were full, of the verifiers their
own (rl/speeds.py).

The fleet is resized when the two paces are further apart than a dead band, and then at once to
where they meet. Inside the band nothing moves, so it does not swing. What is sampled does not
depend on how many workers there are, and at `max_staleness: 0` nor does what is trained.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Protocol

from rl.speeds import SpeedMeter, Speeds, wanted
from rollout.config import FleetSection
from rollout.fleet import FleetUse

logger = logging.getLogger("packtrain")


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
