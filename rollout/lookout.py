"""Has workers leave machines that are taken away, in time.

A machine that is drained, or that its cloud wants back, is announced: from then on its workers get
no new groups. They end those that they have, but those that are not ended shortly before the
machine goes are sampled again by others. Who waits for room, kept from a machine that was cut off,
may be born there as soon as that answers again.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from rollout.machines import Machines
from rollout.seat import Seat

_LOOK_SECONDS = 2.0
_CLOSING_SECONDS = 10.0
"""Kept of a machine's time for ending its workers in order, but half of the time at most."""

logger = logging.getLogger(__name__)


class Lookout:
    """Looks at the machines as long as it runs.

    Args:
        seats: of the fleet, whoever is there by then.
        leave: has a seat leave, which knows by when it must.
    """

    def __init__(
        self, machines: Machines, seats: Sequence[Seat], leave: Callable[[Seat], None]
    ) -> None:
        self._machines, self._seats, self._leave = machines, seats, leave

    async def run(self) -> None:
        """Look every other second."""
        while True:
            await asyncio.sleep(_LOOK_SECONDS)
            await self._machines.look()
            leaving = self._machines.leaving
            for seat in [seat for seat in self._seats if not (seat.is_retired or seat.is_drained)]:
                if seat.worker and seat.worker.node in leaving:
                    self._see_off(seat, leaving[seat.worker.node])
                is_kept_out = seat.worker and not seat.worker.is_placed
                if is_kept_out and seat.kept_from & self._machines.sound:
                    seat.begin_anew()

    def _see_off(self, seat: Seat, seconds: float) -> None:
        logger.warning("%s leaves its machine, which is taken away in %.0f s", seat.name, seconds)
        left = max(seconds - _CLOSING_SECONDS, seconds / 2)
        seat.leave_by = asyncio.get_running_loop().time() + left
        self._leave(seat)
