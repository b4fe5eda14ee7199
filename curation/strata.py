"""Prompts in groups that nothing tells apart, and seeded draws from them without replacement.

    Strata: prompts ─▶ stratum (capability, evidence)    separate: one of its own, once observed
    Lottery: strata ─▶ weight of the members left ─▶ SumTree ─▶ stratum ─▶ one of its members

A draw costs the logarithm of the number of strata, and a new lottery costs as much as there are
strata: neither depends on how many prompts share one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Strata:
    """Items by stratum: every item is in one, or removed.

    Example:
        Strata(["a", "b", "a"]) → keys ["a", "b"], of [0, 1, 0], sizes [2, 1]
    """

    def __init__(self, kinds: Sequence[tuple]) -> None:
        self.keys: list[tuple] = sorted(set(kinds))
        """What the members of each stratum have in common."""
        place = {key: number for number, key in enumerate(self.keys)}
        self.of = np.array([place[kind] for kind in kinds], dtype=np.int64)
        """[P] stratum of each item; that of a removed one is where it was last."""
        self.sizes: Integers = np.bincount(self.of, minlength=len(self.keys)).astype(np.int64)
        """[C] members of each stratum."""
        self._members: list[int] = np.argsort(self.of, kind="stable").tolist()
        self._place = np.argsort(np.array(self._members)).tolist()
        self._starts: list[int] = (np.cumsum(self.sizes) - self.sizes).tolist()

    def place(self, stratum: int, k: int) -> int:
        """Where the k-th member of a stratum stands in `members`."""
        return self._starts[stratum] + k

    def member(self, place: int) -> int:
        """The item at a place."""
        return self._members[place]

    def remove(self, items: Iterable[int]) -> None:
        """Take items out of their strata for good."""
        for item in items:
            stratum = int(self.of[item])
            self.sizes[stratum] -= 1
            last = self.place(stratum, int(self.sizes[stratum]))
            self._swap(self._place[item], last)

    def separate(self, items: Sequence[int]) -> None:
        """Give each item a stratum of its own, numbered on from the last, with the key it had."""
        first = len(self.keys)
        self.remove(items)
        for number, item in enumerate(items, start=first):
            self.keys.append(self.keys[int(self.of[item])])
            self.of[item] = number
            self._starts.append(len(self._members))
            self._place[item] = len(self._members)
            self._members.append(item)
        self.sizes = np.concatenate([self.sizes, np.ones(len(items), dtype=np.int64)])

    def _swap(self, one: int, two: int) -> None:
        members, place = self._members, self._place
        members[one], members[two] = members[two], members[one]
        place[members[one]], place[members[two]] = one, two


class Lottery:
    """Draws without replacement from some strata, one after another.

    The chance of an item is its weight over the weights of all that are left, as if items were
    sorted by weighted exponential clocks (Efraimidis and Spirakis, 2006).

    Args:
        numbers: [C] the strata that take part.
        weights: [C] weight of one member of each.
        random: gives two numbers per draw, so the n-th draw is a function of its seed and n.
    """

    def __init__(
        self, strata: Strata, numbers: Integers, weights: Floats, random: np.random.Generator
    ) -> None:
        self._strata, self._numbers, self._weights = strata, numbers, weights
        self._left = strata.sizes[numbers].copy()
        self._num_left = int(self._left.sum())
        self._tree = SumTree(self._left * weights)
        self._moved: dict[int, int] = {}
        """Members that stand elsewhere here, by place: a shuffle that leaves no trace."""
        self._random = random

    @property
    def num_left(self) -> int:
        """Items that were not drawn yet."""
        return self._num_left

    def draw(self) -> int:
        """The next item. Items of weight 0 come when no others are left."""
        if self._tree.total <= 0:
            self._weights = np.ones_like(self._weights)
            self._tree = SumTree(self._left.astype(float))
        which, luck = self._random.random(2)
        number = self._tree.find(which)
        left, stratum = int(self._left[number]), int(self._numbers[number])
        drawn = self._strata.place(stratum, min(int(luck * left), left - 1))
        last = self._strata.place(stratum, left - 1)
        item = self._at(drawn)
        self._moved[drawn] = self._at(last)
        self._left[number] = left - 1
        self._num_left -= 1
        self._tree.set(number, (left - 1) * float(self._weights[number]))
        return item

    def _at(self, place: int) -> int:
        return self._moved[place] if place in self._moved else self._strata.member(place)


class SumTree:
    """Values whose sum, and where in it a share falls, are known after every change.

    Each parent is exactly the rounded sum of its children, so nothing drifts however often values
    change, and a value of 0 is never found.

    Example:
        SumTree([1.0, 3.0]).find(0.2) == 0;  .find(0.3) == 1
    """

    def __init__(self, values: Sequence[float] | Floats) -> None:
        level = np.array(values, dtype=np.float64)
        self._levels = [level]
        while len(level) > 1:
            level = np.append(level, 0.0) if len(level) % 2 else level
            self._levels[-1] = level
            level = level[0::2] + level[1::2]
            self._levels.append(level)

    @property
    def total(self) -> float:
        """Sum of the values."""
        return float(self._levels[-1][0])

    def set(self, number: int, value: float) -> None:
        """Change a value."""
        self._levels[0][number] = value
        for below, above in zip(self._levels, self._levels[1:], strict=False):
            number //= 2
            above[number] = below[2 * number] + below[2 * number + 1]

    def find(self, share: float) -> int:
        """The value in which this share, 0 to below 1, of the sum falls."""
        rest, number = share * self.total, 0
        for level in self._levels[-2::-1]:
            number *= 2
            left, right = level[number], level[number + 1]
            if right > 0 and (rest >= left or left <= 0):
                rest, number = rest - left, number + 1
        return number
