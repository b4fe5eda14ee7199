"""What can be waited for of a fleet, until it has failed for good."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from ground.errors import InfraError, PacktrainError


class Changing:
    """Whoever changes says so with `tell`; whoever waits does so in `until`.

    Lives on one asyncio loop.

    Args:
        patience_seconds: after which waiting is an error.
        describe: says, for that error, how its workers are.
    """

    def __init__(self, patience_seconds: float, describe: Callable[[], str]) -> None:
        self._patience_seconds, self._describe = patience_seconds, describe
        self._changed = asyncio.Event()
        self._failure: PacktrainError | None = None

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a change makes this true, or the fleet has failed.

        Raises:
            InfraError: workers take longer than all their lives may.
            PacktrainError: what the fleet failed with.
        """
        seconds = self._patience_seconds
        try:
            async with asyncio.timeout(seconds):
                while self._failure is None and not condition():
                    await self._changed.wait()
        except TimeoutError:
            raise InfraError(
                f"workers must be ready within {seconds:g} s, they are: {self._describe()}",
                where="fleet",
            ) from None
        self.check()

    async def change(self) -> None:
        """Wait for the next change, however long that takes: somebody is at work.

        Raises:
            PacktrainError: what the fleet failed with.
        """
        self.check()
        await self._changed.wait()
        self.check()

    def check(self) -> None:
        """Nothing more comes of a fleet that has failed.

        Raises:
            PacktrainError: what it failed with.
        """
        if self._failure is not None:
            raise self._failure

    def tell(self) -> None:
        """Wake everybody who waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _fail(self, error: PacktrainError) -> None:
        """From now on every call raises this; the first failure counts."""
        self._failure = self._failure or error
        self.tell()
