"""When the learner gets another number of ranks, and which: by hand."""

from __future__ import annotations

import pytest

from ground.errors import RecipeError
from rl.config import RlSection
from rl.placement import plan
from rl.room import Consumer, Devices
from rl.share import Share, Split, best_split, splits


def section(**learner: object) -> RlSection:
    """One rank and at most three workers: four devices."""
    return RlSection.model_validate(
        {
            "steps": 40,
            "checkpoint_every": 2,
            "fleet": {"num_workers": 1, "max_workers": 3},
            "learner": {"max_ranks": 3, **learner},
        }
    )


def test_every_split_has_the_devices_of_the_recipe_and_its_bounds() -> None:
    assert splits(section()) == [Split(1, 3), Split(2, 2), Split(3, 1)]
    assert splits(section(num_ranks=2, min_ranks=2)) == [Split(2, 3), Split(3, 2)]
    assert splits(section(max_ranks=None)) == [Split(1, 3)]


@pytest.mark.parametrize(
    ("now", "learner", "rollout", "wanted"),
    [
        # The fleet has shrunk to keep pace with a slow learner: 0.12 a sample becomes 0.04.
        (Split(1, 1), {1: 0.12}, 0.04, Split(3, 1)),
        # The other way round: max(0.013, 0.12) becomes max(0.04, 0.12 / 3).
        (Split(3, 1), {3: 0.04 / 3}, 0.12, Split(1, 3)),
        # As good as it gets: max(0.04, 0.04).
        (Split(2, 2), {2: 0.04}, 0.08, Split(2, 2)),
        # max(0.10, 0.06) would become max(0.05, 0.09): within the band.
        (Split(1, 3), {1: 0.10}, 0.18, Split(1, 3)),
        # max(0.10, 0.05) would become max(0.05, 0.075).
        (Split(1, 3), {1: 0.10}, 0.15, Split(2, 2)),
        # Two ranks were there before, and no faster than one.
        (Split(1, 3), {1: 0.10, 2: 0.09}, 0.15, Split(1, 3)),
    ],
)
def test_the_split_with_the_cheapest_sample_is_taken_where_it_pays(
    now: Split, learner: dict[int, float], rollout: float, wanted: Split
) -> None:
    assert best_split(now, learner, rollout, section()) == wanted


@pytest.mark.parametrize("staleness", [0, 1])
@pytest.mark.parametrize("ratio", [0.2, 0.5, 1.0, 2.0, 5.0])
def test_it_is_as_fast_as_the_planner_s(staleness: int, ratio: float) -> None:
    asked = section().model_copy(update={"max_staleness": staleness})
    sides = [Consumer("learner", ratio, most=3), Consumer("rollout", 1.0, most=3)]
    planned = plan(Devices((4,)), sides, overlaps=staleness > 0)
    worst = Split(3, 1) if ratio < 1 else Split(1, 3)
    found = best_split(worst, {worst.ranks: ratio / worst.ranks}, 1.0, asked)
    paces = ratio / found.ranks, 1.0 / found.workers
    assert (max(paces) if staleness else sum(paces)) == pytest.approx(planned.seconds)


def test_a_life_with_a_split_keeps_to_the_devices_of_the_recipe() -> None:
    given = Split(2, 2).applied(section())
    assert (given.learner.num_ranks, given.fleet.num_workers, given.fleet.most_workers) == (2, 2, 2)


def numbers(learner: float, rollout: float, workers: int) -> dict[str, float]:
    names = ("learner_seconds_per_sample", "rollout_seconds_per_sample", "workers")
    return dict(zip(names, (learner, rollout, float(workers)), strict=True))


def test_nothing_is_said_before_speeds_are_settled_nor_between_cuts_nor_at_the_end() -> None:
    slow = numbers(0.06, 0.04, 1)  # with three ranks and two workers 0.04
    share = Share(section(num_ranks=2))
    said = [share.see(step, slow) for step in range(1, 6)]
    assert said == [None, None, None, Split(3, 2), None]
    assert Share(section(num_ranks=2)).see(2, {"loss": 1.0}) is None
    late = Share(section(num_ranks=2))
    assert [late.see(step, slow) for step in (37, 38, 39, 40)] == [None] * 4


def test_without_a_bound_the_number_of_ranks_stays() -> None:
    share = Share(section(max_ranks=None))
    assert [share.see(step, numbers(0.12, 0.04, 1)) for step in range(1, 9)] == [None] * 8


def test_ranks_that_proved_to_be_no_help_are_given_back_and_not_taken_again() -> None:
    """Three of them are as slow as one alone."""
    share = Share(section())
    for ranks, rollout, workers, wanted in (
        (1, 0.03, 3, Split(3, 1)),  # 0.12, hoped for: max(0.04, 0.03)
        (3, 0.03, 1, None),  # max(0.12, 0.03), and so it would be with one
        (3, 0.20, 1, Split(1, 3)),  # 0.20 now, max(0.12, 0.20 / 3) with one
        (1, 0.03, 3, Split(2, 2)),  # 0.12; three are known, two are not
    ):
        share.begin(ranks)
        said = [share.see(step, numbers(0.12, rollout, workers)) for step in range(1, 5)]
        assert said == [None, None, None, wanted], (ranks, rollout)


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"learner": {"max_ranks": 2, "num_ranks": 3}}, "max_ranks must be at least num_ranks"),
        ({"learner": {"max_ranks": 2, "min_ranks": 2}}, "min_ranks must be at most num_ranks"),
        ({"learner": {"min_ranks": 2, "num_ranks": 3}}, "min_ranks belongs to max_ranks"),
        ({"learner": {"max_ranks": 2}, "fleet": {}}, "max_ranks needs fleet.max_workers"),
        ({"learner": {"max_ranks": 2, "cpus_per_rank": 2}}, "must take the same devices"),
        ({"learner": {"max_ranks": 2, "gpus_per_rank": 1}}, "must take the same devices"),
    ],
)
def test_bounds_that_cannot_be_followed_are_refused(
    settings: dict[str, dict[str, object]], what: str
) -> None:
    whole = {"steps": 4, "fleet": {"max_workers": 3}, **settings}
    with pytest.raises((ValueError, RecipeError), match=what):
        RlSection.model_validate(whole)
