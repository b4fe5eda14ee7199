"""Who wants how many places on which machines, and the table that says when there are not enough.

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

_ROUNDING = 1e-9
"""Three tenths hold a tenth three times."""
_LOOK_SECONDS = 5.0
"""Between two looks whether a machine has come."""

logger = logging.getLogger("packtrain")


class PlacementError(SetupError):
    """What is asked for does not fit what is there, and never will; carries the table."""


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


@dataclass(frozen=True, slots=True)
class Need:
    """What ours need of a Ray cluster.

    Example:
        Need([Want("engines", 2, "mine: replicas x cpus_per_replica")], check, "mine", "lower …")
    """

    processors: Sequence[Want]
    """Of this machine, where the cluster is one of our own."""
    check: Callable[[Sequence[Mapping[str, float]]], None]
    """Refuses machines, by what each has, on which ours find no places."""
    where: str
    """The section of the recipe that a refusal names."""
    fix: str
    spare_cpus: float = 0.0
    """Processors that Ray may give away though the machine has not got them."""
    weights_bytes: int = 0
    """On their way through the object store at a time."""
    checks_own: bool = False
    """Whether machines are checked even where the cluster is one of our own."""


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
    wanted: Places,
    nodes: Sequence[Mapping[str, float]],
    *,
    where: str,
    fix: str,
    besides: Sequence[Places] = (),
) -> None:
    """Refuse a crew for whose members the machines of a cluster have not room at once.

    Args:
        besides: who else needs places; they are seated first.

    Raises:
        PlacementError: with want and have, machine by machine.
    """
    wants = [_line(wanted)]
    left, seated = [dict(node) for node in nodes], 0
    for other in besides:
        seated += min(other.count, sum(places(other.bundle, left)))
        left = other.taken_from(left)
        wants.append(_line(other))
    room = places(wanted.bundle, left)
    each = zip(nodes, room, strict=True)
    have = "; ".join(f"{in_words(node)}: {number}" for node, number in each)
    # Room for more workers is none for a teacher: each side counts up to what it wants.
    free = sum(room) if not besides else min(sum(room), wanted.count)
    require_room(wants, seated + free, f"places ({have})", where=where, fix=fix)


def _line(who: Places) -> Want:
    return Want(who.name, who.count, f"each {in_words(who.bundle)} of one machine")


def in_words(amounts: Mapping[str, float]) -> str:
    """`2 CPU and 1 GPU`."""
    return f"{amounts.get('CPU', 0):g} CPU and {amounts.get('GPU', 0):g} GPU"


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
