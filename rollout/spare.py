"""A worker process in waiting: libraries imported, nothing loaded, so that a loss is mended sooner.

    wanted → preparing → ready ⇄ pinged → taken → wanted …
                 └─ lost ─▶ wanted, or given up after three in a row

Importing torch and transformers is most of a worker's way back (4 to 5 s of one core), and needs
neither model nor weights.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Generic

from ground.errors import InfraError, PacktrainError
from rollout.config import FleetSection
from rollout.seat import Kind

_MAX_FAILURES = 3

logger = logging.getLogger(__name__)


class Spare(Generic[Kind]):
    """Keeps one prepared worker ready: `run` in the background, `take` when a seat is lost.

    Args:
        quiet: returns when the fleet needs the processors for nothing more urgent.
        is_well_placed: whether it may stay on its machine.
    """

    def __init__(
        self,
        section: FleetSection,
        spawn: Callable[[], Kind],
        quiet: Callable[[], Awaitable[None]],
        is_well_placed: Callable[[Kind], bool],
    ) -> None:
        self._section, self._spawn, self._quiet = section, spawn, quiet
        self._is_well_placed = is_well_placed
        self._ready: Kind | None = None
        self._current: Kind | None = None
        self._taken = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        """Whether `take` would give one."""
        return self._ready is not None and self._is_well_placed(self._ready)

    def take(self) -> Kind | None:
        """The prepared worker, if there is one; from now on it is the caller's."""
        if not self.is_ready:
            return None
        worker, self._ready, self._current = self._ready, None, None
        self._taken.set()
        return worker

    async def run(self) -> None:
        """Make one whenever there is none, until too many were lost in a row."""
        failures = 0
        while failures < _MAX_FAILURES:
            await self._quiet()
            try:
                await self._keep_one()
                failures = 0
            except (PacktrainError, TimeoutError) as error:
                failures += not self._found_no_room(error)
                logger.warning("the spare worker is lost (%d in a row): %s", failures, error)
                self._drop()

    async def close(self) -> None:
        """End it; its process is gone when this returns."""
        if self._current:
            await self._current.close()

    async def _keep_one(self) -> None:
        """Returns when it has been taken, or had to leave its machine."""
        worker = self._current = self._spawn()
        self._taken.clear()
        async with asyncio.timeout(self._section.start_deadline_seconds):
            await worker.prepare()
        self._ready = worker
        while not self._taken.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(self._section.ping_every_seconds):
                    await self._taken.wait()
            if self._ready is worker and not self.is_ready:
                self._ready = None
                return await worker.close()
            if self._ready is worker:
                await self._ping(worker)

    def _found_no_room(self, error: Exception) -> bool:
        """Whether no machine took it in in time, which is nobody's fault."""
        return isinstance(error, TimeoutError) and not (self._current and self._current.is_placed)

    async def _ping(self, worker: Kind) -> None:
        seconds = self._section.ping_deadline_seconds
        try:
            async with asyncio.timeout(seconds):
                await worker.ping()
        except TimeoutError:
            raise InfraError(f"a ping must be done within {seconds:g} s", where="spare") from None

    def _drop(self) -> None:
        worker, self._current, self._ready = self._current, None, None
        if worker:
            worker.kill()
