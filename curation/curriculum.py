"""Which prompt to ask next: seeded draws, weighted by the chance that a group would teach.

    mined pass rates ──▶ evidence per prompt ──▶ weights ──▶ order of version v ──▶ draw(v, c, n)
                               ▲                                                        │
                               └──────────── observe(v + 1, outcomes) ◀─────────────────┘

The n-th draw of a version in a capability is a pure function of (seed, version, evidence at that
version): draws never depend on which group happened to finish first.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from curation.config import CurriculumSection
from ground.errors import DataError
from ground.records import Prompt

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Observation:
    """What one group showed: how many of its rollouts passed.

    Example:
        Observation("9c1f…", successes=3, trials=8)
    """

    prompt_id: str
    successes: int
    trials: int


class Curriculum:
    """A pool of prompts with decayed evidence on each.

    Retired (pass rate at least `retire_at`) and deferred (tried, never passed) prompts stay in
    the pool: together they get `review_share` of the draws, and a review can bring them back.

    Example:
        curriculum.draw(0, "arithmetic", 0)                 # the same prompt however often asked
        curriculum.observe(1, [Observation(id, 8, 8)])      # now version 1; older draws are over
    """

    def __init__(
        self, pool: Sequence[Prompt], section: CurriculumSection, *, seed: int, group_size: int
    ) -> None:
        if not pool:
            raise DataError(
                "the curriculum needs at least one prompt, got none",
                where="rl",
                fix="mine with a wider band, or give more prompts",
            )
        self._pool = sorted(pool, key=lambda prompt: prompt.id)
        self._section, self._seed, self._group_size = section, seed, group_size
        self._index = {prompt.id: number for number, prompt in enumerate(self._pool)}
        mined = [prompt.difficulty for prompt in self._pool]
        self._successes = np.array([float(d.successes) if d else 0.0 for d in mined])
        self._trials = np.array([float(d.trials) if d else 0.0 for d in mined])
        self._capability = np.array([prompt.capability for prompt in self._pool])
        self._refused = np.zeros(len(self._pool), dtype=bool)
        self._version = 0
        self._order: dict[str, list[int]] = {}

    @property
    def version(self) -> int:
        """The policy version whose draws are being served."""
        return self._version

    def shares(self) -> dict[str, float]:
        """Share of the draws that each capability's weights ask for; sums to 1."""
        weights = self._weights()
        total = float(weights.sum())
        if total == 0:
            raise DataError(
                f"at least one prompt must fit the engine, all {len(self._pool)} were refused",
                where="rl",
                fix="raise rl.engine.max_length or lower rl.sampling.max_new_tokens",
            )
        names = np.unique(self._capability).tolist()
        return {name: float(weights[self._capability == name].sum()) / total for name in names}

    def draw(self, version: int, capability: str, n: int) -> Prompt:
        """The n-th prompt of a version in a capability, without repeats until all were drawn.

        Weighted sampling without replacement is one sort: log weight plus Gumbel noise,
        descending (Efraimidis and Spirakis; Gumbel top-k).
        """
        if version != self._version:
            raise ValueError(f"draws are of version {self._version}, got version {version}")
        if not self._order:
            self._order = self._sorted_by_luck()
        order = self._order[capability]
        return self._pool[order[n % len(order)]]

    def observe(self, version: int, observations: Sequence[Observation]) -> None:
        """Fade what is known, add what groups showed, and go on to the next version."""
        if version != self._version + 1:
            raise ValueError(f"version {self._version + 1} comes next, got version {version}")
        self._version = version
        self._successes *= self._section.decay
        self._trials *= self._section.decay
        for observation in observations:
            where = self._index[observation.prompt_id]
            self._successes[where] += observation.successes
            self._trials[where] += observation.trials
        self._order = {}

    def refuse(self, prompt_ids: Iterable[str]) -> None:
        """Take prompts that can never be answered out of the draws, from the next order on."""
        for prompt_id in prompt_ids:
            self._refused[self._index[prompt_id]] = True

    def counts(self) -> dict[str, int]:
        """How many prompts are active, retired, deferred and refused."""
        retired, deferred = int(self._retired().sum()), int(self._deferred().sum())
        refused = int(self._refused.sum())
        active = len(self._pool) - retired - deferred - refused
        return {"active": active, "retired": retired, "deferred": deferred, "refused": refused}

    def state_dict(self) -> dict[str, object]:
        """Version and evidence by prompt id, as JSON types."""
        evidence = zip(self._pool, self._successes.tolist(), self._trials.tolist(), strict=True)
        return {
            "version": self._version,
            "evidence": {prompt.id: [successes, trials] for prompt, successes, trials in evidence},
            "refused": [self._pool[number].id for number in np.flatnonzero(self._refused)],
        }

    def load_state_dict(
        self, version: int, evidence: dict[str, list[float]], refused: list[str]
    ) -> None:
        """Go back to a saved state of the same pool."""
        if evidence.keys() != self._index.keys():
            foreign = len(evidence.keys() ^ self._index.keys())
            raise DataError(
                f"a checkpoint's curriculum must know the same prompts, {foreign} differ",
                where="rl checkpoint",
                fix="give the prompts this run began with, or start over with --overwrite",
            )
        rows = [evidence[prompt.id] for prompt in self._pool]
        self._successes = np.array([row[0] for row in rows])
        self._trials = np.array([row[1] for row in rows])
        self._version, self._order = version, {}
        self._refused[:] = False
        self.refuse(refused)

    def _retired(self) -> NDArray[np.bool_]:
        is_solved = self._successes >= self._section.retire_at * self._trials
        return (self._trials > 0) & is_solved & ~self._refused

    def _deferred(self) -> NDArray[np.bool_]:
        return (self._trials > 0) & (self._successes == 0) & ~self._refused

    def _weights(self) -> Floats:
        """Chance of a gradient, with all reviewed prompts scaled to their share of the whole."""
        weights = gradient_chance(self._successes, self._trials, self._group_size)
        weights[self._refused] = 0
        review = self._retired() | self._deferred()
        active = float(weights[~review].sum())
        if review.any() and active > 0:
            share = self._section.review_share
            weights[review] *= active * share / (1 - share) / float(weights[review].sum())
        return weights

    def _sorted_by_luck(self) -> dict[str, list[int]]:
        random = np.random.default_rng([self._seed, self._version])
        weights = self._weights()
        with np.errstate(divide="ignore"):
            luck = np.log(weights) + random.gumbel(size=len(weights))
        order = np.argsort(-luck, kind="stable")[: len(weights) - int(self._refused.sum())]
        names = np.unique(self._capability).tolist()
        return {name: order[self._capability[order] == name].tolist() for name in names}


def gradient_chance(successes: Floats, trials: Floats, group_size: int) -> Floats:
    """Chance that a group is neither all right nor all wrong: E[1 - p^G - (1-p)^G].

    The expectation is over p ~ Beta(a, b), a = 1 + successes, b = 1 + failures, where
    E[p^G] = prod_i (a + i) / (a + b + i), i < G: a prompt of unknown hardness is worth a look.

    Example:
        nothing known, G = 2 → 1 - 1/3 - 1/3 = 1/3
    """
    steps = np.arange(group_size)[:, None]
    alpha, beta = 1 + successes, 1 + trials - successes
    all_right = ((alpha + steps) / (alpha + beta + steps)).prod(axis=0)
    all_wrong = ((beta + steps) / (alpha + beta + steps)).prod(axis=0)
    return 1 - all_right - all_wrong
