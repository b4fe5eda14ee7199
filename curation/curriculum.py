"""Which prompt to ask next: seeded draws, weighted by the chance that a group would teach.

    mined pass rates ──▶ evidence per prompt ──▶ weights ──▶ order of version v ──▶ draw(v, c, n)
                               ▲                                                        │
                               └──────────── observe(v + 1, outcomes) ◀─────────────────┘

The n-th draw of a version in a capability is a pure function of (seed, version, evidence at that
version): draws never depend on which group happened to finish first.

Prompts with the same mined evidence share a class, and only observed ones have a class of their
own: what is known costs as much as what was observed, however large the pool.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from curation.config import CurriculumSection
from ground.errors import DataError
from ground.records import Prompt

Floats = NDArray[np.float64]

_AHEAD = 256
"""Prompts of a capability that are put in order at first; more when a version draws more."""


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
        mined = [(d.successes, d.trials) if (d := p.difficulty) else (0, 0) for p in self._pool]
        places = {pair: place for place, pair in enumerate(sorted(set(mined)))}
        self._class = np.array([places[pair] for pair in mined])
        self._successes, self._trials = np.array(list(places), dtype=float).T.copy()
        self._class_when_mined = self._class.copy()
        self._mined = self._successes.copy(), self._trials.copy()
        self._own: dict[int, int] = {}
        """Class of each prompt that was observed, by its number: it shares it with nobody."""
        names = np.array([prompt.capability for prompt in self._pool])
        self._members = {
            str(name): np.flatnonzero(names == name) for name in np.unique(names).tolist()
        }
        self._refused = np.zeros(len(self._pool), dtype=bool)
        self._version = 0
        self._known: Floats | None = None
        self._luck: Floats | None = None
        self._available: dict[str, int] = {}
        self._order: dict[str, NDArray[np.intp]] = {}

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
        return {name: float(weights[own].sum()) / total for name, own in self._members.items()}

    def draw(self, version: int, capability: str, n: int) -> Prompt:
        """The n-th prompt of a version in a capability, without repeats until all were drawn.

        Weighted sampling without replacement is one sort: log weight plus Gumbel noise,
        descending (Efraimidis and Spirakis; Gumbel top-k).
        """
        if version != self._version:
            raise ValueError(f"draws are of version {self._version}, got version {version}")
        if capability not in self._available:
            own = self._members[capability]
            self._available[capability] = len(own) - int(self._refused[own].sum())
        available = self._available[capability]
        place = n % available
        if place >= len(self._order.get(capability, ())):
            self._order[capability] = self._luckiest(capability, min(2 * place + _AHEAD, available))
        return self._pool[int(self._order[capability][place])]

    def observe(self, version: int, observations: Sequence[Observation]) -> None:
        """Fade what is known, add what groups showed, and go on to the next version."""
        if version != self._version + 1:
            raise ValueError(f"version {self._version + 1} comes next, got version {version}")
        self._version = version
        self._successes *= self._section.decay
        self._trials *= self._section.decay
        self._give_own_classes([self._index[seen.prompt_id] for seen in observations])
        for seen in observations:
            own = self._own[self._index[seen.prompt_id]]
            self._successes[own] += seen.successes
            self._trials[own] += seen.trials
        self._forget_order()

    def refuse(self, prompt_ids: Iterable[str]) -> None:
        """Take prompts that can never be answered out of the draws, from the next order on."""
        for prompt_id in prompt_ids:
            self._refused[self._index[prompt_id]] = True
            self._known = None

    def counts(self) -> dict[str, int]:
        """How many prompts are active, retired, deferred and refused."""
        kept = self._class[~self._refused]
        retired, deferred = (int(mask[kept].sum()) for mask in (self._retired(), self._deferred()))
        refused = int(self._refused.sum())
        active = len(self._pool) - retired - deferred - refused
        return {"active": active, "retired": retired, "deferred": deferred, "refused": refused}

    def state_dict(self) -> dict[str, object]:
        """Version and the evidence on observed prompts, as JSON types: the rest was mined."""
        evidence = {
            self._pool[number].id: [float(self._successes[own]), float(self._trials[own])]
            for number, own in self._own.items()
        }
        return {
            "version": self._version,
            "pool": self._fingerprint(),
            "evidence": evidence,
            "refused": [self._pool[number].id for number in np.flatnonzero(self._refused)],
        }

    def load_state_dict(
        self, version: int, pool: str, evidence: dict[str, list[float]], refused: list[str]
    ) -> None:
        """Go back to a saved state of the same pool."""
        if pool != self._fingerprint():
            raise DataError(
                "a checkpoint's curriculum must know the same prompts, these differ",
                where="rl checkpoint",
                fix="give the prompts this run began with, or start the stage again (--from rl)",
            )
        self._successes, self._trials = (mined.copy() for mined in self._mined)
        for _ in range(version):
            self._successes *= self._section.decay
            self._trials *= self._section.decay
        self._class = self._class_when_mined.copy()
        self._own = {}
        numbers = [self._index[prompt_id] for prompt_id in evidence]
        self._give_own_classes(numbers)
        for number, (successes, trials) in zip(numbers, evidence.values(), strict=True):
            own = self._own[number]
            self._successes[own], self._trials[own] = successes, trials
        self._version = version
        self._refused[:] = False
        self.refuse(refused)
        self._forget_order()

    def _give_own_classes(self, numbers: Sequence[int]) -> None:
        """Prompts whose evidence is about to differ from that of all others."""
        fresh = [number for number in dict.fromkeys(numbers) if number not in self._own]
        before = self._class[fresh]
        self._own |= {n: len(self._successes) + place for place, n in enumerate(fresh)}
        self._successes = np.concatenate([self._successes, self._successes[before]])
        self._trials = np.concatenate([self._trials, self._trials[before]])
        self._class[fresh] = [self._own[number] for number in fresh]

    def _forget_order(self) -> None:
        self._known = self._luck = None
        self._order, self._available = {}, {}

    def _fingerprint(self) -> str:
        """sha256 over the prompts' ids."""
        return hashlib.sha256("\n".join(self._index).encode()).hexdigest()

    def _retired(self) -> NDArray[np.bool_]:
        """By class."""
        return (self._trials > 0) & (self._successes >= self._section.retire_at * self._trials)

    def _deferred(self) -> NDArray[np.bool_]:
        """By class."""
        return (self._trials > 0) & (self._successes == 0)

    def _weights(self) -> Floats:
        """Chance of a gradient, with all reviewed prompts scaled to their share of the whole."""
        if self._known is not None:
            return self._known
        weights = gradient_chance(self._successes, self._trials, self._group_size)[self._class]
        weights[self._refused] = 0
        review = (self._retired() | self._deferred())[self._class] & ~self._refused
        active = float(weights[~review].sum())
        if review.any() and active > 0:
            share = self._section.review_share
            weights[review] *= active * share / (1 - share) / float(weights[review].sum())
        self._known = weights
        return weights

    def _luckiest(self, capability: str, count: int) -> NDArray[np.intp]:
        """The first `count` prompts of a capability in this version's order."""
        own = self._members[capability]
        if self._luck is None:
            random = np.random.default_rng([self._seed, self._version])
            with np.errstate(divide="ignore"):
                self._luck = np.log(self._weights()) + random.gumbel(size=len(self._pool))
        unlucky = -self._luck[own]
        first = np.argpartition(unlucky, count - 1)[:count]
        return own[first[np.argsort(unlucky[first], kind="stable")]]


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
