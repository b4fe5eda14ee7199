"""What was seen of each stratum, and how far each capability has come since.

    fade() ──▶ learn(what groups showed) ──▶ separate() ──▶ add(them) ──▶ today()

Two things make evidence old. Prompts go their own ways: that is what decay forgets. And a
capability gets better as a whole, also where nobody looks: that is its *level*, in logits above the
policy that mined the prompts. Each stratum remembers the level at which its evidence was seen, on
average, and is believed to have come as far since as its capability has.

C strata, N capabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np
from numpy.typing import NDArray

from curation.posterior import Floats, shifted, shifted_rate

Integers = NDArray[np.int64]


class DriftState(TypedDict):
    """What a checkpoint keeps of levels; evidence is kept by prompt."""

    levels: list[float]
    variances: list[float]
    since: list[float]
    """By stratum of its own, in the order in which these came."""


class Evidence:
    """Successes and trials of each stratum, each with its level.

    Args:
        codes: [C] capability of each stratum, by number.
        decay: what a version leaves of older evidence.
        drift: logits by which a capability may move in a version, as a standard deviation.
    """

    def __init__(
        self,
        successes: Sequence[float],
        trials: Sequence[float],
        codes: Sequence[int],
        *,
        decay: float,
        drift: float,
    ) -> None:
        self.successes, self.trials = (np.array(x, dtype=np.float64) for x in (successes, trials))
        self.codes: Integers = np.array(codes, dtype=np.int64)
        self._since = np.zeros_like(self.trials)
        """[C] level of its capability at which a stratum's evidence was seen, on average."""
        count = int(self.codes.max()) + 1
        self.levels, self._variances = np.zeros(count), np.zeros(count)
        """[N] logits above the policy that mined, and how sure that is."""
        self._decay, self._drift = decay, drift

    def fade(self, versions: int = 1) -> None:
        """So many versions have gone by; the levels stay, for where they went is `learn`'s part."""
        for _ in range(versions):
            self.successes *= self._decay
            self.trials *= self._decay

    def today(self) -> tuple[Floats, Floats]:
        """[C] successes and trials as they would say today what they said when they were seen."""
        return shifted(self.successes, self.trials, self.shift())

    def rates(self) -> Floats:
        """[C] share of the trials that passed, as it would be today; NaN without trials."""
        seen = self.trials > 0
        rates = np.divide(self.successes, self.trials, where=seen, out=np.full(len(seen), np.nan))
        return shifted_rate(rates, self.shift())

    def learn(self, shown: Sequence[tuple[int, int, int]]) -> None:
        """Move levels by what groups showed against what was expected of them, in a new version.

        One step of Newton on the beta-binomial quasi-likelihood of a shift that all strata of a
        capability share, whose prior is what the last versions left: so a Kalman filter of one
        number. A group of n answers, expected to pass with mean m by a Beta of weight K, has the
        variance n m (1 - m) (K + n) / (K + 1), so it counts (K + 1) / (K + n) for what n separate
        answers would.

        Args:
            shown: stratum, successes and trials of each group.

        Example:
            m = 1/2, K = 10, 8 of 8 pass: (8 - 4) * 11/18 = 2.44 over 2 * 11/18 = 1.22, and the
            level moves by 2.44 V / (1 + 1.22 V) where its variance was V
        """
        self._variances += self._drift**2
        own, passed, asked = np.array(shown, dtype=np.int64).reshape(-1, 3).T
        before, weight = (each[own] for each in self.today())
        count = len(self.levels)
        mean, share = (1 + before) / (2 + weight), (3 + weight) / (2 + weight + asked)
        score = np.bincount(self.codes[own], (passed - asked * mean) * share, count)
        information = np.bincount(self.codes[own], asked * mean * (1 - mean) * share, count)
        self._variances /= 1 + self._variances * information
        self.levels = self.levels + self._variances * score

    def add(self, stratum: int, successes: float, trials: float) -> None:
        """A group of a stratum, at its capability's level of today."""
        level, before = self.levels[self.codes[stratum]], self.trials[stratum]
        self.successes[stratum] += successes
        self.trials[stratum] += trials
        share = trials / (before + trials)
        self._since[stratum] += share * (level - self._since[stratum])

    def separate(self, before: Integers) -> None:
        """Strata of their own for members of these, with the same evidence."""
        self.successes, self.trials, self._since = (
            np.concatenate([each, each[before]])
            for each in (self.successes, self.trials, self._since)
        )
        self.codes = np.concatenate([self.codes, self.codes[before]])

    def drift_state(self, own: Sequence[int]) -> DriftState:
        """Levels, and those at which strata of their own were seen, as JSON types."""
        return {
            "levels": self.levels.tolist(),
            "variances": self._variances.tolist(),
            "since": self._since[list(own)].tolist(),
        }

    def load(
        self, own: Sequence[int], evidence: Sequence[Sequence[float]], drift: DriftState
    ) -> None:
        """Go back to what was saved of strata of their own and of the levels."""
        for stratum, (successes, trials) in zip(own, evidence, strict=True):
            self.successes[stratum], self.trials[stratum] = successes, trials
        self._since[list(own)] = drift["since"]
        self.levels, self._variances = np.array(drift["levels"]), np.array(drift["variances"])

    def shift(self) -> Floats:
        """[C] logits that a stratum's capability has come since its evidence was seen."""
        return self.levels[self.codes] - self._since
