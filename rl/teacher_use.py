"""What teachers have cost so far."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TeacherUse:
    """What the teachers have done since they began, by which their speed is known.

    Example:
        TeacherUse(teachers=1, seconds=41.0, rollouts=2_560)
    """

    teachers: int
    """That stay."""
    seconds: float
    """In which they spoke, summed over teachers."""
    rollouts: int
    """That they spoke to."""
