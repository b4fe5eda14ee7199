"""What a rollout is worth compared with its siblings, and when a group teaches nothing."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rl_doubles import PROMPT

from ground.records import Group, Rollout
from rl.advantages import (
    batch_advantages,
    centered,
    group_advantages,
    group_std,
    leave_one_out,
    over_batch_std,
    pass_at_k,
)
from rl.objective_config import AdvantageSection, BaselineAdvantages, PassAtKAdvantages

REWARDS = st.lists(st.floats(-10, 10), min_size=2, max_size=16)
BASELINES = [
    BaselineAdvantages(kind="centered"),
    BaselineAdvantages(kind="batch_std"),
    BaselineAdvantages(kind="group_std"),
    BaselineAdvantages(kind="leave_one_out"),
]


def make_group(rewards: list[float], passed: list[bool] | None = None) -> Group:
    verdicts = passed or [reward > 0 for reward in rewards]
    rollouts = tuple(
        Rollout(index, (), text="", reward=reward, passed=verdict)
        for index, (reward, verdict) in enumerate(zip(rewards, verdicts, strict=True))
    )
    return Group("g.0", PROMPT, (1,), rollouts)


def test_half_right_gives_plus_and_minus_one_half() -> None:
    assert centered([1, 0, 0, 1]) == (0.5, -0.5, -0.5, 0.5)


def test_one_of_four_right_is_not_divided_by_the_spread() -> None:
    assert centered([0, 0, 1, 0]) == (-0.25, -0.25, 0.75, -0.25)


def test_group_std_divides_by_the_groups_own_spread() -> None:
    # Deviations 3/4 and -1/4 over the root of (9 + 1 + 1 + 1) / 16 / 4 = 3/16.
    root = math.sqrt(3)
    assert group_std([0, 0, 1, 0]) == pytest.approx([-1 / root, -1 / root, root, -1 / root])


def test_leave_one_out_compares_with_the_mean_of_the_others() -> None:
    assert leave_one_out([3, 0, 1]) == pytest.approx([3 - 0.5, 0 - 2, 1 - 1.5])


def test_a_batch_is_divided_by_its_common_spread() -> None:
    # Root mean square of ±1/2 and ±3/2: sqrt((2 * 1/4 + 2 * 9/4) / 4) = sqrt(5/4).
    groups = [make_group([1, 0]), make_group([3, 0])]
    got = batch_advantages(groups, BaselineAdvantages(kind="batch_std"))
    assert got[0] == pytest.approx([0.5 / math.sqrt(1.25), -0.5 / math.sqrt(1.25)])
    assert got[1] == pytest.approx([1.5 / math.sqrt(1.25), -1.5 / math.sqrt(1.25)])
    # One group by itself is not divided: what is flat does not depend on the company.
    assert group_advantages(groups[1], BaselineAdvantages(kind="batch_std")) == (1.5, -1.5)


def test_other_estimators_do_not_look_beyond_the_group() -> None:
    groups = [make_group([1, 0]), make_group([3, 0])]
    assert batch_advantages(groups, BaselineAdvantages()) == [(0.5, -0.5), (1.5, -1.5)]
    assert over_batch_std([]) == []
    assert over_batch_std([(0.0, 0.0)]) == [(0.0, 0.0)]


def test_pass_at_k_of_hand_counted_sets() -> None:
    # One of four right, k = 2: three of six pairs hold it, so the mean is 1/2 and the deviation
    # 1/2. Its own pairs are all right: (1 - 1/2) / (1/2) = 1. A wrong answer is in three pairs, one
    # of them right: (1/3 - 1/2) / (1/2) = -1/3.
    assert pass_at_k([False, True, False, False], 2) == pytest.approx([-1 / 3, 1, -1 / 3, -1 / 3])


@given(st.lists(st.booleans(), min_size=2, max_size=9), st.integers(1, 8))
def test_pass_at_k_is_the_mean_over_all_sets_of_k(passed: list[bool], k: int) -> None:
    if k >= len(passed):
        return
    sets = [
        (chosen, any(passed[i] for i in chosen)) for chosen in combinations(range(len(passed)), k)
    ]
    mean = sum(right for _, right in sets) / len(sets)
    sigma = math.sqrt(mean * (1 - mean))
    expected = []
    for index in range(len(passed)):
        own = [right for chosen, right in sets if index in chosen]
        expected.append((sum(own) / len(own) - mean) / sigma if sigma else 0.0)
    assert pass_at_k(passed, k) == pytest.approx(expected, abs=1e-9)


@given(st.lists(st.booleans(), min_size=2, max_size=9))
def test_pass_at_1_is_the_verdict_over_the_groups_spread(passed: list[bool]) -> None:
    assert pass_at_k(passed, 1) == pytest.approx(group_std([float(p) for p in passed]), abs=1e-12)


def test_pass_at_k_is_flat_as_soon_as_every_set_holds_a_right_answer() -> None:
    section = PassAtKAdvantages(kind="pass_at_k", k=3)
    two_wrong = make_group([1, 1, 0, 0], [True, True, False, False])
    three_wrong = make_group([1, 0, 0, 0], [True, False, False, False])
    assert group_advantages(two_wrong, section) == (0.0, 0.0, 0.0, 0.0)
    assert group_advantages(three_wrong, section)[0] > 0
    assert not any(group_advantages(make_group([0.0] * 4), section))


def test_pass_at_k_goes_by_verdicts_not_by_partial_credit() -> None:
    section = PassAtKAdvantages(kind="pass_at_k", k=2)
    group = make_group([0.3, 0.9, 0.0, 0.0], [False, True, False, False])
    assert group_advantages(group, section) == pytest.approx([-1 / 3, 1, -1 / 3, -1 / 3])


def test_equal_rewards_give_exact_zeros_although_their_mean_is_rounded() -> None:
    assert sum([0.1] * 3) / 3 != 0.1
    assert centered([0.1] * 3) == (0.0, 0.0, 0.0)


@given(REWARDS, st.sampled_from(BASELINES))
def test_advantages_are_zero_exactly_when_the_rewards_are_equal(
    rewards: list[float], section: AdvantageSection
) -> None:
    advantages = group_advantages(make_group(rewards), section)
    assert all(math.isfinite(a) for a in advantages)
    assert any(advantages) == (max(rewards) != min(rewards))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("section", BASELINES)
def test_75_a_poisoned_reward_is_never_flat(poison: float, section: AdvantageSection) -> None:
    """It would pass for an easy or hopeless prompt; as NaN it ends in the learner's guard."""
    advantages = group_advantages(make_group([poison] * 3), section)
    assert all(math.isnan(a) for a in advantages)
    assert any(advantages)


@pytest.mark.parametrize("size", [0, 1])
def test_76_fewer_than_two_rewards_have_no_baseline(size: int) -> None:
    for section in (*BASELINES, PassAtKAdvantages(kind="pass_at_k", k=1)):
        with pytest.raises(ValueError, match=f"at least 2 rewards, got {size}"):
            group_advantages(make_group([1.0] * size), section)
