"""The learner's loop: wait for a plan, keep it, step, publish, tell.

    next_batch(step) ─▶ Consumed.write ─▶ Learner.step ─▶ Publisher.publish(step + 1) ─▶ tell
                             └── after a restart: repeat(plan) for each step since the cut

Version v is the weights after v steps; step v trains version v and makes version v + 1. A plan is
on the disk before its step is applied, so whatever the learner was killed at, the steps since its
last cut are taken again with the same tokens and give the same weights, bit for bit.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

from ground import faults
from ground.errors import DataError, DivergedError
from ground.records import Group, Rollout
from ground.signals import Pending
from rl.buffer import LATE, UNTAUGHT, Outcome, Plan
from rl.config import RlSection
from rl.consumed import Consumed
from rl.ensemble import Ensemble
from rl.guards import NoSignalGuard
from rl.job import Report, phase
from rl.publisher import Loop as Publications
from rl.publisher import Publisher
from rl.snapshot import Snapshot
from rl.verdicts import MISVERSIONED
from rollout.compliance import compliance_rates
from rollout.weights import Probes

logger = logging.getLogger("packtrain")

_NOT_THE_SAME = (
    "version %d, made again from the journal, is not bit for bit the one of before: most likely "
    "processor, libraries, rl.threads or the number of ranks have changed. Training goes on, for "
    "log-probs were recorded as they were sampled"
)


class Plans(Protocol):
    """Where plans come from: the controller, wherever that runs."""

    def next_batch(
        self, step: int, stop: Callable[[], bool], step_seconds: float
    ) -> tuple[Plan, dict[str, float]] | None:
        """Wait for a step's plan and the fleet's gauges; None as soon as `stop` says so.

        Args:
            step_seconds: of our step on the plan before, without any wait; 0 where we took none.
        """
        ...


class Loop(Plans, Publications, Protocol):
    """The controller's side of the loop, wherever that runs."""

    def found(self, base: Mapping[str, Tensor], scale: float) -> None:
        """Hand over what adapters are added to, once, before the first of them.

        Args:
            scale: what the product of each adapter is multiplied with.
        """
        ...

    def begin(
        self,
        version: int,
        weights: Mapping[str, Tensor],
        saved: object,
        replayed: Sequence[Sequence[Outcome]],
    ) -> None:
        """Publish the first weights and let the fleet start, the books being where we are."""
        ...

    def pack(
        self, version: int, weights: Mapping[str, Tensor], probes: Callable[[], Probes]
    ) -> dict[str, Tensor]:
        """Copy live weights for `begin` or `publish`, with what the learner makes of probes."""
        ...

    def close(self, reason: str) -> dict[str, int]:
        """End the loop; returns the ledger's closing sums."""
        ...


class LearnerLoop:
    """Runs steps `start` to `section.steps`, on rank 0; other ranks follow what it orders.

    Args:
        pack: makes a copy of the live weights as a version, trained on these groups last.
    """

    def __init__(
        self,
        learner: Ensemble,
        plans: Plans,
        publisher: Publisher,
        consumed: Consumed,
        section: RlSection,
        *,
        tell: Callable[[Report], None],
        keep_batch: Callable[[Plan], None],
        pack: Callable[[int, Sequence[Group]], dict[str, Tensor]],
    ) -> None:
        self._learner, self._plans, self._publisher = learner, plans, publisher
        self._consumed, self._section = consumed, section
        self._tell, self._keep_batch, self._pack = tell, keep_batch, pack
        self._guard = NoSignalGuard(section.max_starved_steps)
        self._step_seconds = 0.0

    def guards(self) -> dict[str, Any]:
        """What the guards have counted and the soft term weighs so far, as JSON types: part of a
        cut."""
        counted = {
            "braked_steps": self._learner.braked_steps,
            "no_signal": self._guard.state_dict(),
        }
        lesson = self._learner.lesson_state
        return counted | ({"lesson": lesson} if lesson else {})

    def load_guards(self, saved: Mapping[str, Any]) -> None:
        """Go on counting where a cut was made."""
        self._learner.go_on_braking(saved["braked_steps"])
        self._guard.load_state_dict(**saved["no_signal"])
        if lesson := saved.get("lesson"):
            self._learner.go_on_with_lesson(lesson)

    def repeat(self, cut: int) -> tuple[int, list[list[Outcome]]]:
        """Take the journaled steps since a cut again; returns the version that they lead to.

        They end before a damaged file, and at a version that should have been looked at and was
        not: whatever was consumed after that is forgotten, and its draws are asked again. Also
        returns, per step, what became of its draws.
        """
        version, replayed = cut, list[list[Outcome]]()
        while (plan := self._journaled(version)) is not None:
            numbers = self._step(plan)
            version += 1
            replayed.append(plan.told)
            is_same = self._publisher.repeat(version, self._learner.model_tensors)
            if not is_same:
                logger.warning(_NOT_THE_SAME, version)
            replay = {"replayed": 1.0, "replay_differs": float(not is_same)}
            measured = {**_of_plan(plan), **numbers, **replay}
            self._tell(Report(kind="step", step=version, numbers=measured))
        self._consumed.trim(version)
        self._publisher.forget_after(version)
        return version, replayed

    def catch_up(self, cut: int, version: int) -> None:
        """Begin what the version still owes that a restart goes on from: its look, a newer cut."""
        evaluate = version > 0 and self._is_look_due(version) and self._publisher.owes_look(version)
        save = any(self._is_cut_due(each) for each in range(cut + 1, version + 1))
        if evaluate or save:
            snapshot = self._snapshot(version, with_optimizer=save)
            self._publisher.catch_up(snapshot, evaluate=evaluate, save=save)

    def run(self, start: int, pending: Pending) -> int:
        """Train to the last step, or to the first step's end after a signal; returns the version.

        Raises:
            DivergedError: non-finite numbers, or nothing to learn from.
        """
        version = start
        while version < self._section.steps and self._one_step(version, pending):
            version += 1
        self._tell(self._publication(version))
        self._publisher.finish(lambda: pending.requested)
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
        self._tell(phase(f"train step {step}", step))
        waited, started = time.monotonic() - began, time.time()
        numbers = self._step(plan)
        stepped, ended = time.monotonic(), time.time()
        self._step_seconds = stepped - began - waited
        numbers |= self._publish(step + 1, plan.groups, pending)
        now = time.monotonic()
        clock = {
            "seconds": now - began,
            "step_seconds": self._step_seconds,
            "learner_idle_share": (waited + now - stepped) / (now - began),
            "tokens_per_second": numbers.get("trained_tokens", 0) / (now - began),
        }
        measured = {**_of_plan(plan), **numbers, **gauges, **clock}
        self._tell(
            Report(kind="step", step=step + 1, numbers=measured, started=started, ended=ended)
        )
        return True

    def _publish(
        self, version: int, trained: Sequence[Group], pending: Pending
    ) -> dict[str, float]:
        """Begin to publish a copy of the weights; returns what it took."""
        evaluate, save = self._is_look_due(version), self._is_cut_due(version)
        began = time.monotonic()
        weights = self._pack(version, trained)
        packed = time.monotonic()
        optimizer = self._learner.optimizer_tensors() if save else {}
        snapshot = Snapshot(version, weights, optimizer, self.guards())
        self._tell(self._publication(version - 1))
        self._publisher.publish(
            snapshot, evaluate=evaluate, save=save, stop=lambda: pending.requested
        )
        handed = sum(tensor.nbytes for tensor in weights.values())
        return {"pack_seconds": packed - began, "handover_bytes": handed}

    def _publication(self, version: int) -> Report:
        """We wait until a version is out, the look at it included if there is one."""
        seconds = self._section.publication_seconds
        return phase(f"have version {version} published", version, seconds)

    def _next_plan(self, step: int, pending: Pending) -> tuple[Plan, dict[str, float]] | None:
        """Ask for a plan and keep it; None is the order to stop."""
        received = self._plans.next_batch(step, lambda: pending.requested, self._step_seconds)
        if received is not None:
            faults.point("plan.received")
            self._consumed.write(received[0])
        return received

    def _journaled(self, version: int) -> Plan | None:
        """What the step from this version consumed; None where that ends."""
        if version > 0 and self._is_look_due(version) and self._publisher.owes_look(version):
            return None
        try:
            return next(self._consumed.after(version), None)
        except DataError as error:
            logger.warning("going on from version %d: %s", version, error)
            return None

    def _is_look_due(self, version: int) -> bool:
        validation, is_last = self._section.validation, version == self._section.steps
        return bool(validation.prompts) and (is_last or version % validation.evaluate_every == 0)

    def _is_cut_due(self, version: int) -> bool:
        is_last = version == self._section.steps
        return is_last or version % self._section.checkpoint_every == 0

    def _step(self, plan: Plan) -> dict[str, float]:
        """Take a step. One that ends the run is not applied, and its draws are asked again."""
        try:
            self._guard.check(plan)
            numbers = self._learner.step(plan)
        except DivergedError:
            if plan.groups:
                self._keep_batch(plan)
            self._consumed.trim(plan.step)
            raise
        faults.point("step.applied")
        return numbers

    def _snapshot(self, version: int, *, with_optimizer: bool) -> Snapshot:
        optimizer = self._learner.optimizer_tensors() if with_optimizer else {}
        return Snapshot(version, self._learner.model_tensors(), optimizer, self.guards())


def _of_plan(plan: Plan) -> dict[str, float]:
    """Reward and the fate of the step's draws."""
    flat = sum(plan.filtered.get(reason, 0) for reason in ("all-0", "all-1", "flat"))
    draws = len(plan.groups) + sum(plan.filtered.values())
    late, refused, misversioned, untaught = (
        plan.filtered.get(reason, 0) for reason in (LATE, "refused", MISVERSIONED, UNTAUGHT)
    )
    named = flat + late + refused + misversioned + untaught + len(plan.groups)
    return {
        "reward": plan.reward,
        "pass_rate": plan.pass_rate,
        "rollouts": plan.rollouts,
        "survey_rollouts": sum(seen.trials for o in plan.surveyed if (seen := o.observation)),
        "groups": len(plan.groups),
        "kept_share": len(plan.groups) / draws,
        "flat_share": flat / draws,
        "all_0_share": plan.filtered.get("all-0", 0) / draws,
        "all_1_share": plan.filtered.get("all-1", 0) / draws,
        "late_share": late / draws,
        "refused_share": refused / draws,
        "misversioned_share": misversioned / draws,
        "untaught_share": untaught / draws,
        "broken_share": (draws - named) / draws,
        **compliance_rates(answer.reward_parts for answer in _answers(plan)),
    }


def _answers(plan: Plan) -> Iterator[Rollout]:
    """All answers that the step's slots cost, those of filtered groups included."""
    for outcome in plan.outcomes:
        if outcome.group:
            yield from outcome.group.rollouts
