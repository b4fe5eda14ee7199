"""How fast learner, rollout and reward are, measured while they work, and what follows from it.

    plan given ─▶ learner's step ─▶ next plan given
                                       └ turn(step_seconds, rollouts) ─▶ wanted() ─▶ fleet.resize

Device-seconds per sample, c, as in rl/placement.py: of the learner its step, by its own clock, for
it also waits for plans and publications; of the fleet the time in which its workers were full, of
the verifiers their own (rl/speeds.py). What a step takes beyond the slower of them is its rest.

The fleet is resized when the two paces are further apart than a dead band, and then at once to
where they meet. Inside the band nothing moves, so it does not swing. In turns (`max_staleness: 0`)
the paces add up and a smaller fleet only costs time: it grows to its greatest size. What is sampled
does not depend on how many workers there are, and in turns nor does what is trained.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from rl.speeds import SpeedMeter, Speeds, wanted
from rl.teacher_use import TeacherUse
from rollout.config import FleetSection
from rollout.fleet import FleetUse

logger = logging.getLogger("packtrain")


class Resizable(Protocol):
    """What the balance needs of rollout/fleet.py."""

    def use(self) -> FleetUse:
        """What it has done since it began.

        Raises:
            PacktrainError: what it failed with.
        """
        ...

    def resize(self, num_workers: int) -> None:
        """Have so many workers from now on."""
        ...


class Used(Protocol):
    """What the balance needs of rl/teachers.py."""

    def use(self) -> TeacherUse:
        """What they have done since they began.

        Raises:
            PacktrainError: what they failed with.
        """
        ...


class Balance:
    """Measures at every plan that is handed out, and resizes the fleet if the recipe allows it.

    Example:
        plan = await …;  gauges = balance.turn(step_seconds, plan.rollouts)

    Args:
        overlaps: whether fleet and learner work side by side, or in turns (`max_staleness: 0`).
        teachers: measured too, where there are any; their number stays as it is.
        now: a clock in seconds.
    """

    def __init__(
        self,
        fleet: Resizable,
        section: FleetSection,
        *,
        overlaps: bool,
        teachers: Used | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._fleet, self._section, self._overlaps, self._now = fleet, section, overlaps, now
        self._teachers, self._taught = teachers, TeacherUse(0, 0.0, 0)
        self._meter = SpeedMeter()
        self._rollouts = 0
        self._before: FleetUse | None = None
        self._turned = now()

    def turn(self, step_seconds: float, rollouts: int) -> dict[str, float]:
        """A plan of so many rollouts is handed out; returns the gauges.

        Args:
            step_seconds: of the learner's step on the plan before; 0 where it took none.

        Raises:
            PacktrainError: what the fleet failed with.
        """
        use, teacher = self._fleet.use(), self._teacher_seconds(rollouts)
        trained, before, turned = self._rollouts, self._before, self._turned
        self._rollouts, self._before, self._turned = rollouts, use, self._now()
        sampled = use.rollouts - before.rollouts if before else 0
        if before and sampled and trained and step_seconds > 0:
            speeds = Speeds(
                step_seconds / trained,
                (use.filled_seconds - before.filled_seconds) / sampled,
                (use.reward_seconds - before.reward_seconds) / sampled,
                teacher,
            )
            took = self._turned - turned
            paced = self._predicted(speeds, max(use.workers, before.workers, 1), trained)
            self._meter.see(replace(speeds, rest=max(took - paced, 0.0)))
        return self._balanced(use.workers, rollouts)

    def _balanced(self, workers: int, rollouts: int) -> dict[str, float]:
        speeds, typical = self._meter.speeds, self._meter.typical
        gauges = {"workers": float(workers)}
        if speeds is None or typical is None or not workers:
            return gauges
        if self._section.max_workers is not None and self._meter.is_settled:
            self._follow(speeds, workers, self._section.max_workers)
        if self._teachers:
            gauges |= {
                "teachers": self._taught.teachers,
                "teacher_seconds_per_sample": speeds.teacher,
            }
        return gauges | {
            "overlaps": float(self._overlaps),
            "learner_seconds_per_sample": speeds.learner,
            "rollout_seconds_per_sample": speeds.rollout,
            "reward_seconds_per_sample": speeds.reward,
            "rest_seconds": typical.rest,
            "predicted_seconds": self._predicted(typical, workers, rollouts),
        }

    def _predicted(self, speeds: Speeds, workers: int, rollouts: int) -> float:
        teachers = self._taught.teachers
        return speeds.step_seconds(workers, rollouts, overlaps=self._overlaps, teachers=teachers)

    def _teacher_seconds(self, rollouts: int) -> float:
        """Since the last plan, over the rollouts of this one: flat groups cost a teacher nothing,
        and so a sample of a step costs less than one that it speaks to."""
        if self._teachers is None:
            return 0.0
        before, self._taught = self._taught, self._teachers.use()
        return (self._taught.seconds - before.seconds) / max(rollouts, 1)

    def _follow(self, speeds: Speeds, workers: int, most: int) -> None:
        least = self._section.min_workers
        number = wanted(speeds, workers, least, most, overlaps=self._overlaps)
        if number != workers:
            logger.info("the fleet goes from %d to %d workers: %s", workers, number, speeds)
            self._fleet.resize(number)
            self._meter.forget()
