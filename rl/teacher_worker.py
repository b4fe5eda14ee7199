"""A teacher in a process of its own (a Ray actor): hears a group, gives its word on it.

    prepare (libraries) → open (the teacher's weights) → speak, ping … → close

Its weights never change. It speaks on a thread of its own, so that it answers pings meanwhile, and
to one group after another. Nobody's teacher, one that hears no ping for its lease, ends itself.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from distill.config import RolloutDistillSection
from distill.word import Teaching
from ground.exits import pid_space
from ground.imports import without_collection
from ground.lease import Fence, Lease
from ground.records import Group
from ground.roles import enter_role
from rollout.failures import sorted_failures
from rollout.task import Home, Loaded, Pong
from rollout.weights import this_node

if TYPE_CHECKING:
    from distill.teacher import Teacher


@dataclass(frozen=True, slots=True)
class TeacherConfig:
    """All that a teacher needs to come up.

    Example:
        TeacherConfig(section.distill, teaching, incarnation=0, lease_seconds=150)
    """

    section: RolloutDistillSection
    teaching: Teaching
    incarnation: int
    """Life of the run that it belongs to; it takes no messages of another one."""
    lease_seconds: float

    @property
    def bundle(self) -> dict[str, float]:
        """What Ray reserves for it."""
        return self.section.bundle


class TeacherWorker:
    """Serves one teacher; wrapped by `ray.remote` in rollout/ray_worker.py."""

    def __init__(self, config: TeacherConfig) -> None:
        self._config, self._fence = config, Fence(config.incarnation)
        self._lease: Lease | None = None
        self._teacher: Teacher | None = None
        self._mouth = ThreadPoolExecutor(1, thread_name_prefix="speak")

    async def prepare(self) -> Home:
        """Import the libraries; returns where its process is."""
        with sorted_failures("importing the teacher's libraries"), without_collection():
            import rl.speech  # noqa: F401
        return Home(pid_space(), os.getpid(), this_node())

    async def open(self, index: int, slots_share: float = 1.0) -> None:
        """Load the weights, once.

        Args:
            slots_share: of a pass's tokens, for one that ended for want of memory.
        """
        if self._lease:  # asked twice, since the answer was lost on its way
            return
        enter_role(f"teacher/{index}")
        with sorted_failures("opening the teacher"):
            await asyncio.get_running_loop().run_in_executor(self._mouth, self._open, slots_share)
        self._lease = Lease("controller", self._config.lease_seconds)

    async def ping(self, incarnation: int) -> Pong:
        """Renew the lease; answers while it speaks."""
        self._fence.check(incarnation)
        if self._lease:
            self._lease.renew()
        return Pong()

    async def load(self, incarnation: int, version: int, published: object) -> Loaded:
        """Its weights are those that it was opened with, under whatever number."""
        self._fence.check(incarnation)
        return Loaded(version, {}, 0.0)

    async def speak(self, asked: bytes) -> bytes:
        """The word on a group.

        Args:
            asked: pickle of the incarnation and the group.

        Returns:
            Pickle of the word and of the seconds that it took.
        """
        incarnation, group = cast(tuple[int, Group], pickle.loads(asked))
        self._fence.check(incarnation)
        with sorted_failures(f"the word on group {group.id}"):
            loop = asyncio.get_running_loop()
            return await loop.run_in_executor(self._mouth, self._speak, group)

    async def close(self) -> None:
        """What waits is not spoken to any more; the process goes next."""
        self._mouth.shutdown(wait=False, cancel_futures=True)

    def _open(self, share: float) -> None:
        import torch

        from rl.speech import open_teacher

        section = self._config.section
        torch.set_num_threads(section.threads)
        tokens = max(int(section.pass_tokens * share), 1)
        section = section.model_copy(update={"pass_tokens": tokens})
        self._teacher = open_teacher(section, self._config.teaching)

    def _speak(self, group: Group) -> bytes:
        from rl.speech import word_on

        assert self._teacher is not None
        began = time.monotonic()
        word = word_on(group, self._teacher, self._config.teaching)
        return pickle.dumps((word, time.monotonic() - began))
