"""What a group says about its prompt: does it teach, and if not, why not."""

from __future__ import annotations

from enum import StrEnum

from ground.records import Group


class Band(StrEnum):
    """Where a group's rewards lie; only a mixed group has a gradient."""

    MIXED = "mixed"
    ALL_0 = "all-0"
    """Flat, and no rollout passed: too hard for now."""
    ALL_1 = "all-1"
    """Flat, and every rollout passed: nothing left to learn."""
    OTHER = "flat"
    """Equal rewards although the verdicts differ or are mixed with errors."""


def band(group: Group) -> Band:
    """Classify a group by flatness of its rewards (exact), then by the verifier's verdicts."""
    if not group.is_flat:
        return Band.MIXED
    passed = sum(rollout.passed for rollout in group.rollouts)
    if passed == 0:
        return Band.ALL_0
    return Band.ALL_1 if passed == len(group.rollouts) else Band.OTHER
