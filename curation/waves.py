"""Mining in waves: a pilot of every prompt, and more samples where it leaves something open.

    all ─▶ pilot of m ─┬─▶ some right, some wrong ─▶ topped up to n
                       └─▶ all right, or none ─▶ a share of each, by lot, is topped up as well

Stopping early must not bend pass@k, so each of the three strata of a capability speaks through
those of it that were topped up, each with the weight (prompts in it) / (topped up). Who was drawn
says nothing of the second wave's samples: over all prompts, and over those of a capability, the
weighted mean of 1 - C(n-c, k) / C(n, k) is unbiased for every k ≤ n.
"""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Literal

from curation.mining import Mined

Stratum = Literal["hopeless", "open", "solved"]
_LEAST = 4
"""Prompts that speak for a stratum at least: how they differ says how sure their mean is."""


def topped_up(pilots: Sequence[Mined], share: float, seed: int) -> list[float]:
    """Weight with which each prompt speaks once it is topped up; 0 where its pilot has to do.

    Args:
        pilots: one without samples was not asked, and is left at that.
        share: of those that the pilot found all right or all wrong; four at least.

    Example:
        one that the pilot left open, and 100 of 0 right, with share .1 → 1 and ten times 10
    """
    strata: defaultdict[tuple[str, Stratum], list[int]] = defaultdict(list)
    for index, pilot in enumerate(pilots):
        if pilot.trials:
            strata[pilot.prompt.capability, stratum_of(pilot)].append(index)
    weights = [0.0] * len(pilots)
    for (_, stratum), members in strata.items():
        wanted = len(members) if stratum == "open" else math.ceil(share * len(members))
        wanted = min(max(wanted, _LEAST), len(members))
        for index in sorted(members, key=lambda each: _lot(pilots[each].prompt.id, seed))[:wanted]:
            weights[index] = len(members) / wanted
    return weights


def stratum_of(pilot: Mined) -> Stratum:
    """What a pilot has found a prompt to be."""
    if pilot.successes == 0:
        return "hopeless"
    return "solved" if pilot.successes == pilot.trials else "open"


def _lot(id_: str, seed: int) -> bytes:
    return hashlib.sha256(f"wave/{seed}/{id_}".encode()).digest()
