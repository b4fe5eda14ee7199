"""Devices, the models that want them, and whether these can be seated on their machines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_GIB = 2**30


@dataclass(frozen=True, slots=True)
class Devices:
    """What there is: machines of equal devices.

    Example:
        Devices((8, 8), bytes_each=80e9)    # two machines of eight GPUs
    """

    machines: tuple[int, ...]
    """Devices of each machine."""
    bytes_each: float = math.inf
    """Memory of a device that models may fill."""

    @property
    def count(self) -> int:
        """Devices in all."""
        return sum(self.machines)

    @staticmethod
    def of(count: int, *, per_machine: int = 8, bytes_each: float = math.inf) -> Devices:
        """So many devices in full machines, the last one perhaps not."""
        full, rest = divmod(count, per_machine)
        return Devices((per_machine,) * full + (rest,) * bool(rest), bytes_each)


@dataclass(frozen=True, slots=True)
class Consumer:
    """A model that works on every sample.

    Example:
        Consumer("rollout", seconds=3.2, width=8, replica_bytes=220e9)
    """

    name: str
    seconds: float
    """Device-seconds that it takes for a sample."""
    width: int = 1
    """Devices of a replica, a power of two: tensor parallelism."""
    replica_bytes: float = 0.0
    """Spread over the devices of each replica: an engine's weights and KV cache."""
    shared_bytes: float = 0.0
    """Spread over all its devices: a sharded learner's weights, gradients and moments."""
    device_bytes: float = 0.0
    """On each of its devices however many there are: activations, buffers."""
    least: int = 1
    """Replicas at least."""
    most: int | None = None
    """Replicas at most."""

    def __post_init__(self) -> None:
        if self.width < 1 or self.width & (self.width - 1):
            raise ValueError(f"{self.name}: width must be a power of two, got {self.width}")
        if not self.seconds > 0:
            raise ValueError(f"{self.name}: seconds must be positive, got {self.seconds}")

    def bytes_on_each(self, devices: int) -> float:
        """What a device of it holds when it has so many."""
        own = self.replica_bytes / self.width + self.device_bytes
        return own + self.shared_bytes / max(devices, 1)

    def fewest(self, bytes_each: float) -> float:
        """Devices without which it does not fit into its memory; infinite where none suffice."""
        free = bytes_each - self.replica_bytes / self.width - self.device_bytes
        if free < 0 or (free == 0 and self.shared_bytes):
            return math.inf
        needed = math.ceil(self.shared_bytes / free) if self.shared_bytes else 0
        return self.width * max(self.least, math.ceil(needed / self.width))

    def because(self, devices: Devices) -> str:
        """In words: what a device must hold, or over how many the state is spread."""
        alone = self.replica_bytes / self.width + self.device_bytes
        reasons = [f"{self.least} x {self.width} side by side"]
        if alone and math.isfinite(devices.bytes_each):
            reasons.append(f"{alone / _GIB:.1f} of {devices.bytes_each / _GIB:.1f} GiB on each")
        if self.shared_bytes:
            reasons.append(f"{self.shared_bytes / _GIB:.1f} GiB spread over all")
        if self.most is not None:
            reasons.append(f"at most {self.most} x {self.width}")
        return ", ".join(reasons)


def fits(devices: Devices, consumers: Sequence[Consumer], counts: Sequence[int]) -> bool:
    """Whether so many replicas of each can be seated, machine by machine.

    Widest first into the first machine with room; widths are powers of two, so whatever order
    fits, this one does. A replica wider than a machine takes whole machines.
    """
    free = sorted(devices.machines, reverse=True)
    order = sorted(zip(consumers, counts, strict=True), key=lambda each: -each[0].width)
    for consumer, count in order:
        left = count
        for n, room in enumerate(free):
            if consumer.width <= room and left:
                taken = min(left, room // consumer.width)
                free[n], left = room - taken * consumer.width, left - taken
        while left and (whole := _whole_machines(devices, free, consumer.width)):
            for n in whole:
                free[n] = 0
            left -= 1
        if left:
            return False
    return True


def _whole_machines(devices: Devices, free: Sequence[int], width: int) -> list[int]:
    """Unused machines that together hold one wide replica exactly; none where it is not wide."""
    largest = max(devices.machines, default=0)
    unused = [n for n, room in enumerate(free) if room == largest]
    need, rest = divmod(width, largest) if largest else (0, 1)
    return unused[:need] if width > largest and not rest and len(unused) >= need else []
