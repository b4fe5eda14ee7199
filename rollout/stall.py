"""When an engine counts as hung: nothing has come of any of its requests for too long."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from contextlib import suppress
from itertools import chain

from ground.errors import InfraError
from ground.records import Prompt
from rollout.engine import Completion


class StallClock:
    """Waits for completions for as long as any come.

    Args:
        seconds: without a single one that are too long; infinite where somebody else sees to that.
    """

    def __init__(self, seconds: float) -> None:
        self._moved, self._seconds = time.monotonic(), seconds

    def watch(self, futures: Iterable[Iterable[Future[Completion]]]) -> None:
        """Take note of each of these that comes."""
        for future in chain.from_iterable(futures):
            future.add_done_callback(self._move)

    def wait(self, future: Future[Completion], prompt: Prompt) -> Completion:
        """What a future comes to.

        Raises:
            InfraError: nothing has come of any of them for so long.
        """
        while True:
            left = self._moved + self._seconds - time.monotonic()
            with suppress(FutureTimeoutError):
                return future.result(None if math.isinf(left) else max(left, 0.0))
            if left <= 0:
                raise InfraError(
                    f"completions must come, none has for {self._seconds:g} s: prompt {prompt.id} "
                    "waits",
                    where="evaluation",
                    fix="on a slow machine use fewer slots or shorter completions",
                )

    def _move(self, future: Future[Completion]) -> None:
        self._moved = time.monotonic()
