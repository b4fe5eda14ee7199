"""An engine with the weights of its model's folder, in a process of its own (a Ray actor).

    prepare (libraries) → open (the model's folder) → what a subclass is asked, ping … → close

It is born, pinged, leased, killed and replaced like a rollout worker (rollout/roster.py); its
weights come from the folder and stay.
"""

from __future__ import annotations

import asyncio
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from ground.exits import pid_space
from ground.imports import without_collection
from ground.lease import Fence, Lease
from ground.roles import enter_role
from rollout.config import EngineSection
from rollout.engine import Engine
from rollout.failures import MEMORY_FIX, sorted_failures
from rollout.task import Home, Loaded, Pong
from rollout.weights import this_node


class EngineHost(ABC):
    """Serves one engine.

    Args:
        incarnation: life of the run that messages must be of.
        lease_seconds: it ends itself when its owner is silent for so long.
    """

    ROLE: ClassVar[str]
    """What it is to whom it serves."""
    OWNER: ClassVar[str]
    """Who renews the lease."""

    def __init__(
        self, model_path: Path, section: EngineSection, incarnation: int, lease_seconds: float
    ) -> None:
        self._model_path, self._section = model_path, section
        self._fence, self._lease_seconds = Fence(incarnation), lease_seconds
        self._lease: Lease | None = None
        self._engine: Engine | None = None

    async def prepare(self) -> Home:
        """Import the libraries; returns where its process is."""
        with sorted_failures(f"importing the {self.ROLE}'s libraries"), without_collection():
            from rollout.engines import import_engine

            import_engine(self._section.kind)
        return Home(pid_space(), os.getpid(), this_node())

    async def open(self, index: int, slots_share: float = 1.0) -> None:
        """Load the model and make ready."""
        if self._lease:  # asked twice, since the answer was lost on its way
            return
        enter_role(f"{self.ROLE}/{index}")
        with sorted_failures(f"opening the {self.ROLE}", memory_fix=self.memory_fix):
            if not (self._model_path / "config.json").is_file():
                raise self.unseen_model()
            self._engine = self.opened(self._section.with_slots(slots_share))
        self._lease = Lease(self.OWNER, self._lease_seconds)

    async def ping(self, incarnation: int) -> Pong:
        """Renew the lease; answers while the engine is at work."""
        self._fence.check(incarnation)
        if self._lease:
            self._lease.renew()
            self.engine.waiting()  # raises when the engine is dead
        return Pong()

    async def load(self, incarnation: int, version: int, published: object) -> Loaded:
        """Nothing to swap: it has the weights of its folder, whatever version that is."""
        self._fence.check(incarnation)
        return Loaded(version, {}, 0.0)

    async def close(self) -> None:
        """End the engine; its children are gone when this returns."""
        if self._engine:
            await asyncio.to_thread(self._engine.close)

    @property
    def engine(self) -> Engine:
        """The engine, once it is open."""
        assert self._engine is not None
        return self._engine

    @property
    def memory_fix(self) -> str:
        """What to do when it is memory that lacks."""
        return MEMORY_FIX

    @abstractmethod
    def opened(self, section: EngineSection) -> Engine:
        """The engine, ready; whoever only creates hosts needs no torch, so it is imported here."""

    @abstractmethod
    def unseen_model(self) -> Exception:
        """What is wrong when this machine does not see the model's folder."""
