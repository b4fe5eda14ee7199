"""The fleet with a judge behind it: what it samples for `reward: judge` comes back with verdicts.

    rollout(task) ─▶ rollout workers ─▶ group ─ reward: judge ─▶ judges ─▶ verdicts, canaries
                                          └─ any other reward ─▶ as it is      │
                                                             compliance, unjudged taken out ─▶ group

An answer that is lost to a replica's death is judged by another one; when all attempts are lost the
group is broken, like one that could not be sampled: no reward, and nothing said of its difficulty.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

from ground.config import JudgeSettings
from ground.errors import InfraError
from ground.records import Group
from rollout.compliance import with_compliance
from rollout.fleet import Fleet, WorkerStats
from rollout.judge_canaries import Tally
from rollout.judge_reward import JUDGE
from rollout.judge_worker import JudgedGroup, JudgeTask
from rollout.roster import Event
from rollout.scoring import with_verdicts
from rollout.seat import Crew
from rollout.task import GroupTask

JUDGES = Crew("judge", "judges", "judge.max_length", "judge.replicas")


class Sampler(Protocol):
    """What gives groups: the rollout workers' fleet."""

    async def rollout(self, task: GroupTask) -> Group:
        """Sample and score one group."""
        ...

    async def publish(self, version: int, weights: object) -> None:
        """Return once every worker that serves has these weights."""
        ...


class Unjudged(InfraError):
    """A group without a single verdict: of no use, and no word about its prompt."""


class JudgedFleet:
    """Rollout workers and judges, as one fleet.

    Args:
        judges: a fleet of `JudgeWorker`s.
        now: the clock by which judging is measured.
    """

    def __init__(
        self,
        sampler: Sampler,
        judges: Fleet,
        settings: JudgeSettings,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._sampler, self._judges, self._now = sampler, judges, now
        self._tally = Tally(settings)
        self._seconds, self._answers = 0.0, 0

    async def start(self) -> None:
        """Bring the judges up, and show them to be ready; the workers are somebody else's.

        Raises:
            WorkersLostError: none came up.
            DataError: their model is none.
        """
        await self._judges.start()
        await self._judges.publish(0, None)

    async def publish(self, version: int, weights: object) -> None:
        """Hand a version to the rollout workers; the judges keep what they have."""
        await self._sampler.publish(version, weights)

    async def rollout(self, task: GroupTask) -> Group:
        """A group with its verdicts; answers that nobody could judge are not in it.

        Raises:
            Unjudged: none could.
            JudgeError: the judge fails its canaries, or gives no verdicts.
            InfraError, WorkersLostError, PromptTooLong: as `Fleet.rollout` raises them, for workers
                and for judges.
        """
        group = await self._sampler.rollout(task)
        if task.prompt.reward != JUDGE:
            return group
        started = self._now()
        judged = await self._judges.rollout(JudgeTask.of(task, group))
        assert isinstance(judged, JudgedGroup)
        self._seconds += self._now() - started
        self._answers += len(judged.verdicts)
        return self._with_verdicts(task, group, judged)

    def gauges(self) -> dict[str, float]:
        """Errors on canaries, unjudged answers, and seconds from asking to verdict, per answer."""
        seconds, self._seconds = self._seconds, 0.0
        answers, self._answers = self._answers, 0
        waited = {"judge_seconds_per_sample": seconds / answers} if answers else {}
        return {**self._tally.gauges(), **waited}

    def stats(self) -> tuple[WorkerStats, ...]:
        """How each judge is; the workers tell of themselves."""
        return self._judges.stats().workers

    async def close(self) -> None:
        """End the judges; their processes are gone when this returns."""
        await self._judges.close()

    def _with_verdicts(self, task: GroupTask, group: Group, judged: JudgedGroup) -> Group:
        texts = [rollout.text for rollout in group.rollouts]
        scored = with_compliance(judged.verdicts, texts, task.applied_demand)
        rollouts = with_verdicts(group.rollouts, scored)
        self._tally.see(group.prompt.id, judged.verdicts, judged.canaries)
        if not rollouts:
            why = judged.verdicts[0].error
            raise Unjudged(
                f"group {task.id} must have verdicts, it has none", where="judge", why=why
            )
        return replace(group, rollouts=rollouts)


def as_judge_event(event: Event) -> Event:
    """What a fleet of judges notes: a judged group is no rollout."""
    return {**event, "kind": "judge"} if event["kind"] == "rollout" else event
