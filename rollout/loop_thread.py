"""An asyncio loop on a thread of its own, which carries out what other threads order.

running ── die ──▶ dead: every order, whether waiting or to come, raises the cause ──▶ ended
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any, TypeVar

from ground.errors import InfraError, PacktrainError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

_LAST_SECONDS = 5.0
"""Until cancelled tasks have ended, and then the thread."""


class LoopThread:
    """A loop and its thread; `order` may be called from any other thread.

    Args:
        name: of the thread.
        where: of errors.

    Example:
        loop = LoopThread("vllm", "vllm engine"); loop.order("pause", pause, 600.0); loop.end()
    """

    def __init__(self, name: str, where: str) -> None:
        self._where = where
        self._death: PacktrainError | None = None
        self._door = threading.Lock()
        """An order is queued before the death, or refused: none waits for a loop that has ended."""
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name=name, daemon=True)
        self._thread.start()

    @property
    def death(self) -> PacktrainError | None:
        """Why no order is taken any more."""
        return self._death

    def die(self, cause: PacktrainError) -> None:
        """Take no more orders; the first cause counts. Whoever waits gets it as his task ends."""
        with self._door:
            self._death = self._death or cause

    def order(
        self, name: str, action: Callable[[], Coroutine[Any, Any, Result]], seconds: float
    ) -> Result:
        """Have the loop do something, and wait for it.

        Raises:
            InfraError: it was not done in time, and is broken off.
            PacktrainError: what this loop died of.
        """
        if threading.current_thread() is self._thread:
            raise PacktrainError(
                f"{name} must not be ordered by a completion's callback: it would wait for itself",
                where=self._where,
            )
        done = self._queued(action)
        try:
            return done.result(seconds)
        except FutureTimeoutError:
            if done.done():  # the action's own
                raise
            done.cancel()
            raise InfraError(
                f"{name} must be done within {seconds:g} s, and was not",
                where=self._where,
            ) from None
        except CancelledError:
            cause = self._death or InfraError(f"{name} was cancelled", where=self._where)
            raise cause from None

    def soon(self, call: Callable[[], None]) -> None:
        """Have the loop call this; a dead one need not."""
        with self._door:
            if self._death is None:
                self.loop.call_soon_threadsafe(call)

    def cancel_others(self) -> None:
        """On the loop: whatever else runs there ends, orders with the cause of death."""
        for task in asyncio.all_tasks(self.loop) - {asyncio.current_task(self.loop)}:
            task.cancel()

    def end(self) -> None:
        """Stop and close the loop; what was ordered before fails. Does nothing the second time."""
        self.die(InfraError("its loop has ended", where=self._where))
        if self.loop.is_closed():
            return
        asyncio.run_coroutine_threadsafe(self._stop(), self.loop)
        self._thread.join(2 * _LAST_SECONDS)
        if self._thread.is_alive():
            logger.warning("thread %s does not end: its loop is left to it", self._thread.name)
        else:
            self.loop.close()

    async def _stop(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        self.cancel_others()
        if others:
            await asyncio.wait(others, timeout=_LAST_SECONDS)
        self.loop.stop()

    def _queued(self, action: Callable[[], Coroutine[Any, Any, Result]]) -> Future[Result]:
        with self._door:
            if self._death is not None:
                raise self._death
            return asyncio.run_coroutine_threadsafe(self._obey(action), self.loop)

    async def _obey(self, action: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """What fails while everything dies has failed of that."""
        try:
            if self._death is not None:
                raise self._death
            return await action()
        except Exception:
            if self._death is not None:
                raise self._death from None
            raise
