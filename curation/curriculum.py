"""Which prompt to ask next: seeded draws, weighted by what a group of it would be worth.

    mined pass rates ──▶ evidence per prompt ──▶ weights ──▶ lottery of version v ──▶ draw(v, c, n)
                               ▲                                                          │
                               └──────────── observe(v + 1, outcomes) ◀───────────────────┘

The n-th draw of a version in a capability is a pure function of the seed, the version and what was
observed and refused before it, in order: it never depends on which group happened to finish first.

Prompts of a capability with the same mined evidence share a stratum, and only observed ones have
one of their own: a version costs as much as what was observed, however large the pool.

What a group is worth is the chance that it has a gradient, or how close the prompt's pass rate is
to a target that falls from version to version (`order`, curation/posterior.py). How far the policy
has come since a prompt was seen is learnt from its capability's others (curation/evidence.py).

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
from curation.evidence import DriftState, Evidence
from curation.known import Known
from curation.posterior import Floats, closeness, gradient_chance, posterior
from curation.strata import Lottery, Strata
from ground.errors import DataError
from ground.records import Prompt

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


class Curriculum:
    """A pool of prompts with decayed evidence on each.

    Retired (pass rate at least `retire_at`) and deferred (tried, never passed) prompts stay in
    the pool: together they get `review_share` of the draws, half of them in a widened version, and
    a review can bring them back.

    Args:
        steps: versions over which the target falls (`order: target`).

    Example:
        curriculum.draw(0, "arithmetic", 0)                 # the same prompt however often asked
        curriculum.observe(1, [Observation(id, 8, 8)])      # now version 1; older draws are over
    """

    def __init__(
        self,
        pool: Sequence[Prompt],
        section: CurriculumSection,
        *,
        seed: int,
        group_size: int,
        steps: int,
    ) -> None:
        if not pool:
            raise DataError(
                "the curriculum needs at least one prompt, got none",
                where="rl",
                fix="mine with a wider band, or give more prompts",
            )
        self._pool = sorted(pool, key=lambda prompt: prompt.id)
        self._section, self._seed = section, seed
        self._group_size, self._steps = group_size, steps
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

    @property
    def aim(self) -> float | None:
        """The pass rate that this version's draws aim at, if they aim at one."""
        if self._section.order == "chance":
            return None
        return self._section.target_at(self._version / self._steps)

    def gauges(self) -> dict[str, float]:
        """The pass rate that is aimed at, if any, and each capability's level (evidence.py)."""
        levels = zip(self._names, self._evidence.levels.tolist(), strict=True)
        gauges = {f"level/{name}": level for name, level in levels}
        return gauges | ({} if self.aim is None else {"target": self.aim})

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
        sums = np.bincount(self._evidence.codes, weights=mass, minlength=len(self._names))
        return {name: float(each) / total for name, each in zip(self._names, sums, strict=True)}

    def draw(self, version: int, capability: str, n: int) -> Prompt:
        """The n-th prompt of a version in a capability, without repeats until all were drawn."""
        if version != self._version:
            raise ValueError(f"draws are of version {self._version}, got version {version}")
        code = self._names.index(capability)
        if code not in self._lotteries:
            own = np.flatnonzero(self._evidence.codes == code)
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
        self._evidence.fade()
        told = [(self._index[seen.prompt_id], seen) for seen in observations]
        told = [(number, seen) for number, seen in told if number not in self._refused]
        self._learn(told)
        self._separate([number for number, _ in told])
        for number, seen in told:
            self._evidence.add(int(self._strata.of[number]), seen.successes, seen.trials)
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
        mean, deviation = posterior(*self._evidence.today())
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
                capability=self._names[int(self._evidence.codes[stratum])],
                prompt_id=own.get(stratum),
                prompts=int(sizes[stratum]),
                successes=float(self._evidence.successes[stratum]),
                trials=float(self._evidence.trials[stratum]),
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
        seen = self._evidence
        evidence = {
            self._pool[number].id: [float(seen.successes[own]), float(seen.trials[own])]
            for number, own in self._own.items()
        }
        return {
            "version": self._version,
            "wide": sorted(self.wide),
            "pool": self._fingerprint,
            "evidence": evidence,
            "drift": seen.drift_state([*self._own.values()]),
            "refused": [self._pool[number].id for number in self._refused],
        }

    def load_state_dict(
        self,
        version: int,
        wide: Iterable[str],
        pool: str,
        evidence: dict[str, list[float]],
        drift: DriftState,
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
        self._evidence.fade(version)
        self._separate([self._index[prompt_id] for prompt_id in evidence])
        self._evidence.load([*self._own.values()], [*evidence.values()], drift)
        self._version, self.wide = version, frozenset(wide)
        self._refuse(refused)
        self._forget_order()

    def _as_mined(self) -> None:
        """Begin with what the prompts brought along."""
        mined = [(d.successes, d.trials) if (d := p.difficulty) else (0, 0) for p in self._pool]
        kinds = [(p.capability, *pair) for p, pair in zip(self._pool, mined, strict=True)]
        self._strata = Strata(kinds)
        names, successes, trials = zip(*self._strata.keys, strict=True)
        codes = [self._names.index(name) for name in names]
        decay, drift = self._section.decay, self._section.drift
        self._evidence = Evidence(successes, trials, codes, decay=decay, drift=drift)
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
        self._own |= {n: len(self._strata.sizes) + place for place, n in enumerate(fresh)}
        self._strata.separate(fresh)
        self._evidence.separate(before)

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

    def _learn(self, told: Sequence[tuple[int, Observation]]) -> None:
        """How far capabilities have come, by what active prompts showed against what was expected.

        Others say nothing of it: a prompt that was never solved may be one that cannot be.
        """
        out = self._retired() | self._deferred()
        seen = [(int(self._strata.of[number]), seen) for number, seen in told]
        active = [(stratum, s.successes, s.trials) for stratum, s in seen if not out[stratum]]
        self._evidence.learn(active)

    def _retired(self) -> Mask:
        """By stratum."""
        bound = self._section.retire_at
        if self.aim is not None:
            bound = min(bound, self.aim + self._section.target_margin)
        return self._evidence.rates() >= bound

    def _deferred(self) -> Mask:
        """By stratum."""
        return (self._evidence.trials > 0) & (self._evidence.successes == 0)

    def _weights(self) -> Floats:
        """[C] what a group is worth, all reviewed prompts being scaled to their share of the whole.

        By stratum, for one member.
        """
        if self._known is not None:
            return self._known
        weights = self._worth()
        review, share = self._retired() | self._deferred(), self._section.review_share
        wide_share = max(share, _WIDE_SHARE)
        if self.wide.issuperset(self._names):
            self._scale(weights, review, np.full_like(review, True), wide_share)
        else:
            self._scale(weights, review, np.full_like(review, True), share)
            for name in self.wide:
                own = self._evidence.codes == self._names.index(name)
                self._scale(weights, review, own, wide_share)
        self._known = weights
        return weights

    def _worth(self) -> Floats:
        """[C] of a group of one member."""
        today = self._evidence.today()
        if self.aim is not None:
            return closeness(*today, self.aim, self._section.target_width)
        return gradient_chance(*today, self._group_size)

    def _scale(self, weights: Floats, review: Mask, of: Mask, share: float) -> None:
        """Give the reviewed strata of some their share of the weight of all of these."""
        mass = weights * self._strata.sizes
        active, reviewed = float(mass[of & ~review].sum()), float(mass[of & review].sum())
        if active > 0 and reviewed > 0:
            weights[of & review] *= active * share / (1 - share) / reviewed
