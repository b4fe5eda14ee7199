"""What is believed of a pass rate p after so many successes: Beta(1 + successes, 1 + failures).

And what follows from it for a draw: the chance that a group would teach, or the closeness to a
pass rate that is aimed at.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_CHUNK = 4096
"""Rates for which the closeness is summed at once: 2 MB of memory."""
_POINTS = (np.arange(64) + 0.5) / 64
"""Pass rates over which a posterior is summed."""


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


def closeness(successes: Floats, trials: Floats, target: float, width: float) -> Floats:
    """How close the pass rate is to a target: E[exp(-(p - target)^2 / (2 width^2))], p posterior.

    This is a Thompson draw with the sampled rate summed out. Were p sampled from its posterior at
    each look at a prompt, and the prompt taken with probability exp(…p…), it would be taken with
    exactly this probability; sampling adds noise to no end. And where many prompts share their
    evidence, one sampled p would move all of them at once, although they are as many prompts.

    The mean is over 64 rates from 1/128 to 127/128, weighted by the posterior's density.

    Example:
        nothing known, target 1/2, width 0.2 → 0.2 sqrt(2 pi) (Phi(2.5) - Phi(-2.5)) = 0.495
    """
    bumps = np.exp(-((_POINTS - target) ** 2) / (2 * width**2))
    right, wrong = np.log(_POINTS), np.log1p(-_POINTS)
    values = np.empty(len(trials))
    for start in range(0, len(trials), _CHUNK):
        part = slice(start, start + _CHUNK)
        logs = np.outer(successes[part], right)
        logs += np.outer(trials[part] - successes[part], wrong)
        density = np.exp(logs - logs.max(axis=1, keepdims=True))
        values[part] = density @ bumps / density.sum(axis=1)
    return values


def shifted_rate(rate: Floats, by: Floats) -> Floats:
    """A pass rate moved by so many logits; 0 and 1 stay.

    Example:
        1/2 by log 3 → 3/4
    """
    odds = rate * np.exp(by)
    return odds / (odds + 1 - rate)


def shifted(successes: Floats, trials: Floats, by: Floats) -> tuple[Floats, Floats]:
    """Successes and trials whose posterior is this one, each rate moved by so many logits.

    The mean of a wide posterior moves by less than each of its rates, by x / sqrt(1 + pi V / 8) (as
    that of a sigmoid of a normal variable, MacKay 1992), where V is the variance of the logit: to
    within 9 % 1/a + 1/(2 a^2) + 1/b + 1/(2 b^2) for Beta(a, b). The posterior stays as sure in
    logits: by the delta method it has the variance 1 / (m (1 - m) (K + 1)) there at a mean m and a
    weight K, so that K' + 1 = (K + 1) m (1 - m) / (m' (1 - m')). Successes or failures may come out
    below 0, where a rate is thought more extreme than nothing seen of it can make it; the Beta's
    parameters, which are one more, never do.

    Example:
        nothing known, by 3 → mean 0.884; that of 3 logits more at each rate from 0 to 1 is 0.887
    """
    total, right = 2 + trials, 1 + successes
    wrong, mean = total - right, right / total
    variance = 1 / right + 1 / (2 * right**2) + 1 / wrong + 1 / (2 * wrong**2)
    moved = shifted_rate(mean, by / np.sqrt(1 + np.pi * variance / 8))
    after = (total + 1) * mean * (1 - mean) / (moved * (1 - moved)) - 1
    return after * moved - 1, after - 2
