"""Brings the weights of the day to the workers, each within its deadline.

Weights that come over a thin link may take longer than the deadline, but not a whole deadline
without any of them coming: that is a worker, or a link, that hangs. An adapter's base, which a new
worker needs as well, is part of them.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Protocol

from ground.errors import InfraError
from rollout.config import FleetSection
from rollout.seat import Seat
from rollout.task import BASE, Arriving

logger = logging.getLogger(__name__)


class Mark(Protocol):
    """Notes an event of a seat for the timeline."""

    def __call__(self, kind: str, seat: Seat, start: float, **details: object) -> None:
        """From then until now."""
        ...


class Loader:
    """Has the current weights, once there are any, and gives them to one worker after another.

    Args:
        mark: told of each hand-over.
    """

    def __init__(self, section: FleetSection, mark: Mark) -> None:
        self._section, self._mark = section, mark
        self.weights: tuple[int, object] | None = None
        """Version and what is handed over as it."""

    def is_current(self, seat: Seat) -> bool:
        """Whether it has acknowledged the current weights."""
        return self.weights is not None and self.weights[0] == seat.version

    async def load(self, seat: Seat) -> None:
        """Have the seat's worker load the current weights; a life that ends first leaves them to
        the next one.

        Raises:
            InfraError: it did not in time, or something else; its life is over.
            DataError: the weights do not fit the model.
        """
        assert self.weights
        version, weights = self.weights
        async with seat.loading:
            if seat.version == version:
                return
            if seat.worker is None or not seat.is_up:
                raise InfraError(f"{seat.name} is {seat.state}", where="fleet")
            started, before = time.time(), seat.pong.arriving
            try:
                loaded = await seat.within(
                    self._section.publish_deadline_seconds,
                    f"loading version {version}",
                    seat.worker.load(version, weights),
                    more=self._while_bytes_come(seat, version, before),
                )
            except InfraError as error:
                seat.lose(error.what)
                raise
            if loaded.version != version:
                seat.lose(f"version {version} must be acknowledged, got {loaded.version}")
                raise InfraError(seat.lost.result(), where=seat.name)
            seat.version = version
            phases = {f"{phase}_seconds": each for phase, each in loaded.seconds.items()}
            self._mark("handover", seat, started, version=version, drift=loaded.drift, **phases)

    def _while_bytes_come(
        self, seat: Seat, version: int, before: Arriving | None
    ) -> Iterator[float]:
        """Seconds that a load still has when its deadline has passed.

        Args:
            before: what had last come when it began.
        """
        while (got := seat.pong.arriving) and got.version in (version, BASE) and got != before:
            before = got
            logger.warning(
                "%s is still on its way to %s: %.1f of %.1f MB came, %.2f MB/s, %.0f s are left; "
                "the publication waits for this link, rl.step_deadline_seconds at most",
                f"the base of version {version}" if got.version == BASE else f"version {version}",
                *(seat.name, got.bytes / 1e6, got.total / 1e6),
                *(got.megabytes_per_second, got.seconds_left),
            )
            yield self._section.publish_deadline_seconds
