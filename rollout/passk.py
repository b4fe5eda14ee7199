"""pass@k without bias, and how sure a measured share is.

n samples of a prompt of which c are right.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

_Z_95 = 1.959963984540054
_BOOTSTRAP_DRAWS = 2000
_LEAST_SHARE = 0.9
"""Of the prompts, that a pass@k must count."""


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


def wilson(successes: float, trials: int, z: float = _Z_95) -> Estimate:
    """Share of successes with Wilson's score interval; no trials leave everything possible.

    Args:
        z: half the interval's width in deviations.

    Example:
        wilson(0, 10) → 0.0 in [0, 0.278]; wilson(5, 10) → 0.5 in [0.237, 0.763]
    """
    if trials < 1:
        return Estimate(0.0, 0.0, 1.0)
    share, z2 = successes / trials, z**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = math.sqrt(share * (1 - share) / trials + z2 / (4 * trials**2)) / (1 + z2 / trials)
    half *= z
    return Estimate(share, min(max(centre - half, 0.0), share), max(min(centre + half, 1.0), share))


@dataclass(frozen=True, slots=True)
class Stands:
    """For how many prompts, and for which, a prompt stands that was chosen among them by lot.

    Example:
        Stands(10.0, ("sums", "hopeless")) → one of ten, which a pilot had found alike
    """

    weight: float = 1.0
    """0 leaves it out."""
    stratum: Hashable = ""


def bootstrap(
    values: Sequence[float], seed: int = 0, stands: Sequence[Stands] | None = None
) -> Estimate:
    """Mean of per-prompt values in [0, 1], its interval by resampling prompts (percentile, seeded).

    Prompts, not samples, are what was drawn from the world: samples of one prompt are alike. Where
    all prompts agree resampling would claim certainty; Wilson over prompts is given instead.

    Where prompts stand for others, how many prompts each stratum has is drawn anew as well, and in
    it one prompt less than there are that speak (of n values that would be too sure of their mean).

    Args:
        stands: for whom each value stands; for its own prompt by default.

    Raises:
        ValueError: there are no values.
    """
    if not values:
        raise ValueError("needs at least one value, got none")
    values_P = np.asarray(values, dtype=np.float64)
    weights_P = np.array([each.weight for each in stands] if stands else [1.0] * len(values_P))
    mean = float(values_P @ weights_P / weights_P.sum())
    if values_P.min() == values_P.max():
        return wilson(mean * len(values), len(values))
    generator = np.random.default_rng(seed)
    if stands is None or all(each.weight == 1 for each in stands):
        draws = (generator.choice(values_P, size=len(values_P)) for _ in range(_BOOTSTRAP_DRAWS))
        means_D = np.array([drawn_P.mean() for drawn_P in draws])
    else:
        means_D = _stratified(values_P, weights_P, stands, generator)
    low, high = np.quantile(means_D, [0.025, 0.975])
    return Estimate(mean, float(low), float(high))


def _stratified(
    values_P: NDArray[np.float64],
    weights_P: NDArray[np.float64],
    stands: Sequence[Stands],
    generator: np.random.Generator,
) -> NDArray[np.float64]:
    """Means of resampled prompts, each stratum for itself."""
    names = sorted({each.stratum for each in stands}, key=repr)
    members = [np.flatnonzero([each.stratum == name for each in stands]) for name in names]
    sizes_S = np.array([weights_P[own].sum() for own in members])
    total = max(round(float(sizes_S.sum())), 1)
    counts_DS = generator.multinomial(total, sizes_S / sizes_S.sum(), size=_BOOTSTRAP_DRAWS)
    means_DS = np.empty(counts_DS.shape)
    for place, own in enumerate(members):
        shape = (_BOOTSTRAP_DRAWS, max(len(own) - 1, 1))
        drawn_DN = own[generator.integers(len(own), size=shape)]
        drawn_weights_DN = weights_P[drawn_DN]
        sums_D = (values_P[drawn_DN] * drawn_weights_DN).sum(1)
        means_DS[:, place] = sums_D / drawn_weights_DN.sum(1)
    return (counts_DS * means_DS).sum(1) / total


def mean_pass_at_k(
    outcomes: Sequence[tuple[int, int]],
    k: int,
    seed: int = 0,
    stands: Sequence[Stands] | None = None,
) -> Estimate:
    """pass@k over prompts.

    Args:
        outcomes: (n, c) of each prompt; prompts may have different n.
        stands: for whom each of them stands.
    """
    return bootstrap([pass_at_k(n, c, k) for n, c in outcomes], seed, stands)


def passes(
    outcomes: Sequence[tuple[int, int]],
    ks: Iterable[int],
    seed: int = 0,
    stands: Sequence[Stands] | None = None,
) -> dict[str, Mapping[str, float]]:
    """pass@k by name, for each k that nine in ten prompts at least have samples enough for.

    A prompt of which a sample went without a verdict costs nothing but itself; where some are left
    out so, `prompts` says how many count.

    Args:
        outcomes: (n, c) of each prompt.
        stands: for whom each of them stands (curation/waves.py).

    Example:
        passes([(4, 2), (4, 4)], ks=[1, 8]) → {"pass@1": {"mean": 0.75, "low": …, "high": …}}
    """
    found: dict[str, Mapping[str, float]] = {}
    stands = stands or [Stands()] * len(outcomes)
    whole = math.fsum(each.weight for each in stands)
    for k in sorted(set(ks)):
        counted = [
            index for index, (n, _) in enumerate(outcomes) if n >= k and stands[index].weight > 0
        ]
        own = [stands[index] for index in counted]
        if counted and math.fsum(each.weight for each in own) >= _LEAST_SHARE * whole:
            left_out = {"prompts": len(counted)} if len(counted) < len(outcomes) else {}
            estimate = mean_pass_at_k([outcomes[index] for index in counted], k, seed, own)
            found[f"pass@{k}"] = asdict(estimate) | left_out
    return found
