"""A judge's replica: one engine in a process of its own (a Ray actor), as a fleet sees a worker.

    group → texts → guard, engine, canaries → verdicts → the same group with its verdicts beside it

Its weights come from the model's folder and stay. It is born, pinged, leased, killed and replaced
like a rollout worker (rollout/roster.py), and a group whose replica is lost goes to another.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, cast

from ground import faults
from ground.config import JudgeSettings
from ground.errors import DataError
from ground.exits import pid_space
from ground.imports import without_collection
from ground.lease import Fence, Lease
from ground.records import Group
from ground.roles import enter_role
from rollout.failures import sorted_failures
from rollout.judge_canaries import Sung
from rollout.judge_source import JudgeSource
from rollout.luggage import Luggage
from rollout.reward_pool import ScoredText
from rollout.task import GroupResult, GroupTask, Home, Loaded, Pong, WorkerConfig
from rollout.weights import this_node

if TYPE_CHECKING:
    from rollout.weights import Published

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


class JudgeWorker:
    """Judges groups; wrapped by `ray.remote` in rollout/ray_worker.py.

        prepare (libraries) → open (model) → rollout, ping … → close

    Args:
        luggage: what every worker of ours is sent; a judge reads its model's own folder.
    """

    def __init__(self, config: JudgeConfig, luggage: Luggage) -> None:
        self._config, self._fence = config, Fence(config.incarnation)
        self._lease: Lease | None = None

    async def prepare(self) -> Home:
        """Import the libraries; returns where its process is."""
        with sorted_failures("importing the judge's engine"), without_collection():
            from rollout.engines import import_engine

            import_engine(self._config.engine.kind)
        return Home(pid_space(), os.getpid(), this_node())

    async def open(self, index: int, slots_share: float = 1.0) -> None:
        """Load the model and make ready."""
        if self._lease:  # asked twice, since the answer was lost on its way
            return
        enter_role(f"judge/{index}")
        with sorted_failures("opening the judge"):
            faults.point("judge.open")
            self._open(slots_share)
        self._threads = ThreadPoolExecutor(IN_HAND, thread_name_prefix="judge")
        self._lease = Lease("fleet", self._config.lease_seconds)

    async def ping(self, incarnation: int) -> Pong:
        """Renew the lease; answers while groups are judged."""
        self._fence.check(incarnation)
        if self._lease:
            self._lease.renew()
            self._engine.waiting()  # raises when the engine is dead
        return Pong()

    async def load(self, incarnation: int, version: int, published: Published | None) -> Loaded:
        """Nothing to swap: a judge has the weights of its folder, whatever version that is."""
        self._fence.check(incarnation)
        return Loaded(version, {}, 0.0)

    async def rollout(self, asked: bytes) -> bytes:
        """Judge one group; `asked` and the answer are as in `RolloutWorker.rollout`."""
        incarnation, task, attempt = cast(tuple[int, JudgeTask, int], pickle.loads(asked))
        self._fence.check(incarnation)
        with sorted_failures(f"judging group {task.id}"):
            loop = asyncio.get_running_loop()
            return pickle.dumps(
                await loop.run_in_executor(self._threads, self._judged, task, attempt)
            )

    async def close(self) -> None:
        """End the engine; its children are gone when this returns."""
        await asyncio.to_thread(self._engine.close)

    def _open(self, slots_share: float) -> None:
        """Here and not above: whoever only creates judges needs no torch."""
        from rollout.answer_judge import AnswerJudge
        from rollout.engines import open_engine

        config = self._config
        if not (config.model_path / "config.json").is_file():
            raise DataError(
                f"the judge's model must be readable on every machine, there is none at "
                f"{config.model_path}",
                where="judge.model.path",
                fix="put it on a file system that all machines share, or at the same path on each",
            )
        engine, chat = open_engine(config.model_path, config.engine.with_slots(slots_share))
        self._engine = engine
        self._judge = AnswerJudge(engine, chat, config.settings, config.secret)

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
