"""What a rollout was worth compared with its siblings. Pure floats, neither torch nor Ray.

Shapes: G rollouts of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import fsum


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
    if max(rewards) == min(rewards):
        return (0.0,) * len(rewards)
    mean = fsum(rewards) / len(rewards)
    return tuple(reward - mean for reward in rewards)
