"""When the learner gets another number of ranks, and which: by hand."""

from __future__ import annotations

import pytest

from ground.errors import RecipeError
from rl.config import RlSection
from rl.share import Costs, Share, Split, best_split


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


@pytest.mark.parametrize(
    ("now", "costs", "wanted"),
    [
        # The fleet has shrunk to keep pace with a slow learner: 0.12 a sample becomes 0.04.
        (Split(1, 1), Costs(0.12, 0.04), Split(3, 1)),
        # The other way round: max(0.04 / 3, 0.12 / 1) becomes max(0.04 / 1, 0.12 / 3).
        (Split(3, 1), Costs(0.04, 0.12), Split(1, 3)),
        # As good as it gets.
        (Split(2, 2), Costs(0.08, 0.08), Split(2, 2)),
        # 0.055 would become 0.0525, within the band.
        (Split(2, 2), Costs(0.105, 0.11), Split(2, 2)),
    ],
)
def test_the_planner_s_split_is_taken_where_it_pays(
    now: Split, costs: Costs, wanted: Split
) -> None:
    assert best_split(now, costs, section()) == wanted


def test_bounds_hold() -> None:
    assert best_split(Split(1, 1), Costs(0.12, 0.04), section(max_ranks=2)).ranks == 2
    least = section(num_ranks=2, min_ranks=2)
    assert best_split(Split(3, 1), Costs(0.01, 0.12), least) == Split(2, 3)


def test_a_life_with_a_split_keeps_to_the_devices_of_the_recipe() -> None:
    given = Split(3, 1).applied(section())
    assert (given.learner.num_ranks, given.fleet.num_workers, given.fleet.most_workers) == (3, 1, 1)
    given = Split(2, 1).applied(section())
    assert (given.fleet.num_workers, given.fleet.most_workers) == (1, 2)


def numbers(learner: float, rollout: float, workers: int) -> dict[str, float]:
    names = ("learner_seconds_per_sample", "rollout_seconds_per_sample", "workers")
    return dict(zip(names, (learner, rollout, float(workers)), strict=True))


def test_nothing_is_said_before_speeds_are_settled_nor_between_cuts_nor_at_the_end() -> None:
    slow = numbers(0.06, 0.04, 1)  # of two ranks together: one alone takes 0.12
    share = Share(section(num_ranks=2), 2)
    said = [share.see(step, slow) for step in range(1, 6)]
    assert said == [None, None, None, Split(4 - 1, 1), None]
    assert Share(section(num_ranks=2), 2).see(2, {"loss": 1.0}) is None
    late = Share(section(num_ranks=2), 2)
    assert [late.see(step, slow) for step in (37, 38, 39, 40)] == [None] * 4


def test_without_a_bound_the_number_of_ranks_stays() -> None:
    share = Share(section(max_ranks=None), 1)
    assert [share.see(step, numbers(0.12, 0.04, 1)) for step in range(1, 9)] == [None] * 8


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
