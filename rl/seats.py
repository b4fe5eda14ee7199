"""Which machine of a Ray cluster each rank of the learner gets: pure.

    machines (the run's own first) ─▶ seats ─▶ a machine per rank, rank 0 on the first

Rank 0 writes the run's files, so it is where they are. Ranks with GPUs fill a machine before they
begin the next, for what they exchange is fastest within one; ranks on processors alone are dealt
out one by one, for those of one machine share its memory's bandwidth. Where this leaves too little
room for the rollout workers the other way is taken. Both ways are tried, not all there are: what
is given fits, but a cluster that is all but full may be refused although it could be seated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rollout.places import Want, in_words, places, refusal

Resources = Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine of the cluster.

    Example:
        Machine("3f9c…", {"CPU": 16, "GPU": 8})
    """

    id: str
    resources: Resources


@dataclass(frozen=True, slots=True)
class Wanted:
    """So many equal bundles, each of one machine.

    Example:
        Wanted(2, {"CPU": 1, "GPU": 1})
    """

    count: int
    bundle: Resources


def seats(ranks: Wanted, workers: Wanted, machines: Sequence[Machine], *, fix: str) -> list[str]:
    """The machines of all ranks, by rank.

    Example:
        2 ranks of 1 CPU, machines a and b of 2 CPU → ["a", "b"]

    Raises:
        PlacementError: with want and have, machine by machine.
    """
    one_by_one = not ranks.bundle.get("GPU")
    tries = [_dealt(ranks, machines, one_by_one=way) for way in (one_by_one, not one_by_one)]
    left = [_places_left(ranks, workers, machines, dealt) for dealt in tries]
    for dealt, free in zip(tries, left, strict=True):
        if len(dealt) == ranks.count and free >= workers.count:
            return [machines[n].id for n in sorted(dealt)]
    best = max(zip(tries, left, strict=True), key=lambda each: (len(each[0]), each[1]))
    raise _refused(ranks, workers, machines, len(best[0]), best[1], fix)


def _dealt(ranks: Wanted, machines: Sequence[Machine], *, one_by_one: bool) -> list[int]:
    """The number of the machine of each rank, as far as there is room; none where the first machine
    has none."""
    free = places(ranks.bundle, [machine.resources for machine in machines])
    order = [0, *sorted(range(1, len(machines)), key=lambda n: -free[n])]
    dealt: list[int] = []
    while free[0] or dealt:
        open_ = [n for n in order if free[n]][: ranks.count - len(dealt)]
        if not open_:
            break
        for n in open_ if one_by_one else open_[:1]:
            dealt.append(n)
            free[n] -= 1
    return dealt


def _places_left(
    ranks: Wanted, workers: Wanted, machines: Sequence[Machine], dealt: Sequence[int]
) -> int:
    """How many workers there is room for besides ranks that sit so."""
    rests = [
        {
            name: amount - dealt.count(n) * ranks.bundle.get(name, 0)
            for name, amount in machine.resources.items()
        }
        for n, machine in enumerate(machines)
    ]
    return sum(places(workers.bundle, rests))


def _refused(
    ranks: Wanted,
    workers: Wanted,
    machines: Sequence[Machine],
    seated: int,
    free: int,
    fix: str,
) -> Exception:
    first, *others = [in_words(machine.resources) for machine in machines]
    have = "; ".join([f"this one: {first}", *others])
    return refusal(
        [
            Want("learner ranks", ranks.count, f"each {in_words(ranks.bundle)}, rank 0 here"),
            Want("rollout workers", workers.count, f"each {in_words(workers.bundle)}"),
        ],
        seated + min(free, workers.count),
        f"places (machines: {have})",
        where="rl.learner",
        fix=fix,
    )
