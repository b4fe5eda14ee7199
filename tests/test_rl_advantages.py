"""What a rollout is worth compared with its siblings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.advantages import centered

REWARDS = st.lists(st.floats(-10, 10), min_size=2, max_size=16)


def test_half_right_gives_plus_and_minus_one_half() -> None:
    assert centered([1, 0, 0, 1]) == (0.5, -0.5, -0.5, 0.5)


def test_one_of_four_right_is_not_divided_by_the_spread() -> None:
    assert centered([0, 0, 1, 0]) == (-0.25, -0.25, 0.75, -0.25)


def test_equal_rewards_give_exact_zeros_although_their_mean_is_rounded() -> None:
    assert sum([0.1] * 3) / 3 != 0.1
    assert centered([0.1] * 3) == (0.0, 0.0, 0.0)


@given(REWARDS)
def test_advantages_are_zero_exactly_when_the_group_is_flat(rewards: list[float]) -> None:
    assert all(a == 0 for a in centered(rewards)) == (max(rewards) == min(rewards))


def test_a_single_reward_has_no_baseline() -> None:
    with pytest.raises(ValueError, match="at least 2 rewards, got 1"):
        centered([1.0])
