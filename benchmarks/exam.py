"""One exam for all: held-out prompts, asked of any weights by the same engine with the same seeds.

Also what a series of exams says: when a target was reached, by interpolation between two of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ground.config import Data
from ground.tables import read_prompts
from rollout.config import EngineSection, SamplingSection
from rollout.engines import open_engine
from rollout.evaluation import measure
from rollout.reward_pool import RewardPool

MAX_NEW_TOKENS, MAX_LENGTH = 64, 256
_SAMPLES, _SLOTS, _THREADS = 4, 256, 2


@dataclass(frozen=True, slots=True)
class Mark:
    """What weights got in an exam.

    Example:
        Mark(step=40, seconds=61.2, rate=0.71)
    """

    step: int
    seconds: float
    """On the run's clock when these weights existed."""
    rate: float
    """Share of all answers that passed."""


class Exam:
    """Asks held-out prompts four times each; close it when done.

    Example:
        Exam(model, path, seed=0).rate(tensors_of(model)) == 0.54
    """

    def __init__(self, model: Path, heldout: Path, *, seed: int) -> None:
        section = EngineSection(num_slots=_SLOTS, max_length=MAX_LENGTH, threads=_THREADS)
        self._engine, self._chat = open_engine(model, section)
        self._rewards = RewardPool(1, 10.0)
        self._prompts, self._seed, self._version = read_prompts(heldout, Data()), seed, 0

    def rate(self, weights: Mapping[str, Tensor]) -> float:
        """Share of the answers of these weights that pass."""
        self._version += 1
        self._engine.load(self._version, weights)
        measured = measure(
            self._engine,
            self._chat,
            self._prompts,
            self._rewards,
            SamplingSection(max_new_tokens=MAX_NEW_TOKENS),
            samples=_SAMPLES,
            seed=self._seed,
        )
        return sum(m.successes for m in measured) / sum(m.trials for m in measured)

    def close(self) -> None:
        """End engine and verifier."""
        self._engine.close()
        self._rewards.close()


def reached(marks: Sequence[Mark], target: float) -> tuple[float, float] | None:
    """Steps and seconds at which the target was first reached; None if never.

    Linear between the exam that reached it and the one before.

    Example:
        reached([Mark(0, 10, 0.5), Mark(5, 20, 0.7)], 0.6) == (2.5, 15.0)
    """
    for before, after in zip([*marks[:1], *marks], marks, strict=False):
        if after.rate >= target:
            share = (target - before.rate) / (after.rate - before.rate) if before != after else 1.0
            steps = before.step + share * (after.step - before.step)
            return steps, before.seconds + share * (after.seconds - before.seconds)
    return None
