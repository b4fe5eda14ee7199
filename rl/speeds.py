"""Speeds of learner, fleet and verifiers, and how many workers follow from them: pure.

Device-seconds for a sample, c, as in rl/placement.py, and what a step takes besides; each is the
median of the last five steps: a change shows after three of them, and a single slow step never
does.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass

WINDOW = 5
"""Steps whose median counts."""
BAND = 0.15
"""Share by which fleet and learner may be apart before the fleet is resized."""


@dataclass(frozen=True, slots=True)
class Speeds:
    """Device-seconds for a sample, a rollout that a step consumes.

    Example:
        Speeds(learner=0.021, rollout=0.035, reward=0.002)
    """

    learner: float
    """Of all learner devices together: the whole learner's seconds."""
    rollout: float
    """Of a worker."""
    reward: float
    """Of a worker's verifiers."""
    teacher: float = 0.0
    """Of a teacher; 0 without any."""
    rest: float = 0.0
    """Seconds of a step beyond these paces: hand-over, the last answers of a step, and what one
    side waits for the other because neither is even. It does not grow with the samples."""

    def step_seconds(
        self, workers: int, rollouts: float, *, overlaps: bool = True, teachers: int = 1
    ) -> float:
        """Predicted seconds of a step of so many rollouts, side by side or in turns."""
        paces = (self.learner, self.rollout / workers, self.teacher / max(teachers, 1))
        return rollouts * (max if overlaps else sum)(paces) + self.rest


class SpeedMeter:
    """Speeds as the median of the last `WINDOW` steps."""

    def __init__(self) -> None:
        self._seen: deque[Speeds] = deque(maxlen=WINDOW)

    def see(self, speeds: Speeds) -> None:
        """A step's speeds."""
        self._seen.append(speeds)

    @property
    def is_settled(self) -> bool:
        """Whether enough steps were seen to tell a change from an outlier."""
        return len(self._seen) > WINDOW // 2

    @property
    def speeds(self) -> Speeds | None:
        """The median of each; None before the first step."""
        if not self._seen:
            return None
        return Speeds(
            statistics.median(each.learner for each in self._seen),
            statistics.median(each.rollout for each in self._seen),
            statistics.median(each.reward for each in self._seen),
            statistics.median(each.teacher for each in self._seen),
            statistics.median(each.rest for each in self._seen),
        )

    def forget(self) -> None:
        """What was measured belongs to another fleet."""
        self._seen.clear()


def wanted(speeds: Speeds, workers: int, least: int, most: int, *, overlaps: bool = True) -> int:
    """Workers that the fleet should have: as many as keep pace with the learner, and in turns all
    that it may have, for then each of them makes the step shorter.

    Example:
        learner 0.02, rollout 0.07: 2 workers give 0.035 a sample, too slow; 4 give 0.0175
    """
    if not overlaps:
        return most
    pace = speeds.rollout / workers
    is_slow = pace > speeds.learner * (1 + BAND)
    is_idle = workers > 1 and speeds.rollout / (workers - 1) < speeds.learner * (1 - BAND)
    if not is_slow and not is_idle:
        return workers
    return min(max(math.ceil(speeds.rollout / speeds.learner), least), most)
