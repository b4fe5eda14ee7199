"""An engine in a process of its own (a Ray actor), for stages that measure or judge.

    prepare (libraries) → open (the model's folder) → sample, score, ping … → close

Its weights come from the model's folder and stay. It is born, pinged, leased, killed and replaced
like a rollout worker (rollout/roster.py).
"""

from __future__ import annotations

import asyncio
import os
import pickle
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import cast

from ground import faults
from ground.errors import InfraError
from ground.exits import pid_space
from ground.imports import without_collection
from ground.lease import Fence, Lease
from ground.roles import enter_role
from rollout.config import EngineSection
from rollout.engine import Request, Scores, completed
from rollout.failures import sorted_failures
from rollout.task import Home, Loaded, Pong
from rollout.weights import this_node


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """All that an engine needs to come up.

    Example:
        EngineConfig(Path("runs/tiny/sft/model"), section.engine, lease_seconds=60.0, where="mine")
    """

    model_path: Path
    engine: EngineSection
    lease_seconds: float
    where: str
    """The section of the recipe that it belongs to."""


class UnseenModelError(InfraError):
    """This machine does not see the model's folder; another one may."""


class EngineWorker:
    """Serves one engine; wrapped by `ray.remote` in rollout/ray_worker.py."""

    def __init__(self, config: EngineConfig) -> None:
        self._config, self._fence = config, Fence(0)
        self._lease: Lease | None = None
        self._numbers = count()

    async def prepare(self) -> Home:
        """Import the libraries; returns where its process is."""
        with sorted_failures("importing the engine"), without_collection():
            from rollout.engines import import_engine

            import_engine(self._config.engine.kind)
        return Home(pid_space(), os.getpid(), this_node())

    async def open(self, index: int, slots_share: float = 1.0) -> None:
        """Load the model and make ready."""
        if self._lease:  # asked twice, since the answer was lost on its way
            return
        enter_role(f"engine/{index}")
        with sorted_failures("opening the engine", memory_fix=self._memory_fix):
            faults.point("engine.open")
            self._open(slots_share)
        self._scorer = ThreadPoolExecutor(1, thread_name_prefix="score")
        self._orders = ThreadPoolExecutor(1, thread_name_prefix="order")
        self._lease = Lease("stage", self._config.lease_seconds)

    async def ping(self, incarnation: int) -> Pong:
        """Renew the lease; answers while it samples."""
        self._fence.check(incarnation)
        if self._lease:
            self._lease.renew()
            self._engine.waiting()  # raises when the engine is dead
        return Pong()

    async def load(self, incarnation: int, version: int, published: object) -> Loaded:
        """Nothing to swap: it has the weights of its folder, whatever version that is."""
        self._fence.check(incarnation)
        return Loaded(version, {}, 0.0)

    async def sample(self, asked: bytes) -> bytes:
        """Completions of requests, in their order; cancelling the call aborts them.

        Asked twice, since an answer was lost, it samples twice: under ids of each asking's own.

        Args:
            asked: pickle of a list of `Request`s; the answer is one of `Completion`s.
        """
        requests, number = cast(list[Request], pickle.loads(asked)), next(self._numbers)
        name = f"sampling {requests[0].id} and {len(requests) - 1} more"
        with sorted_failures(name, memory_fix=self._memory_fix):
            faults.point("engine.sample")
            own = [replace(each, id=f"{each.id}#{number}") for each in requests]
            try:
                found = await completed([self._engine.submit(each) for each in own])
            except BaseException:
                self._orders.submit(self._engine.abort, [each.id for each in own])
                raise
        pairs = zip(requests, found, strict=True)
        return pickle.dumps([replace(each, id=request.id) for request, each in pairs])

    async def score(self, asked: bytes) -> bytes:
        """See `Engine.score`.

        Args:
            asked: pickle of sequences of token ids and of `top_k`; the answer is one of `Scores`.
        """
        token_ids, top_k = cast(tuple[Sequence[Sequence[int]], int], pickle.loads(asked))
        name = f"scoring {len(token_ids)} sequences"
        with sorted_failures(name, memory_fix=self._memory_fix):
            faults.point("engine.score")
            loop = asyncio.get_running_loop()
            scores: list[Scores] = await loop.run_in_executor(
                self._scorer, self._engine.score, token_ids, top_k
            )
        return pickle.dumps(scores)

    async def close(self) -> None:
        """End the engine; its children are gone when this returns."""
        await asyncio.to_thread(self._engine.close)

    @property
    def _memory_fix(self) -> str:
        """What to do when it is memory that lacks."""
        where = self._config.where
        return f"lower {where}.engine.num_slots or {where}.replicas"

    def _open(self, slots_share: float) -> None:
        """Here and not above: whoever only creates engines needs no torch.

        Raises:
            UnseenModelError: another machine may see it.
        """
        from rollout.engines import open_engine

        config = self._config
        if not (config.model_path / "config.json").is_file():
            raise UnseenModelError(
                f"the model must be readable on every machine, there is none at "
                f"{config.model_path} on {os.uname().nodename}",
                where=config.where,
                fix="put the run on a file system that all machines share, or set "
                f"{config.where}.replicas=0",
            )
        self._engine, _ = open_engine(config.model_path, config.engine.with_slots(slots_share))
