"""Who wants what of the devices that there are, and the table that says when it cannot be had.

Ray waits for resources for ever, and a model that is too large fails hours later in the middle of
a load. So whoever is about to ask compares first, and refuses with all wants at once.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from ground.errors import SetupError

Value = TypeVar("Value")

_GIB = 2**30
_ROUNDING = 1e-9
"""Three tenths hold a tenth three times."""
_LOOK_SECONDS = 5.0
"""Between two looks whether a machine has come."""

logger = logging.getLogger("packtrain")


class PlacementError(SetupError):
    """What is asked for does not fit what is there, and never will; carries the table."""


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


@dataclass(frozen=True, slots=True)
class Want:
    """A line of the table that says why something does not fit.

    Example:
        Want("rollout workers", 64, "rl.fleet.num_workers 64 x cpus_per_worker 1")
    """

    name: str
    count: float
    because: str = ""


@dataclass(frozen=True, slots=True)
class Places:
    """So many equal bundles, each of one machine, of which others are to have what is left.

    Example:
        Places("teachers", 1, {"CPU": 1, "GPU": 1})
    """

    name: str
    count: int
    bundle: Mapping[str, float]

    def taken_from(self, nodes: Sequence[Mapping[str, float]]) -> list[dict[str, float]]:
        """What is left of machines, the last ones given first; what does not fit takes nothing."""
        left, wanted = [dict(node) for node in nodes], self.count
        for node in reversed(left):
            while wanted and places(self.bundle, [node])[0]:
                for name, amount in self.bundle.items():
                    node[name] = node.get(name, 0) - amount
                wanted -= 1
        return left


def require_room(wants: Sequence[Want], have: float, unit: str, *, where: str, fix: str) -> None:
    """Refuse at once what would otherwise wait for resources for ever.

    Raises:
        PlacementError: all wants together are more than there is; with the table.
    """
    if sum(want.count for want in wants) > have:
        raise refusal(wants, have, unit, where=where, fix=fix)


def places(bundle: Mapping[str, float], nodes: Sequence[Mapping[str, float]]) -> list[int]:
    """How many equal bundles each machine has room for; none is split between machines.

    Example:
        2 CPU and 4 GPU, machines of 16 CPU and 8 GPU, and of 3 CPU and 8 GPU → [2, 1]
    """
    return [
        min(int(node.get(name, 0) / amount + _ROUNDING) for name, amount in bundle.items())
        for node in nodes
    ]


def wait_for_room(check: Callable[[], Value], seconds: float) -> Value:
    """What a check gives as soon as it finds room; where it finds none in time, its refusal."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return check()
        except PlacementError as error:
            if time.monotonic() >= deadline:
                raise
            logger.warning("waiting %g s at most for room: %s", seconds, error)
            time.sleep(min(_LOOK_SECONDS, max(deadline - time.monotonic(), 0.0)))


def require_places(
    count: int,
    bundle: Mapping[str, float],
    nodes: Sequence[Mapping[str, float]],
    *,
    fix: str,
    besides: Sequence[Places] = (),
) -> None:
    """Refuse a fleet for whose workers the machines of a cluster have not room at once.

    Args:
        besides: who else needs places; they are seated first.

    Raises:
        PlacementError: with want and have, machine by machine.
    """
    wants = [Want("rollout workers", count, f"each {in_words(bundle)} of one machine")]
    left, seated = [dict(node) for node in nodes], 0
    for other in besides:
        seated += min(other.count, sum(places(other.bundle, left)))
        left = other.taken_from(left)
        because = f"each {in_words(other.bundle)} of one machine"
        wants.append(Want(other.name, other.count, because))
    room = places(bundle, left)
    each = zip(nodes, room, strict=True)
    have = "; ".join(f"{in_words(node)}: {number}" for node, number in each)
    # Room for more workers is none for a teacher: each side counts up to what it wants.
    free = sum(room) if not besides else min(sum(room), count)
    require_room(
        wants,
        seated + free,
        f"places ({have})",
        where="rl.fleet",
        fix=fix,
    )


def in_words(amounts: Mapping[str, float]) -> str:
    """`2 CPU and 1 GPU`."""
    return f"{amounts.get('CPU', 0):g} CPU and {amounts.get('GPU', 0):g} GPU"


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


def refusal(
    wants: Sequence[Want], have: float, unit: str, *, where: str, fix: str, besides: str = ""
) -> PlacementError:
    """The error with its table.

    Args:
        besides: what else stands in the way, where the sums alone would fit.
    """
    total = sum(want.count for want in wants)
    width = max([len(want.name) for want in wants] + [len("in all")])
    lines = [f"{'':{width}}  want  have"]
    lines += [f"{w.name:{width}}  {_number(w.count):>4}        {w.because}".rstrip() for w in wants]
    lines.append(f"{'in all':{width}}  {_number(total):>4}  {_number(have):>4}  {unit}")
    of = unit.partition(" (")[0]
    what = f"the models must fit: they want {_number(total)} {of}, there are {_number(have)}"
    if math.isinf(total):
        what = f"the models must fit: no number of {unit} would do, there are {_number(have)}"
    why = "\n    ".join(["", *lines])
    return PlacementError(f"{what}{besides}", where=where, why=why, fix=fix)


def _number(value: float) -> str:
    return "none" if math.isinf(value) else f"{value:g}"
