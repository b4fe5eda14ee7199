"""pass@k without bias, and how sure a measured share is.

n samples of a prompt of which c are right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_Z_95 = 1.959963984540054
_BOOTSTRAP_DRAWS = 2000


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured mean with its 95 % interval.

    Example:
        Estimate(mean=0.5, low=0.237, high=0.763) for 5 of 10
    """

    mean: float
    low: float
    high: float


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that at least one of k samples is right: 1 - C(n-c, k) / C(n, k) (Chen et al. 2021).

    Exact integers until the one division, so nothing cancels.

    Example:
        pass_at_k(4, 2, 2) → 5/6: only one of the six pairs is wrong twice

    Raises:
        ValueError: not 1 ≤ k ≤ n and 0 ≤ c ≤ n.
    """
    if not (1 <= k <= n and 0 <= c <= n):
        raise ValueError(f"needs 1 <= k <= n and 0 <= c <= n, got n={n}, c={c}, k={k}")
    ways = math.comb(n, k)
    return (ways - math.comb(n - c, k)) / ways


def wilson(successes: float, trials: int) -> Estimate:
    """Share of successes with Wilson's score interval; no trials leave everything possible.

    Example:
        wilson(0, 10) → 0.0 in [0, 0.278]; wilson(5, 10) → 0.5 in [0.237, 0.763]
    """
    if trials < 1:
        return Estimate(0.0, 0.0, 1.0)
    share, z2 = successes / trials, _Z_95**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    half *= _Z_95
    return Estimate(share, min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share))


def bootstrap(values: Sequence[float], seed: int = 0) -> Estimate:
    """Mean of per-prompt values in [0, 1], its interval by resampling prompts (percentile, seeded).

    Prompts, not samples, are what was drawn from the world: samples of one prompt are alike. Where
    all prompts agree resampling would claim certainty; Wilson over prompts is given instead.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("needs at least one value, got none")
    values_P = np.asarray(values, dtype=np.float64)
    mean = float(values_P.mean())
    if values_P.min() == values_P.max():
        return wilson(mean * len(values), len(values))
    generator = np.random.default_rng(seed)
    means_D = np.array(
        [generator.choice(values_P, size=len(values_P)).mean() for _ in range(_BOOTSTRAP_DRAWS)]
    )
    low, high = np.quantile(means_D, [0.025, 0.975])
    return Estimate(mean, float(low), float(high))


def mean_pass_at_k(outcomes: Sequence[tuple[int, int]], k: int, seed: int = 0) -> Estimate:
    """pass@k over prompts.

    Args:
        outcomes: (n, c) of each prompt; prompts may have different n.
    """
    return bootstrap([pass_at_k(n, c, k) for n, c in outcomes], seed)
