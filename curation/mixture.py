"""Which capability each slot is for, so that the quotas hold on what is *trained*, not on what is
drawn.

    turns(n, present) ──▶ n slots ──▶ some teach, some do not ──▶ settle(capability, taught) ──┐
          ▲                                                                                    │
          └──────────────── a slot that taught nothing is owed to its capability ◀─────────────┘

A batch is dealt in three parts:

1. A capability of which too many slots in a row taught nothing is *dry*. Its quota yields last: its
   band is widened first (the caller's part), and only after as many more in vain its quota is lent
   to the others. It keeps one slot a batch, and has its quota back as soon as one of them teaches.
2. Slots that taught nothing are given again, one for one. At most a batch's quota is owed, and at
   most half of a batch is given for what is owed, so that a capability which teaches nothing does
   not take the others' places.
3. The rest goes by quota: everyone's whole part, and the places left over to those who would
   soonest be a whole slot behind (earliest deadline first, as in Tijdeman's chairman assignment).
   So a batch is within one slot of its quotas, and so is the sum of all.

Everything follows from the order of the calls: no clock, no randomness, and the state is JSON.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping
from typing import TypedDict

from ground.errors import DataError, RecipeError

_LEAST_PATIENCE = 8
"""Slots in a row without a group that teaches, before a small quota is called dry."""
_ROUNDING = 1e-9
_DIGITS = 9
"""Lags are compared to so many, for sums of shares differ in the last bits."""


class MixtureState(TypedDict):
    """What a checkpoint keeps."""

    lags: dict[str, float]
    owed: dict[str, int]
    in_vain: dict[str, int]
    taught: dict[str, int]


class Mixture:
    """Deals slots to capabilities and keeps account of those that taught.

    Args:
        quotas: share of the trained groups by capability; they sum to 1.
        batch: slots of a step.
        patience: batches without a group that teaches before a capability is dry.

    Example:
        Mixture({"code": .5, "math": .5}, batch=4, patience=3)
        turns(4, …) → two each; two of math's teach nothing → turns(4, …) → math 3, code 1:
        of the six that taught so far and are to come, each has its half
    """

    def __init__(self, quotas: Mapping[str, float], *, batch: int, patience: int) -> None:
        self._quotas = {name: quotas[name] for name in sorted(quotas)}
        self._batch, self._patience = batch, patience
        self._lags = dict.fromkeys(self._quotas, 0.0)
        self._owed: Counter[str] = Counter()
        self._in_vain: Counter[str] = Counter()
        self._taught: Counter[str] = Counter()

    def turns(self, total: int, present: Collection[str]) -> dict[str, int]:
        """Slots of a batch by capability.

        Args:
            present: capabilities of which a prompt is left; a quota of others goes to these.

        Raises:
            DataError: none of them has a quota.
        """
        shares = self._shares(present)
        counts = Counter(self._looks(total, present))
        room = min(total // 2, total - counts.total())
        for name in sorted(shares, key=lambda name: (-self._owed[name], name)):
            again = min(self._owed[name], room)
            counts[name] += again
            self._owed[name] -= again
            room -= again
        counts.update(self._by_quota(shares, total - counts.total()))
        return {name: count for name, count in counts.items() if count}

    def settle(self, capability: str, *, taught: bool, told: bool = True) -> None:
        """A slot is through: with a group that was trained on, or without.

        Args:
            told: whether it showed how hard its prompts are; a late or broken group does not.
        """
        if taught:
            self._taught[capability] += 1
            self._in_vain[capability] = 0
            return
        self._in_vain[capability] += told
        most = math.ceil(self._quotas[capability] * self._batch - _ROUNDING)
        self._owed[capability] = min(self._owed[capability] + 1, most)

    @property
    def dry(self) -> frozenset[str]:
        """Capabilities whose band is to be widened."""
        return frozenset(n for n in self._quotas if self._in_vain[n] >= self._most_in_vain(n))

    @property
    def lent(self) -> frozenset[str]:
        """Dry ones that were widened in vain: others have their slots, all but one a batch."""
        return frozenset(n for n in self._quotas if self._in_vain[n] >= 2 * self._most_in_vain(n))

    @property
    def taught(self) -> Mapping[str, int]:
        """Groups trained on so far."""
        return {name: self._taught[name] for name in self._quotas}

    @property
    def error(self) -> float:
        """Groups by which the capability that is furthest off misses its quota of all trained."""
        total = self._taught.total()
        return max(abs(self._taught[name] - q * total) for name, q in self._quotas.items())

    def state_dict(self) -> MixtureState:
        """The account as JSON types."""
        return {
            "lags": dict(self._lags),
            "owed": dict(self._owed),
            "in_vain": dict(self._in_vain),
            "taught": dict(self._taught),
        }

    def load_state_dict(self, state: MixtureState) -> None:
        """Go back to a saved account."""
        self._lags = dict(state["lags"])
        self._owed, self._in_vain = Counter(state["owed"]), Counter(state["in_vain"])
        self._taught = Counter(state["taught"])

    def _shares(self, present: Collection[str]) -> dict[str, float]:
        """Quotas of those that take part, scaled to 1; of all that are there, if all are lent."""
        there = {n: q for n, q in self._quotas.items() if n in present and q > 0}
        if not there:
            raise DataError(
                "a capability with a quota must have prompts that fit the engine, none has any",
                where="rl.quotas",
                fix="raise rl.engine.max_length, or change rl.quotas",
            )
        able = {name: quota for name, quota in there.items() if name not in self.lent} or there
        return {name: quota / sum(able.values()) for name, quota in able.items()}

    def _looks(self, total: int, present: Collection[str]) -> dict[str, int]:
        lent = sorted(name for name in self.lent if name in present)
        self._owed.update({name: -self._owed[name] for name in lent})
        others = set(self._shares(present)) - set(lent)
        return dict.fromkeys(lent[:total], 1) if others else {}

    def _by_quota(self, shares: Mapping[str, float], total: int) -> dict[str, int]:
        """Whole parts to all; what is left over to those who would soonest be a slot behind."""
        parts = {name: share * total for name, share in shares.items()}
        counts = {name: int(part) for name, part in parts.items()}
        for name, part in parts.items():
            self._lags[name] += part - counts[name]

        def turn(name: str) -> tuple[bool, float, str]:
            lag, rest = round(self._lags[name], _DIGITS), parts[name] - counts[name]
            return lag <= 0, (1 - lag) / rest if rest else math.inf, name

        for name in sorted(shares, key=turn)[: total - sum(counts.values())]:
            counts[name] += 1
            self._lags[name] -= 1
        return counts

    def _most_in_vain(self, name: str) -> float:
        return max(_LEAST_PATIENCE, self._patience * self._quotas[name] * self._batch)


def require_quotas(quotas: Mapping[str, float], capabilities: Collection[str]) -> None:
    """Quotas and prompts must speak of the same capabilities.

    Raises:
        RecipeError: a quota has no prompts, or prompts have no quota.
    """
    unknown = sorted(name for name, quota in quotas.items() if quota and name not in capabilities)
    unnamed = sorted(set(capabilities) - quotas.keys())
    if unknown or unnamed:
        raise RecipeError(
            f"each capability of the prompts must have a quota: {unnamed} have none, and of "
            f"{unknown} there are no prompts",
            where="rl.quotas",
            fix="name those that the prompts have; 0 leaves one out",
        )
