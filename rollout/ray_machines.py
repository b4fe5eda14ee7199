"""The machines of a Ray cluster: what Ray says of them, and whether they answer.

Ray takes a machine whose link broke for dead after a minute or so, and would place the successor of
a lost worker there until then. A connection of our own tells within a second whether it answers.
"""

from __future__ import annotations

import asyncio
import math
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

import ray
from ray._private.state import state
from ray.exceptions import RayError

_ANSWER_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class _Machine:
    """A living machine of the cluster."""

    address: tuple[str, int]
    """Of its raylet."""
    free: Mapping[str, float]


class RayMachines:
    """Those of the cluster that this process has joined.

    Example:
        machines = RayMachines({"CPU": 1}); await machines.look(); machines.leaving → {"1f…": 27.4}

    Args:
        bundle: what a worker takes of one machine (rollout/bundle.py).
    """

    def __init__(self, bundle: Mapping[str, float]) -> None:
        self._bundle = bundle
        self._living: dict[str, _Machine] = {}
        self._leave_at: dict[str, float] = {}
        self._cut_off: frozenset[str] = frozenset()
        self._looking = asyncio.Lock()

    async def look(self) -> None:
        """Ask Ray, and those that were cut off themselves."""
        async with self._looking:
            await asyncio.to_thread(self._look)

    async def doubt(self, node: str) -> None:
        """See `Machines.doubt`."""
        async with self._looking:
            self._cut_off |= {node}
            await asyncio.to_thread(self._look)

    @property
    def leaving(self) -> Mapping[str, float]:
        """See `Machines.leaving`."""
        now = time.time()
        return {node: at - now for node, at in self._leave_at.items()}

    @property
    def avoided(self) -> frozenset[str]:
        """See `Machines.avoided`."""
        return self._cut_off | self._leave_at.keys()

    @property
    def sound(self) -> frozenset[str]:
        """See `Machines.sound`."""
        return frozenset(self._living) - self.avoided

    @property
    def has_room(self) -> bool:
        """See `Machines.has_room`."""
        free = [self._living[node].free for node in self.sound]
        return any(
            all(each.get(name, 0.0) >= amount for name, amount in self._bundle.items())
            for each in free
        )

    def _look(self) -> None:
        with suppress(RayError):  # a cluster that is gone is others' to notice
            self._living = _living()
            self._leave_at = _leave_at()
            # Nobody is born on the dead, so they need not be avoided.
            doubted = [node for node in self._cut_off if node in self._living]
            self._cut_off = frozenset(node for node in doubted if not self._answers(node))

    def _answers(self, node: str) -> bool:
        try:
            socket.create_connection(self._living[node].address, _ANSWER_SECONDS).close()
        except OSError:
            return False
        return True


def _living() -> dict[str, _Machine]:
    free = cast(Mapping[str, Mapping[str, float]], state.available_resources_per_node())
    nodes = cast(Sequence[Mapping[str, Any]], ray.nodes())
    return {
        str(node["NodeID"]): _Machine(
            (str(node["NodeManagerAddress"]), int(node["NodeManagerPort"])),
            free.get(str(node["NodeID"]), {}),
        )
        for node in nodes
        if node["Alive"]
    }


def _leave_at() -> dict[str, float]:
    """Unix seconds by which machines that are drained will be gone."""
    told = cast(Mapping[str, int], state.get_draining_nodes())
    return {node: at / 1000 if at else math.inf for node, at in told.items()}
