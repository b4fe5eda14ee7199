"""A judge's replica: one engine in a process of its own (a Ray actor), as a fleet sees a worker.

    group → texts → guard, engine, canaries → verdicts → the same group with its verdicts beside it

A group whose replica is lost goes to another.
"""

from __future__ import annotations

import asyncio
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import cast

from ground import faults
from ground.config import JudgeSettings
from ground.errors import DataError
from ground.records import Group
from rollout.config import EngineSection
from rollout.engine import Engine
from rollout.engine_host import EngineHost
from rollout.failures import sorted_failures
from rollout.judge_canaries import Sung
from rollout.judge_source import JudgeSource
from rollout.luggage import Luggage
from rollout.reward_pool import ScoredText
from rollout.task import GroupResult, GroupTask, WorkerConfig

IN_HAND = 4
"""Groups that a replica works on at once: one is encoded while another is scored."""


@dataclass(frozen=True, slots=True)
class JudgeConfig(WorkerConfig):
    """All that a replica needs to come up.

    Example:
        JudgeConfig.of(source, incarnation=0, lease_seconds=60.0)
    """

    settings: JudgeSettings = field(default_factory=JudgeSettings)
    secret: bytes = b""

    @staticmethod
    def of(source: JudgeSource, *, incarnation: int, lease_seconds: float) -> JudgeConfig:
        """The config of every replica of a judge."""
        return JudgeConfig(
            source.model,
            source.engine,
            source.fleet,
            incarnation=incarnation,
            lease_seconds=lease_seconds,
            settings=source.settings,
            secret=source.secret,
        )


@dataclass(frozen=True, slots=True)
class JudgeTask(GroupTask):
    """A sampled group that wants verdicts.

    Example:
        JudgeTask.of(task, group)
    """

    group: Group = field(kw_only=True)

    @staticmethod
    def of(task: GroupTask, group: Group) -> JudgeTask:
        """The group that came of a task."""
        return JudgeTask(
            task.id, task.prompt, task.system, task.sampling, task.seeds, task.demand, group=group
        )


@dataclass(frozen=True, slots=True)
class JudgedGroup(Group):
    """A group as it was sampled, and what the judge thinks of it.

    Example:
        JudgedGroup(…, verdicts=(ScoredText(0.9, True), …), canaries=(Sung("colon", False, False),))
    """

    verdicts: tuple[ScoredText, ...] = ()
    """[G]"""
    canaries: tuple[Sung, ...] = ()


class JudgeWorker(EngineHost):
    """Judges groups; wrapped by `ray.remote` in rollout/ray_worker.py.

    Args:
        luggage: what every worker of ours is sent; a judge reads its model's own folder.
    """

    ROLE, OWNER = "judge", "fleet"

    def __init__(self, config: JudgeConfig, luggage: Luggage) -> None:
        super().__init__(config.model_path, config.engine, config.incarnation, config.lease_seconds)
        self._config = config
        self._threads = ThreadPoolExecutor(IN_HAND, thread_name_prefix="judge")

    async def rollout(self, asked: bytes) -> bytes:
        """Judge one group; `asked` and the answer are as in `RolloutWorker.rollout`."""
        incarnation, task, attempt = cast(tuple[int, JudgeTask, int], pickle.loads(asked))
        self._fence.check(incarnation)
        with sorted_failures(f"judging group {task.id}"):
            loop = asyncio.get_running_loop()
            return pickle.dumps(
                await loop.run_in_executor(self._threads, self._judged, task, attempt)
            )

    def opened(self, section: EngineSection) -> Engine:
        from rollout.answer_judge import AnswerJudge
        from rollout.engines import open_engine

        faults.point("judge.open")
        engine, chat = open_engine(self._model_path, section)
        try:
            self._judge = AnswerJudge(engine, chat, self._config.settings, self._config.secret)
        except BaseException:
            engine.close()
            raise
        return engine

    def unseen_model(self) -> DataError:
        return DataError(
            f"the judge's model must be readable on every machine, there is none at "
            f"{self._model_path}",
            where="judge.model.path",
            fix="put it on a file system that all machines share, or at the same path on each",
        )

    def _judged(self, task: JudgeTask, attempt: int) -> GroupResult:
        started, group = time.time(), task.group
        faults.point("judge.score")
        judged = self._judge.judge(group.prompt, [each.text for each in group.rollouts])
        whole = JudgedGroup(
            group.id, group.prompt, group.prompt_ids, group.rollouts, group.system,
            judged.verdicts, judged.canaries,
        )  # fmt: skip
        now = time.time()
        return GroupResult(whole, started, now, now, num_tokens=0, attempt=attempt)
