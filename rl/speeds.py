"""Speeds of learner, fleet and verifiers, and how many workers follow from them: pure.

Device-seconds for a sample, c, as in rl/placement.py, and what a step takes besides. Decisions
follow their medians over five steps: a change shows after three of them, and a single slow step
never does. Predictions follow their means over ten: where both sides share cores, steps alternate
between fast ones and slow ones, and a median is the one or the other.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

WINDOW = 5
"""Steps whose median counts."""
LONG_WINDOW = 10
"""Steps whose mean counts, the greatest and the least left out."""
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
    """Speeds of the last steps."""

    def __init__(self) -> None:
        self._seen: deque[Speeds] = deque(maxlen=LONG_WINDOW)

    def see(self, speeds: Speeds) -> None:
        """A step's speeds."""
        self._seen.append(speeds)

    @property
    def is_settled(self) -> bool:
        """Whether enough steps were seen to tell a change from an outlier."""
        return len(self._seen) > WINDOW // 2

    @property
    def speeds(self) -> Speeds | None:
        """The median of each over `WINDOW` steps; None before the first step."""
        return _of_each(statistics.median, list(self._seen)[-WINDOW:])

    @property
    def typical(self) -> Speeds | None:
        """The mean of each over `LONG_WINDOW` steps; None before the first step."""
        return _of_each(trimmed_mean, list(self._seen))

    def forget(self) -> None:
        """What was measured belongs to another fleet."""
        self._seen.clear()


def trimmed_mean(numbers: Iterable[float]) -> float:
    """The mean without the greatest and the least; with fewer than three numbers, of all.

    Example:
        trimmed_mean([0.8, 1.1, 0.8, 1.1, 9.0]) → 1.0
    """
    found = sorted(numbers)
    return statistics.fmean(found[1:-1] if len(found) > 2 else found)


def _of_each(middle: Callable[[Iterable[float]], float], seen: Sequence[Speeds]) -> Speeds | None:
    if not seen:
        return None
    return Speeds(*(middle([getattr(each, at.name) for each in seen]) for at in fields(Speeds)))


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
