"""What a fleet asks of the machines under it: which are taken away, where to bear nobody, is there
room.

    look, every second or two ─▶ leaving: those that are drained, with so many seconds left
                             └─▶ has_room: whether one more worker would find a place
    doubt(node), after a worker there was lost ─▶ avoided, until it answers again
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


class Machines(Protocol):
    """What a fleet asks of them."""

    async def look(self) -> None:
        """See how they are by now."""
        ...

    async def doubt(self, node: str) -> None:
        """A worker there was lost: see whether the machine answers."""
        ...

    @property
    def leaving(self) -> Mapping[str, float]:
        """Seconds that machines have left which are being taken away, by node; infinite where
        nobody has said."""
        ...

    @property
    def avoided(self) -> frozenset[str]:
        """Nodes on which no worker is to be born: taken away, or cut off."""
        ...

    @property
    def sound(self) -> frozenset[str]:
        """Nodes that are there and need not be avoided."""
        ...

    @property
    def has_room(self) -> bool:
        """Whether one more worker would find a place."""
        ...


@dataclass(frozen=True, slots=True)
class StillMachines:
    """Machines to which nothing happens, as in simulations."""

    leaving: Mapping[str, float] = field(default_factory=dict)
    avoided: frozenset[str] = frozenset()
    sound: frozenset[str] = frozenset()
    has_room: bool = True

    async def look(self) -> None:
        """Nothing has changed."""

    async def doubt(self, node: str) -> None:
        """It answers."""
