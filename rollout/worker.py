"""A rollout worker: one engine and one reward pool in a process of its own (a Ray actor).

    task → prompt ids → G requests → completions → texts → verdicts → Group

Calls overlap: the event loop only waits, tokens come from the engine's thread, verdicts from the
pool's processes. A worker that hears no ping for its lease ends itself, so that none outlives its
fleet even where Ray does not notice.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from ground import faults
from ground.errors import InfraError
from ground.exits import pid_space
from ground.imports import without_collection
from ground.lease import Fence, Lease
from ground.records import Group
from ground.roles import enter_role
from rollout.compliance import with_compliance
from rollout.config import EngineSection
from rollout.engine import Completion, Engine, Request, completed
from rollout.failures import sorted_failures
from rollout.judge_reward import AWAITING, JUDGE
from rollout.luggage import Luggage
from rollout.reward_pool import RewardPool, ScoredText
from rollout.scoring import rollouts_of, texts_of
from rollout.task import GroupResult, GroupTask, Home, Loaded, Pong, WorkerConfig
from rollout.weights import this_node

if TYPE_CHECKING:
    from ground.chat import ChatTemplate
    from rollout.gate import Gate
    from rollout.vllm_engine import VllmEngine
    from rollout.weights import Published

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class _Sampling:
    """An attempt that the engine has: its requests, and when the first of them got a place."""

    requests: Sequence[str]
    began: float | None = None

    def seconds(self, waiting: frozenset[str], now: float) -> float:
        """Since it has a place, as far as was looked; 0 while all its requests wait for one."""
        if self.began is None and not waiting.issuperset(self.requests):
            self.began = now
        return 0.0 if self.began is None else now - self.began


class RolloutWorker:
    """Samples and scores groups; wrapped by `ray.remote` in rollout/ray_worker.py.

        prepare (libraries) → open (model; weights of no version) → load, rollout, ping … → close

    Each message carries the run's incarnation, and one of another life is refused.
    """

    def __init__(self, config: WorkerConfig, luggage: Luggage) -> None:
        self._config, self._luggage, self._fence = config, luggage, Fence(config.incarnation)
        self._lease: Lease | None = None
        self._sampling: dict[str, _Sampling] = {}
        self._awaiting_verdicts: set[str] = set()

    async def prepare(self) -> Home:
        """Import the libraries; returns where its process is."""
        with sorted_failures("importing the engine"):
            self._import_libraries()
        return Home(pid_space(), os.getpid(), this_node())

    async def open(self, index: int, slots_share: float = 1.0) -> None:
        """Load the model and make ready.

        Not part of the constructor, because Ray keeps only the text of what a constructor raises.
        """
        if self._lease:  # asked twice, since the answer was lost on its way
            return
        enter_role(f"rollout/{index}")
        config, fleet = self._config, self._config.fleet
        with sorted_failures("opening the engine"):
            faults.point("open")
            self._files = self._luggage.unpack()
            engine = config.engine.with_slots(slots_share)
            self._engine, self._template, self._gate = self._open_engine(engine, self._files.model)
        self._pool = RewardPool(
            fleet.reward_processes,
            fleet.reward_deadline_seconds,
            self._files.rewards,
            sandbox=config.sandbox,
        )
        self._scoring = ThreadPoolExecutor(fleet.reward_processes, thread_name_prefix="score")
        self._orders = ThreadPoolExecutor(1, thread_name_prefix="order")
        self._lease = Lease("fleet", config.lease_seconds)

    async def ping(self, incarnation: int) -> Pong:
        """Renew the lease; answers while tokens are sampled."""
        self._fence.check(incarnation)
        faults.point("ping")
        if not self._lease:  # a spare: nothing is open yet
            return Pong()
        self._lease.renew()
        waiting, now = self._engine.waiting(), time.monotonic()
        sampling = {id_: each.seconds(waiting, now) for id_, each in self._sampling.items()}
        verdicts, arriving = self._pool.stats(), self._gate.arriving
        return Pong(sampling, tuple(self._awaiting_verdicts), verdicts, arriving)

    async def load(self, incarnation: int, version: int, published: Published) -> Loaded:
        """Swap weights in flight; returns what the engine has now, and proven to have."""
        self._fence.check(incarnation)

        def load() -> Loaded:
            with sorted_failures(f"loading version {version}"):
                return self._gate.load(version, published)

        return await asyncio.get_running_loop().run_in_executor(self._orders, load)

    async def rollout(self, asked: bytes) -> bytes:
        """Sample and score one group.

        Args:
            asked: pickle of the incarnation, the `GroupTask` and how many workers were lost under
                this group before, which keeps ids apart.

        Returns:
            Pickle of the `GroupResult`.
        """
        incarnation, task, attempt = cast(tuple[int, GroupTask, int], pickle.loads(asked))
        self._fence.check(incarnation)
        with sorted_failures(f"group {task.id}"):
            return pickle.dumps(await self._rollout(task, attempt))

    async def close(self) -> None:
        """End engine and pool; their children are gone when this returns."""
        await asyncio.to_thread(self._engine.close)
        await asyncio.to_thread(self._pool.close)
        self._files.remove()

    async def _rollout(self, task: GroupTask, attempt: int) -> GroupResult:
        started = time.time()
        faults.point("gen.begin")
        prompt_ids = tuple(self._template.encode_prompt(task.messages))
        requests, attempt_id = self._requests(task, prompt_ids, attempt), task.attempt_id(attempt)
        if attempt_id in self._sampling or attempt_id in self._awaiting_verdicts:
            raise InfraError(f"{attempt_id} was asked twice, its first asking is still at work")
        self._sampling[attempt_id] = _Sampling([request.id for request in requests])
        try:
            completions = await self._sample(requests)
        finally:
            del self._sampling[attempt_id]
        sampled = time.time()
        texts = texts_of(completions, self._template)
        if task.prompt.reward == JUDGE:
            scored = [AWAITING] * len(texts)
        else:
            scored = await self._score(task, texts, attempt_id)
        faults.point("gen.scored")
        rollouts = rollouts_of(completions, texts, scored)
        group = Group(task.id, task.prompt, prompt_ids, rollouts, task.applied_system)
        num_tokens = sum(rollout.num_tokens for rollout in rollouts)
        return GroupResult(group, started, sampled, time.time(), num_tokens, attempt)

    async def _score(
        self, task: GroupTask, texts: Sequence[str], attempt_id: str
    ) -> list[ScoredText]:
        self._awaiting_verdicts.add(attempt_id)
        try:
            scored = await asyncio.get_running_loop().run_in_executor(
                self._scoring, self._pool.score, task.prompt, texts
            )
        finally:
            self._awaiting_verdicts.discard(attempt_id)
        return with_compliance(scored, texts, task.applied_demand)

    def _import_libraries(self) -> None:
        """Here and not above: whoever only creates workers needs no torch."""
        with without_collection():
            import rollout.gate  # noqa: F401
            from rollout.engines import import_engine

            import_engine(self._config.engine.kind)

    def _open_engine(
        self, section: EngineSection, model: Path
    ) -> tuple[Engine, ChatTemplate, Gate]:
        from rollout.courier import Lane
        from rollout.engines import open_blank
        from rollout.gate import Gate
        from rollout.handover import Inbox

        try:
            engine, template = open_blank(model, section)
        except (OSError, RuntimeError) as error:
            what = f"the engine must open, got {type(error).__name__}: {error}"
            raise InfraError(what) from error
        lane = None
        if section.transfer != "memory":
            lane = Lane(cast("VllmEngine", engine), section, self._luggage)
        return engine, template, Gate(engine, Inbox(this_node()), lane)

    def _requests(
        self, task: GroupTask, prompt_ids: tuple[int, ...], attempt: int
    ) -> list[Request]:
        return [
            Request(
                id=f"{task.id}/{index}#{attempt}",
                prompt_ids=prompt_ids,
                max_new_tokens=task.sampling.max_new_tokens,
                temperature=task.sampling.temperature,
                seed=seed,
                stop_ids=self._template.stop_ids,
            )
            for index, seed in enumerate(task.seeds)
        ]

    async def _sample(self, requests: Sequence[Request]) -> list[Completion]:
        """All completions; leaves nothing running if it is cancelled or one of them fails."""
        try:
            return await completed([self._engine.submit(each) for each in requests])
        except BaseException:
            ids = [request.id for request in requests]
            self._orders.submit(self._engine.abort, ids)
            raise
