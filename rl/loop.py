"""The learner's loop: wait for a plan, step, publish, tell.

    next_batch(step) ──▶ Learner.step ──▶ Publisher.publish(step + 1) ──▶ tell(numbers)

Version v is the weights after v steps; step v trains version v and makes version v + 1.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Protocol

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from ground.errors import DivergedError
from ground.signals import Pending
from rl.books import Plan
from rl.config import RlSection
from rl.guards import NoSignalGuard
from rl.job import Report
from rl.learner import Learner
from rl.publisher import Publisher
from rl.snapshot import Snapshot

class Plans(Protocol):
    """Where plans come from: the controller, wherever that runs."""

    def next_batch(
        self, step: int, stop: Callable[[], bool]
    ) -> tuple[Plan, dict[str, float]] | None:
        """Wait for a step's plan and the fleet's gauges; None as soon as `stop` says so."""
        ...


class LearnerLoop:
    """Runs steps `start` to `section.steps` on every rank; rank 0 talks to the controller."""

    def __init__(
        self,
        learner: Learner,
        plans: Plans,
        publisher: Publisher,
        accelerator: Accelerator,
        section: RlSection,
        *,
        tell: Callable[[Report], None],
        keep_batch: Callable[[Plan], None],
    ) -> None:
        self._learner, self._plans, self._publisher = learner, plans, publisher
        self._accelerator, self._section = accelerator, section
        self._tell, self._keep_batch = tell, keep_batch
        self._guard = NoSignalGuard(section.max_empty_steps)

    def run(self, start: int, pending: Pending) -> int:
        """Train to the last step, or to the first step's end after a signal; returns the version.

        Raises:
            DivergedError: non-finite numbers, or nothing to learn from.
        """
        version = start
        while version < self._section.steps and self._one_step(version, pending):
            version += 1
        if self._accelerator.is_main_process:
            self._publisher.finish()
            if version < self._section.steps:
                self._publisher.save(self._snapshot(version, with_optimizer=True))
        return version

    def _one_step(self, step: int, pending: Pending) -> bool:
        """Do one step; False when somebody asked to stop before it began."""
        began = time.monotonic()
        received = self._next_plan(step, pending)
        if received is None:
            return False
        plan, gauges = received
        self._guard.check(plan)
        waited, started = time.monotonic() - began, time.time()
        numbers = self._step(plan)
        stepped, ended = time.monotonic(), time.time()
        if self._accelerator.is_main_process:
            self._publish(step + 1)
        now = time.monotonic()
        clock = {
            "seconds": now - began,
            "step_seconds": stepped - began - waited,
            "learner_idle_share": (waited + now - stepped) / (now - began),
            "tokens_per_second": numbers.get("trained_tokens", 0) / (now - began),
        }
        measured = {**_of_plan(plan), **numbers, **gauges, **clock}
        if self._accelerator.is_main_process:
            report = Report(
                kind="step", step=step + 1, numbers=measured, started=started, ended=ended
            )
            self._tell(report)
        return True

    def _publish(self, version: int) -> None:
        is_last = version == self._section.steps
        evaluate = is_last or version % self._section.validation.evaluate_every == 0
        save = is_last or version % self._section.checkpoint_every == 0
        snapshot = self._snapshot(version, with_optimizer=save)
        self._publisher.publish(snapshot, evaluate=evaluate, save=save)

    def _next_plan(self, step: int, pending: Pending) -> tuple[Plan, dict[str, float]] | None:
        """Rank 0 asks; all ranks get the same plan, or the same order to stop."""
        box: list[tuple[Plan, dict[str, float]] | None] = [None]
        if self._accelerator.is_main_process:
            box = [self._plans.next_batch(step, lambda: pending.requested)]
        if self._accelerator.num_processes > 1:
            broadcast_object_list(box)
        return box[0]

    def _step(self, plan: Plan) -> dict[str, float]:
        try:
            return self._learner.step(plan)
        except DivergedError:
            self._keep_batch(plan)
            raise

    def _snapshot(self, version: int, *, with_optimizer: bool) -> Snapshot:
        optimizer = self._learner.optimizer_tensors() if with_optimizer else {}
        return Snapshot(version, self._learner.model_tensors(), optimizer)


def _of_plan(plan: Plan) -> dict[str, float]:
    """Reward and the fate of the step's draws."""
    flat = sum(plan.filtered.get(reason, 0) for reason in ("all-0", "all-1", "flat"))
    draws = len(plan.groups) + sum(plan.filtered.values())
    return {
        "reward": plan.reward,
        "pass_rate": plan.pass_rate,
        "rollouts": plan.rollouts,
        "groups": len(plan.groups),
        "kept_share": len(plan.groups) / draws,
        "flat_share": flat / draws,
        "all_0_share": plan.filtered.get("all-0", 0) / draws,
        "all_1_share": plan.filtered.get("all-1", 0) / draws,
        "broken_share": (draws - flat - len(plan.groups)) / draws,
    }
