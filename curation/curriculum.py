"""Which prompt to ask next: seeded draws, weighted by the chance that a group would teach.

    mined pass rates ──▶ evidence per prompt ──▶ weights ──▶ lottery of version v ──▶ draw(v, c, n)
                               ▲                                                          │
                               └──────────── observe(v + 1, outcomes) ◀───────────────────┘

The n-th draw of a version in a capability is a pure function of the seed, the version and what was
observed and refused before it, in order: it never depends on which group happened to finish first.

Prompts of a capability with the same mined evidence share a stratum, and only observed ones have
one of their own: a version costs as much as what was observed, however large the pool.

The band of a version is its active prompts. When they teach nothing the band is widened: prompts
that pass rates have shut out, mined by another model perhaps, get half of the draws.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from curation.config import CurriculumSection
from curation.strata import Lottery, Strata
from ground.errors import DataError
from ground.records import Prompt

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

_WIDE_SHARE = 0.5
"""Share of a widened version's draws that solved and hopeless prompts get."""


@dataclass(frozen=True, slots=True)
class Observation:
    """What one group showed: how many of its rollouts passed.

    Example:
        Observation("9c1f…", successes=3, trials=8)
    """

    prompt_id: str
    successes: int
    trials: int


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of one prompt, or of those of a capability that share their mined evidence.

    Example:
        Known("math", None, prompts=40, successes=4.0, trials=8.0, mean=0.5, deviation=0.15,
        status="active", share=0.2)       # a fifth of the draws goes to these forty
    """

    capability: str
    prompt_id: str | None
    """None where several prompts, or mined ones that were never observed, are meant."""
    prompts: int
    successes: float
    trials: float
    """Evidence as it has decayed."""
    mean: float
    deviation: float
    """Of the pass rate's posterior, Beta(1 + successes, 1 + failures)."""
    status: str
    """active, retired, deferred or refused."""
    share: float
    """Of this version's draws in all, by weight and before quotas; the sum over a pool is 1."""


class Curriculum:
    """A pool of prompts with decayed evidence on each.

    Retired (pass rate at least `retire_at`) and deferred (tried, never passed) prompts stay in
    the pool: together they get `review_share` of the draws, half of them in a widened version, and
    a review can bring them back.

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
        self._names = sorted({prompt.capability for prompt in self._pool})
        self._as_mined()

    @property
    def version(self) -> int:
        """The policy version whose draws are being served."""
        return self._version

    @property
    def capabilities(self) -> Sequence[str]:
        """Of all prompts, in order."""
        return self._names

    def shares(self) -> dict[str, float]:
        """Share of the draws that each capability's weights ask for; sums to 1."""
        mass = self._weights() * self._strata.sizes
        total = float(mass.sum())
        if total == 0:
            raise DataError(
                f"at least one prompt must fit the engine, all {len(self._pool)} were refused",
                where="rl",
                fix="raise rl.engine.max_length or lower rl.sampling.max_new_tokens",
            )
        sums = np.bincount(self._codes, weights=mass, minlength=len(self._names))
        return {name: float(each) / total for name, each in zip(self._names, sums, strict=True)}

    def draw(self, version: int, capability: str, n: int) -> Prompt:
        """The n-th prompt of a version in a capability, without repeats until all were drawn."""
        if version != self._version:
            raise ValueError(f"draws are of version {self._version}, got version {version}")
        code = self._names.index(capability)
        if code not in self._lotteries:
            own = np.flatnonzero(self._codes == code)
            random = np.random.default_rng([self._seed, version, code])
            self._lotteries[code] = Lottery(self._strata, own, self._weights()[own], random)
            self._drawn[code] = []
        lottery, drawn = self._lotteries[code], self._drawn[code]
        while lottery.num_left and len(drawn) <= n:
            drawn.append(lottery.draw())
        return self._pool[drawn[n % len(drawn)]]

    def observe(
        self,
        version: int,
        observations: Sequence[Observation],
        refused: Iterable[str] = (),
        *,
        wide: Iterable[str] = (),
    ) -> None:
        """Fade what is known, add what groups showed, and go on to the next version.

        Args:
            refused: prompts that can never be answered; they are not drawn any more.
            wide: capabilities whose band is widened in the new version, and in this one only.
        """
        if version != self._version + 1:
            raise ValueError(f"version {self._version + 1} comes next, got version {version}")
        self._version, self.wide = version, frozenset(wide)
        self._refuse(refused)
        self._successes *= self._section.decay
        self._trials *= self._section.decay
        told = [(self._index[seen.prompt_id], seen) for seen in observations]
        told = [(number, seen) for number, seen in told if number not in self._refused]
        self._separate([number for number, _ in told])
        for number, seen in told:
            own = self._strata.of[number]
            self._successes[own] += seen.successes
            self._trials[own] += seen.trials
        self._forget_order()

    def counts(self) -> dict[str, int]:
        """How many prompts are active, retired, deferred and refused."""
        sizes, refused = self._strata.sizes, len(self._refused)
        retired, deferred = int(sizes[self._retired()].sum()), int(sizes[self._deferred()].sum())
        active = len(self._pool) - retired - deferred - refused
        return {"active": active, "retired": retired, "deferred": deferred, "refused": refused}

    def known(self) -> list[Known]:
        """Everything that is known at this version, a row per stratum; refused prompts last."""
        own = {stratum: self._pool[number].id for number, stratum in self._own.items()}
        mean, deviation = posterior(self._successes, self._trials)
        sizes, mass = self._strata.sizes.copy(), self._weights() * self._strata.sizes
        refused = [self._own[number] for number in self._refused]
        status = np.full(len(sizes), "active", dtype="<U8")
        status[self._retired()], status[self._deferred()] = "retired", "deferred"
        status[refused] = "refused"
        total = float(mass.sum()) or 1.0
        order = [*np.flatnonzero(sizes).tolist(), *refused]
        sizes[refused] = 1
        return [
            Known(
                capability=self._names[int(self._codes[stratum])],
                prompt_id=own.get(stratum),
                prompts=int(sizes[stratum]),
                successes=float(self._successes[stratum]),
                trials=float(self._trials[stratum]),
                mean=float(mean[stratum]),
                deviation=float(deviation[stratum]),
                status=str(status[stratum]),
                share=float(mass[stratum]) / total,
            )
            for stratum in order
        ]

    def state_dict(self) -> dict[str, object]:
        """Version and evidence on observed or refused prompts, as JSON types: the rest was mined.

        They are in the order in which they came, for draws depend on it.
        """
        evidence = {
            self._pool[number].id: [float(self._successes[own]), float(self._trials[own])]
            for number, own in self._own.items()
        }
        return {
            "version": self._version,
            "wide": sorted(self.wide),
            "pool": self._fingerprint,
            "evidence": evidence,
            "refused": [self._pool[number].id for number in self._refused],
        }

    def load_state_dict(
        self,
        version: int,
        wide: Iterable[str],
        pool: str,
        evidence: dict[str, list[float]],
        refused: list[str],
    ) -> None:
        """Go back to a saved state of the same pool."""
        if pool != self._fingerprint:
            raise DataError(
                "a checkpoint's curriculum must know the same prompts, these differ",
                where="rl checkpoint",
                fix="give the prompts this run began with, or start the stage again (--from rl)",
            )
        self._as_mined()
        for _ in range(version):
            self._successes *= self._section.decay
            self._trials *= self._section.decay
        self._separate([self._index[prompt_id] for prompt_id in evidence])
        for own, (successes, trials) in zip(self._own.values(), evidence.values(), strict=True):
            self._successes[own], self._trials[own] = successes, trials
        self._version, self.wide = version, frozenset(wide)
        self._refuse(refused)
        self._forget_order()

    def _as_mined(self) -> None:
        """Begin with what the prompts brought along."""
        mined = [(d.successes, d.trials) if (d := p.difficulty) else (0, 0) for p in self._pool]
        kinds = [(p.capability, *pair) for p, pair in zip(self._pool, mined, strict=True)]
        self._strata = Strata(kinds)
        self._successes, self._trials = (
            np.array([key[part] for key in self._strata.keys], dtype=float) for part in (1, 2)
        )
        self._codes = np.array([self._names.index(key[0]) for key in self._strata.keys])
        self._own: dict[int, int] = {}
        """Stratum of each prompt that was observed, by its number: it shares it with nobody."""
        self._refused: dict[int, None] = {}
        self._version = 0
        self.wide: frozenset[str] = frozenset()
        """Capabilities in which what is solved or hopeless gets half of this version's draws."""
        self._forget_order()

    def _separate(self, numbers: Sequence[int]) -> None:
        """Prompts whose evidence is about to differ from that of all others."""
        fresh = [number for number in dict.fromkeys(numbers) if number not in self._own]
        before = self._strata.of[fresh]
        self._own |= {n: len(self._successes) + place for place, n in enumerate(fresh)}
        self._strata.separate(fresh)
        self._successes, self._trials, self._codes = (
            np.concatenate([each, each[before]])
            for each in (self._successes, self._trials, self._codes)
        )

    def _refuse(self, prompt_ids: Iterable[str]) -> None:
        """Leave prompts in strata of their own, out of which they are taken: so the order in which
        prompts left those that they were mined into is that of `_own` alone."""
        numbers = dict.fromkeys(self._index[prompt_id] for prompt_id in prompt_ids)
        fresh = [number for number in numbers if number not in self._refused]
        self._separate(fresh)
        self._strata.remove(fresh)
        self._refused |= dict.fromkeys(fresh)

    def _forget_order(self) -> None:
        self._known: Floats | None = None
        self._lotteries: dict[int, Lottery] = {}
        self._drawn: dict[int, list[int]] = {}

    @cached_property
    def _fingerprint(self) -> str:
        """sha256 over the prompts' ids."""
        return hashlib.sha256("\n".join(self._index).encode()).hexdigest()

    def _retired(self) -> Mask:
        """By stratum."""
        return (self._trials > 0) & (self._successes >= self._section.retire_at * self._trials)

    def _deferred(self) -> Mask:
        """By stratum."""
        return (self._trials > 0) & (self._successes == 0)

    def _weights(self) -> Floats:
        """[C] chance of a gradient, all reviewed prompts being scaled to their share of the whole.

        By stratum, for one member.
        """
        if self._known is not None:
            return self._known
        weights = gradient_chance(self._successes, self._trials, self._group_size)
        review, share = self._retired() | self._deferred(), self._section.review_share
        wide_share = max(share, _WIDE_SHARE)
        if self.wide.issuperset(self._names):
            self._scale(weights, review, np.full_like(review, True), wide_share)
        else:
            self._scale(weights, review, np.full_like(review, True), share)
            for name in self.wide:
                own = self._codes == self._names.index(name)
                self._scale(weights, review, own, wide_share)
        self._known = weights
        return weights

    def _scale(self, weights: Floats, review: Mask, of: Mask, share: float) -> None:
        """Give the reviewed strata of some their share of the weight of all of these."""
        mass = weights * self._strata.sizes
        active, reviewed = float(mass[of & ~review].sum()), float(mass[of & review].sum())
        if active > 0 and reviewed > 0:
            weights[of & review] *= active * share / (1 - share) / reviewed


def posterior(successes: Floats, trials: Floats) -> tuple[Floats, Floats]:
    """Mean and standard deviation of the pass rate, p ~ Beta(1 + successes, 1 + failures).

    Example:
        nothing known → 1/2 and sqrt(1/12);  2 of 2 → 3/4 and sqrt(3/80)
    """
    alpha, beta = 1 + successes, 1 + trials - successes
    total = alpha + beta
    return alpha / total, np.sqrt(alpha * beta / (total**2 * (total + 1)))


def gradient_chance(successes: Floats, trials: Floats, group_size: int) -> Floats:
    """Chance that a group is neither all right nor all wrong: E[1 - p^G - (1-p)^G].

    The expectation is over p ~ Beta(a, b), a = 1 + successes, b = 1 + failures, where
    E[p^G] = prod_i (a + i) / (a + b + i), i < G: a prompt of unknown hardness is worth a look.

    Example:
        nothing known, G = 2 → 1 - 1/3 - 1/3 = 1/3
    """
    alpha, beta = 1 + successes, 1 + trials - successes
    all_right, all_wrong = np.ones_like(alpha), np.ones_like(alpha)
    for step in range(group_size):
        all_right *= (alpha + step) / (alpha + beta + step)
        all_wrong *= (beta + step) / (alpha + beta + step)
    return 1 - all_right - all_wrong
