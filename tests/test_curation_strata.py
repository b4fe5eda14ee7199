"""Draws without replacement: their chances by hand, their cost by counting."""

from __future__ import annotations

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.strata import Lottery, Strata, SumTree


def make_lottery(weights: list[float], kinds: list[tuple], seed: int = 0) -> Lottery:
    strata = Strata(kinds)
    numbers = np.arange(len(strata.keys))
    return Lottery(strata, numbers, np.array(weights), np.random.default_rng(seed))


def members(strata: Strata, stratum: int) -> list[int]:
    places = [strata.place(stratum, k) for k in range(int(strata.sizes[stratum]))]
    return [strata.member(place) for place in places]


def test_items_of_a_kind_share_a_stratum() -> None:
    strata = Strata([("b",), ("a",), ("b",), ("b",)])
    assert (strata.keys, strata.of.tolist(), strata.sizes.tolist()) == (
        [("a",), ("b",)],
        [1, 0, 1, 1],
        [1, 3],
    )
    strata.separate([2, 1])
    assert strata.sizes.tolist() == [0, 2, 1, 1] and strata.of.tolist() == [1, 3, 2, 1]
    assert [sorted(members(strata, number)) for number in range(4)] == [[], [0, 3], [2], [1]]
    strata.remove([0, 2])
    assert [members(strata, number) for number in range(4)] == [[], [3], [], [1]]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=12), st.data())
def test_every_item_is_in_its_stratum_alone(kinds: list[int], data: st.DataObject) -> None:
    strata = Strata([(kind,) for kind in kinds])
    items = range(len(kinds))
    split = data.draw(st.lists(st.sampled_from(items), unique=True))
    gone = data.draw(st.lists(st.sampled_from(items), unique=True))
    strata.separate(split)
    strata.remove(gone)
    found = {number: members(strata, number) for number in range(len(strata.keys))}
    assert sorted(item for each in found.values() for item in each) == sorted(set(items) - {*gone})
    assert all(strata.of[item] == number for number, each in found.items() for item in each)


def test_the_chance_of_every_order_is_that_of_weighted_clocks() -> None:
    """Items 0 and 1 weigh 1 each, item 2 weighs 2: first 1/4, 1/4, 1/2, then over what is left."""
    weight = {0: 1.0, 1: 1.0, 2: 2.0}
    counts: Counter[tuple[int, ...]] = Counter()
    rounds = 20_000
    for seed in range(rounds):
        lottery = make_lottery([1.0, 2.0], [("a",), ("a",), ("b",)], seed)
        counts[tuple(lottery.draw() for _ in range(3))] += 1
    for order in permutations(weight):
        chance, left = 1.0, 4.0
        for item in order:
            chance, left = chance * weight[item] / left, left - weight[item]
        assert counts[order] / rounds == pytest.approx(chance, abs=0.015)


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=9), st.integers(0, 99))
def test_every_item_comes_once_and_those_without_weight_last(
    weights: list[float], seed: int
) -> None:
    kinds = [(number // 2,) for number in range(2 * len(weights))]
    lottery = make_lottery(weights, kinds, seed)
    drawn = [lottery.draw() for _ in kinds]
    assert sorted(drawn) == list(range(len(kinds))) and lottery.num_left == 0
    is_weightless = [weights[item // 2] == 0 for item in drawn]
    assert is_weightless == sorted(is_weightless)


def test_a_lottery_leaves_the_strata_as_they_were() -> None:
    strata = Strata([("a",)] * 5)
    before = members(strata, 0)
    lottery = Lottery(strata, np.array([0]), np.array([1.0]), np.random.default_rng(0))
    assert [lottery.draw() for _ in range(5)] != before == members(strata, 0)


def test_shares_of_a_sum_by_hand() -> None:
    tree = SumTree([1.0, 0.0, 3.0])
    assert [tree.find(share) for share in (0.0, 0.24, 0.25, 0.99)] == [0, 0, 2, 2]
    tree.set(0, 0.0)
    assert (tree.total, tree.find(0.0)) == (3.0, 2)
    tree.set(2, 0.0)
    assert tree.total == 0


@given(st.lists(st.sampled_from([0.0, 1e-300, 0.1, 1.0, 1e9]), min_size=1, max_size=40))
def test_nothing_of_value_0_is_ever_found(values: list[float]) -> None:
    tree = SumTree(values)
    if tree.total > 0:
        for share in (0.0, 0.3, 0.999999, np.nextafter(1.0, 0.0)):
            assert values[tree.find(float(share))] > 0
