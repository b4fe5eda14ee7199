"""What a group says about its prompt: does it teach, and if not, why not."""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

from ground.records import Group


class Band(StrEnum):
    """What a group is good for; only a mixed group has a gradient."""

    MIXED = "mixed"
    ALL_0 = "all-0"
    """Flat, and no rollout passed: too hard for now."""
    ALL_1 = "all-1"
    """Flat, and every rollout passed: nothing left to learn."""
    OTHER = "flat"
    """No gradient although the verdicts differ: equal rewards, or too many right for pass@k."""


def band(group: Group, advantages: Sequence[float]) -> Band:
    """Classify a group: flat iff all its advantages are zero, then by the verifier's verdicts.

    Args:
        advantages: [G], by the run's own estimator.
    """
    if any(advantages):
        return Band.MIXED
    passed = sum(rollout.passed for rollout in group.rollouts)
    if passed == 0:
        return Band.ALL_0
    return Band.ALL_1 if passed == len(group.rollouts) else Band.OTHER
