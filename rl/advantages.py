"""What a rollout was worth compared with its siblings. Pure floats, neither torch nor Ray.

Shapes: G rollouts of a group.

A group is flat when all its advantages are zero: `group_advantages` decides that, for each
estimator in its own way. A reward that is not finite makes the whole group NaN, never flat, so that
it ends in the learner's guard rather than among the easy prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import comb, fsum, hypot, isfinite, nan, sqrt

from ground.records import Group
from rl.objective_config import AdvantageSection, PassAtKAdvantages


def group_advantages(group: Group, section: AdvantageSection) -> tuple[float, ...]:
    """[G] advantages of one group by itself; all exactly zero iff there is nothing to learn."""
    if isinstance(section, PassAtKAdvantages):
        return pass_at_k([rollout.passed for rollout in group.rollouts], section.k)
    if section.kind == "group_std":
        return group_std(group.rewards)
    if section.kind == "leave_one_out":
        return leave_one_out(group.rewards)
    return centered(group.rewards)


def batch_advantages(groups: Sequence[Group], section: AdvantageSection) -> list[tuple[float, ...]]:
    """[G] advantages of each group of a whole step: before any split over ranks or passes."""
    advantages = [group_advantages(group, section) for group in groups]
    return over_batch_std(advantages) if section.kind == "batch_std" else advantages


def centered(rewards: Sequence[float]) -> tuple[float, ...]:
    """Reward minus the group's mean: A_i = R_i - mean_G(R), without a division by the spread.

    Dividing by the group's standard deviation would weigh nearly solved and nearly hopeless
    prompts up (Dr.GRPO, arXiv 2503.20783). A flat group gives exact zeros, although the mean of
    equal floats need not equal them.

    Args:
        rewards: [G], at least two, or there is nothing to compare with.

    Example:
        centered([1, 0, 0, 1]) == (0.5, -0.5, -0.5, 0.5)
    """
    if len(rewards) < 2:
        raise ValueError(f"a baseline needs at least 2 rewards, got {len(rewards)}")
    if not all(map(isfinite, rewards)):
        return (nan,) * len(rewards)
    if max(rewards) == min(rewards):
        return (0.0,) * len(rewards)
    mean = fsum(rewards) / len(rewards)
    return tuple(reward - mean for reward in rewards)


def group_std(rewards: Sequence[float]) -> tuple[float, ...]:
    """Centred rewards over the group's standard deviation (GRPO, arXiv 2402.03300).

    The deviation is that of the G rewards themselves (divided by G), without an epsilon: equal
    rewards are caught before.

    Example:
        group_std([1, 0, 0, 0]) == (sqrt(3), -1 / sqrt(3), -1 / sqrt(3), -1 / sqrt(3))
    """
    deviations = centered(rewards)
    spread = hypot(*deviations) / sqrt(len(deviations))
    return tuple(deviation / spread for deviation in deviations) if spread else deviations


def leave_one_out(rewards: Sequence[float]) -> tuple[float, ...]:
    """Reward minus the mean of the others (RLOO, arXiv 2402.14740): centred times G / (G - 1).

    Example:
        leave_one_out([1, 0, 0, 1]) == (2/3, -2/3, -2/3, 2/3)
    """
    size = len(rewards)
    return tuple(deviation * size / (size - 1) for deviation in centered(rewards))


def pass_at_k(passed: Sequence[bool], k: int) -> tuple[float, ...]:
    """Advantages of rollouts when a set of k is right as soon as one of it is (arXiv 2508.10751).

    Averaged over all sets of k out of G in closed form, with N⁻ wrong answers:
    R̄ = 1 - C(N⁻, k) / C(G, k), s = sqrt(R̄ (1 - R̄)), A⁺ = (1 - R̄) / s and
    A⁻ = (1 - R̄ - C(N⁻ - 1, k - 1) / C(G - 1, k - 1)) / s. With s = 0 there is nothing to learn:
    no answer is right, or so many are that every set of k has one (N⁻ < k).

    Example:
        one of four right, k = 2: R̄ = 1/2, s = 1/2, A⁺ = 1, A⁻ = (1/2 - 2/3) / (1/2) = -1/3
    """
    size, wrong = len(passed), len(passed) - sum(passed)
    if size < 2:
        raise ValueError(f"a baseline needs at least 2 rewards, got {size}")
    if wrong == size or wrong < k:
        return (0.0,) * size
    missed = comb(wrong, k) / comb(size, k)
    sigma = sqrt(missed * (1 - missed))
    right_value = missed / sigma
    wrong_value = (missed - comb(wrong - 1, k - 1) / comb(size - 1, k - 1)) / sigma
    return tuple(right_value if ok else wrong_value for ok in passed)


def over_batch_std(advantages: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    """Divide a batch's centred advantages by their standard deviation (ScaleRL, 2510.13786).

    They have mean zero group by group, so the deviation is their root mean square.

    Example:
        [(0.5, -0.5), (1.5, -1.5)] → rms sqrt(1.25) → [(0.447, -0.447), (1.342, -1.342)]
    """
    values = [value for group in advantages for value in group]
    spread = hypot(*values) / sqrt(max(len(values), 1))
    return [tuple(value / spread if spread else value for value in group) for group in advantages]
