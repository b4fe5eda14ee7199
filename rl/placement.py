"""Which model gets how many devices: pure arithmetic on speeds, widths and memory.

    plan(Devices, consumers) ──▶ Placement, or PlacementError with want and have (rollout/places.py)

Learner, rollout, teacher, judge and reward all have to be through with a sample before it counts.
Consumer i takes c_i device-seconds for one and gets n_i devices, so it is through with one every
c_i / n_i seconds. Where all work side by side (`max_staleness` of 1 and more) the slowest sets the
pace, max(c_i / n_i), and with two of them the best split is the learner's share
c_t / (c_t + c_g). Where they take turns (`max_staleness: 0`) the pace is the sum of all c_i / n_i,
and the best shares are as the square roots of the costs.

Counts are whole replicas. A replica is `width` devices, a power of two, side by side in one machine
as long as it is no wider than that. Side by side, plan() is exact: a pace needs a
certain least of everyone, and the best pace is the least one whose needs can be seated. In turns it
tries all splits where these are few; where they are many it gives a replica where it saves most per
device and then exchanges, within 5 % of the best (tests/test_rl_placement.py, by brute force).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from rl.room import Consumer, Devices, fits
from rollout.places import Want, refusal

_HALVINGS = 60
_ROUNDING = 1e-12
"""A pace is found to within this; a replica more for less than that would be the rounding's."""
_FEW_SPLITS = 20_000
"""So many splits are tried one by one; where there are more, a replica is a small part of all."""
_MANY = 512
"""Devices from which a split is begun near the optimum rather than at the least."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Who gets how many devices, and what follows from it.

    Example:
        Placement({"learner": 16, "rollout": 48}, {"learner": .07, "rollout": .067}, True, 0)
    """

    devices: Mapping[str, int]
    paces: Mapping[str, float]
    """Seconds per sample of each, c / n."""
    overlaps: bool
    left_over: int
    """Devices that would make nothing faster."""

    @property
    def seconds(self) -> float:
        """Seconds per sample of the whole loop."""
        return (max if self.overlaps else sum)(self.paces.values())

    @property
    def bottleneck(self) -> str:
        """Who sets the pace, or most of it."""
        return max(self.paces, key=lambda name: self.paces[name])

    def idle_share(self, name: str) -> float:
        """Share of its time in which its devices wait for the others."""
        return 1 - self.paces[name] / self.seconds if self.seconds else 0.0


def plan(devices: Devices, consumers: Sequence[Consumer], *, overlaps: bool = True) -> Placement:
    """Give every consumer its devices.

    Args:
        overlaps: whether they work side by side (asynchronous) or in turns (`max_staleness: 0`).

    Raises:
        PlacementError: the least that they need does not fit; at once, with want and have.
    """
    counts = _least_counts(devices, consumers)
    give = _give_side_by_side if overlaps else _give_in_turns
    give(devices, consumers, counts)
    placed = {each.name: counts[n] * each.width for n, each in enumerate(consumers)}
    paces = {each.name: each.seconds / placed[each.name] for each in consumers}
    return Placement(placed, paces, overlaps, devices.count - sum(placed.values()))


def _least_counts(devices: Devices, consumers: Sequence[Consumer]) -> list[int]:
    fewest = [each.fewest(devices.bytes_each) for each in consumers]
    counts = [
        0 if math.isinf(n) else int(n) // c.width for n, c in zip(fewest, consumers, strict=True)
    ]
    is_seated = not any(map(math.isinf, fewest)) and fits(devices, consumers, counts)
    is_allowed = all(c.most is None or n <= c.most for n, c in zip(counts, consumers, strict=True))
    if is_seated and is_allowed:
        return counts
    wants = [
        Want(each.name, count, each.because(devices))
        for each, count in zip(consumers, fewest, strict=True)
    ]
    machines = ", ".join(map(str, devices.machines[:8]))
    is_cut = sum(fewest) <= devices.count and not is_seated
    more = "" if any(map(math.isinf, fewest)) else "more devices, or "
    raise refusal(
        wants,
        devices.count,
        "devices",
        where="placement",
        fix=f"give {more}devices with more memory, or a smaller model",
        besides=f" but not side by side: machines of {machines}" * is_cut,
    )


def _give_side_by_side(devices: Devices, consumers: Sequence[Consumer], counts: list[int]) -> None:
    """As many replicas as the least pace needs for which all can be seated; found by halving."""
    slow = max(map(_pace, consumers, counts))
    fast = 0.0
    for _ in range(_HALVINGS):
        pace = (slow + fast) / 2
        needed = _needed(consumers, counts, pace)
        if needed is not None and fits(devices, consumers, needed):
            slow = pace
        else:
            fast = pace
    counts[:] = _needed(consumers, counts, slow) or counts


def _needed(consumers: Sequence[Consumer], least: Sequence[int], pace: float) -> list[int] | None:
    """Replicas of each to keep a pace; None where more would be needed than are allowed."""
    needed = [
        max(low, math.ceil(each.seconds / (pace * each.width) * (1 - _ROUNDING)))
        for each, low in zip(consumers, least, strict=True)
    ]
    is_allowed = all(c.most is None or n <= c.most for n, c in zip(needed, consumers, strict=True))
    return needed if is_allowed else None


def _give_in_turns(devices: Devices, consumers: Sequence[Consumer], counts: list[int]) -> None:
    """The best of all splits where these are few; else a replica where it saves most per device, as
    long as any fits, and then exchanges."""
    if math.comb(devices.count, len(consumers)) <= _FEW_SPLITS:
        counts[:] = min(
            _splits(devices, consumers, counts), key=lambda split: _in_turns(consumers, split)
        )
        return
    fewest = list(counts)
    if devices.count > _MANY:
        counts[:] = _nearly_by_roots(devices, consumers, counts)
    while True:
        free = [n for n in range(len(counts)) if _can_grow(devices, consumers, counts, n)]
        if not free:
            break
        best = max(free, key=lambda n: _saving(consumers[n], counts[n]) / consumers[n].width)
        counts[best] += 1
    while _exchange(devices, consumers, counts, fewest):
        pass


def _splits(
    devices: Devices, consumers: Sequence[Consumer], least: Sequence[int]
) -> Iterator[list[int]]:
    """Every split that has seats, and is better than those before it."""
    best = math.inf
    ranges = [
        range(low, min(devices.count // each.width, each.most or devices.count) + 1)
        for each, low in zip(consumers, least, strict=True)
    ]
    for split in _within(ranges, [each.width for each in consumers], devices.count):
        seconds = _in_turns(consumers, split)
        if seconds < best and fits(devices, consumers, split):
            best = seconds
            yield split


def _within(ranges: Sequence[range], widths: Sequence[int], count: int) -> Iterator[list[int]]:
    """Every choice of one number from each range that takes so many devices at most."""
    if not ranges:
        yield []
        return
    for number in ranges[0]:
        if (left := count - number * widths[0]) < 0:
            return
        yield from ([number, *rest] for rest in _within(ranges[1:], widths[1:], left))


def _nearly_by_roots(
    devices: Devices, consumers: Sequence[Consumer], least: Sequence[int]
) -> list[int]:
    """Most of what the roots of the costs say, to begin with; the least where that has no seats."""
    total = sum(math.sqrt(each.seconds) for each in consumers)
    share = 0.99 * devices.count / total
    begun = [
        max(low, min(int(share * math.sqrt(c.seconds)) // c.width, c.most or devices.count))
        for c, low in zip(consumers, least, strict=True)
    ]
    return begun if fits(devices, consumers, begun) else list(least)


def _exchange(
    devices: Devices, consumers: Sequence[Consumer], counts: list[int], fewest: Sequence[int]
) -> bool:
    """Take replicas of one for as many of another as then fit, where that is faster."""
    before = _in_turns(consumers, counts)
    for giver in range(len(counts)):
        for taker in range(len(counts)):
            given = max(consumers[taker].width // consumers[giver].width, 1)
            if giver == taker or counts[giver] - given < fewest[giver]:
                continue
            trial = list(counts)
            trial[giver] -= given
            while _can_grow(devices, consumers, trial, taker):
                trial[taker] += 1
            if _in_turns(consumers, trial) < before * (1 - 1e-12):
                counts[:] = trial
                return True
    return False


def _can_grow(
    devices: Devices, consumers: Sequence[Consumer], counts: Sequence[int], which: int
) -> bool:
    most = consumers[which].most
    if most is not None and counts[which] >= most:
        return False
    more = [count + (n == which) for n, count in enumerate(counts)]
    if sum(c.width * n for c, n in zip(consumers, more, strict=True)) > devices.count:
        return False
    return fits(devices, consumers, more)


def _pace(consumer: Consumer, count: int) -> float:
    return consumer.seconds / (count * consumer.width)


def _saving(consumer: Consumer, count: int) -> float:
    return _pace(consumer, count) - _pace(consumer, count + 1)


def _in_turns(consumers: Sequence[Consumer], counts: Sequence[int]) -> float:
    return sum(_pace(each, count) for each, count in zip(consumers, counts, strict=True))
