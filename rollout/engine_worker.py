"""An engine in a process of its own (a Ray actor), for stages that measure or judge."""

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
from rollout.config import EngineSection
from rollout.engine import Engine, Request, Scores, completed
from rollout.engine_host import EngineHost
from rollout.failures import sorted_failures


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


class EngineWorker(EngineHost):
    """Samples and scores; wrapped by `ray.remote` in rollout/ray_worker.py."""

    ROLE, OWNER = "engine", "stage"

    def __init__(self, config: EngineConfig) -> None:
        super().__init__(config.model_path, config.engine, 0, config.lease_seconds)
        self._where = config.where
        self._scorer = ThreadPoolExecutor(1, thread_name_prefix="score")
        self._orders = ThreadPoolExecutor(1, thread_name_prefix="order")
        self._numbers = count()

    async def sample(self, asked: bytes) -> bytes:
        """Completions of requests, in their order; cancelling the call aborts them.

        Asked twice, since an answer was lost, it samples twice: under ids of each asking's own.

        Args:
            asked: pickle of a list of `Request`s; the answer is one of `Completion`s.
        """
        requests, number = cast(list[Request], pickle.loads(asked)), next(self._numbers)
        name = f"sampling {requests[0].id} and {len(requests) - 1} more"
        with sorted_failures(name, memory_fix=self.memory_fix):
            faults.point("engine.sample")
            own = [replace(each, id=f"{each.id}#{number}") for each in requests]
            try:
                found = await completed([self.engine.submit(each) for each in own])
            except BaseException:
                self._orders.submit(self.engine.abort, [each.id for each in own])
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
        with sorted_failures(name, memory_fix=self.memory_fix):
            faults.point("engine.score")
            loop = asyncio.get_running_loop()
            scores: list[Scores] = await loop.run_in_executor(
                self._scorer, self.engine.score, token_ids, top_k
            )
        return pickle.dumps(scores)

    @property
    def memory_fix(self) -> str:
        return f"lower {self._where}.engine.num_slots or {self._where}.replicas"

    def opened(self, section: EngineSection) -> Engine:
        from rollout.engines import open_engine

        faults.point("engine.open")
        return open_engine(self._model_path, section)[0]

    def unseen_model(self) -> UnseenModelError:
        return UnseenModelError(
            f"the model must be readable on every machine, there is none at {self._model_path} on "
            f"{os.uname().nodename}",
            where=self._where,
            fix="put the run on a file system that all machines share, or set "
            f"{self._where}.replicas=0",
        )
