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

from ground.errors import InfraError, PacktrainError
from rollout.config import FleetSection
from rollout.seat import Worker

_MAX_FAILURES = 3

logger = logging.getLogger(__name__)


class Spare:
    """Keeps one prepared worker ready: `run` in the background, `take` when a seat is lost.

    Args:
        quiet: returns when the fleet needs the processors for nothing more urgent.
    """

    def __init__(
        self,
        section: FleetSection,
        spawn: Callable[[], Worker],
        quiet: Callable[[], Awaitable[None]],
    ) -> None:
        self._section, self._spawn, self._quiet = section, spawn, quiet
        self._ready: Worker | None = None
        self._current: Worker | None = None
        self._taken = asyncio.Event()

    @property
    def is_ready(self) -> bool:
        """Whether `take` would give one."""
        return self._ready is not None

    def take(self) -> Worker | None:
        """The prepared worker, if there is one; from now on it is the caller's."""
        worker, self._ready = self._ready, None
        if worker:
            self._current = None
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
                failures += 1
                logger.warning("the spare worker is lost (%d in a row): %s", failures, error)
                self._drop()

    async def close(self) -> None:
        """End it; its process is gone when this returns."""
        if self._current:
            await self._current.close()

    async def _keep_one(self) -> None:
        """Returns when it has been taken."""
        worker = self._current = self._spawn()
        self._taken.clear()
        async with asyncio.timeout(self._section.start_deadline_seconds):
            await worker.prepare()
        self._ready = worker
        while not self._taken.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(self._section.ping_every_seconds):
                    await self._taken.wait()
            if self._ready is worker:
                await self._ping(worker)

    async def _ping(self, worker: Worker) -> None:
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
