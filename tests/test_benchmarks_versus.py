"""The sums behind the contest with TRL, by hand: flat shares, pools, when a target was reached."""

from __future__ import annotations

import pytest

from benchmarks.contest import Score
from benchmarks.exam import Mark, reached
from benchmarks.flat_pools import Kind, assemble, flat_chance
from benchmarks.pruning import chosen
from ground.errors import DataError
from ground.records import Message, Prompt


def kind(name: str, number: int, flat: float) -> Kind:
    asked = [(Message("user", f"{name} {n}"),) for n in range(number)]
    made = [Prompt.make(each, capability=name, reward="exact", answer="") for each in asked]
    return Kind(made, flat)


def test_a_flat_group_is_all_right_or_all_wrong():
    assert flat_chance(2, 4, group=2) == pytest.approx(1 / 3), "1 + 1 of 6 pairs"
    assert flat_chance(3, 4, group=2) == pytest.approx(1 / 2), "3 + 0 of 6 pairs"
    assert flat_chance(0, 24) == flat_chance(24, 24) == 1.0
    assert flat_chance(4, 11) == 0.0, "no group of eight has room in 4 right or 7 wrong answers"


def test_a_pool_has_the_flat_share_that_was_asked_for():
    kinds = {
        "learnable": kind("learnable", 30, 0.1),
        "solved": kind("solved", 100, 0.85),
        "hopeless": kind("hopeless", 50, 1.0),
    }
    # (2 * 0.85 + 1) / 3 = 0.9 of the others: (0.7 - 0.1) / (0.9 - 0.7) = 3 of them to a learnable
    pool = assemble(kinds, 0.7, 20, seed=0)
    counts = {name: sum(p.capability == name for p in pool) for name in kinds}
    assert counts == {"learnable": 20, "solved": 40, "hopeless": 20}
    assert sum(kinds[p.capability].flat for p in pool) / 80 == pytest.approx(0.7)
    assert len({p.id for p in pool}) == 80
    assert pool == assemble(kinds, 0.7, 20, seed=0) != assemble(kinds, 0.7, 20, seed=1)
    flatter = {p.id for p in assemble(kinds, 0.8, 20, seed=0)}
    assert {p.id for p in pool if p.capability == "learnable"} <= flatter
    with pytest.raises(DataError, match="needs 61 hopeless ones, there are 50"):
        assemble(kinds, 0.8, 26, seed=0)


def test_a_target_is_reached_between_two_exams():
    marks = [Mark(5, 20.0, 0.5), Mark(10, 30.0, 0.4), Mark(15, 50.0, 0.8), Mark(20, 60.0, 0.9)]
    assert reached(marks, 0.6) == pytest.approx((12.5, 40.0))
    assert reached(marks, 0.95) is None
    assert reached(marks, 0.45) == (5, 20.0), "nothing is known of what was before the first"
    assert reached([], 0.5) is None


def test_who_arrives_is_better_than_who_does_not():
    assert min(Score(0.01, 5.0), Score(0.0, 90.0), Score(0.0, 80.0)) == Score(0.0, 80.0)


def test_rows_are_chosen_by_rank_within_each_capability():
    rows = [
        {"id": f"{name}{rank}", "capability": name, "meta_rank": rank}
        for name in "ab"
        for rank in (2, 0, 3, 1)
    ]

    def ids(which: str, share: float) -> list[str]:
        return [str(row["id"]) for row in chosen(rows, which, share, seed=0)]

    assert ids("hardest", 0.5) == ["a2", "a3", "b2", "b3"]
    assert ids("easiest", 0.25) == ["a0", "b0"]
    assert ids("all", 1.0) == sorted(str(row["id"]) for row in rows)
    assert ids("random", 0.5) == ids("random", 0.5) and len(ids("random", 0.5)) == 4
    assert [each[0] for each in ids("random", 0.5)] == ["a", "a", "b", "b"]
