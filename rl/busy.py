"""How much of the time anybody is at work."""

from __future__ import annotations

import time
from collections.abc import Callable


class BusyClock:
    """Measures the share of the time in which at least one body is inside.

    Example:
        with clock: …;  clock.share() → 0.8 since the last share()
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._inside, self._busy_seconds = 0, 0.0
        self._since = self._asked = now()

    def __enter__(self) -> None:
        self._tick()
        self._inside += 1

    def __exit__(self, *error: object) -> None:
        self._tick()
        self._inside -= 1

    def share(self) -> float:
        """Busy share since the last call, or since the beginning."""
        self._tick()
        elapsed, busy = self._since - self._asked, self._busy_seconds
        self._asked, self._busy_seconds = self._since, 0.0
        return busy / elapsed if elapsed > 0 else 0.0

    def _tick(self) -> None:
        now = self._now()
        if self._inside:
            self._busy_seconds += now - self._since
        self._since = now
