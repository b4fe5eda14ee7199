"""Beliefs about pass rates: how they move with a capability, and how close they are to a target."""

from __future__ import annotations

import math

import numpy as np
import pytest

from curation.evidence import Evidence
from curation.posterior import closeness, gradient_chance, posterior, shifted, shifted_rate


def one(successes: float, trials: float) -> tuple[np.ndarray, np.ndarray]:
    return np.array([successes]), np.array([trials])


def evidence(*strata: tuple[float, float, int], drift: float = 1.0) -> Evidence:
    successes, trials, codes = zip(*strata, strict=True)
    return Evidence(successes, trials, codes, decay=0.5, drift=drift)


def test_a_shift_by_hand() -> None:
    # 1 + 4 and 1 + 4 of 10: the logit's variance is 2 (1/5 + 1/50) = 0.44, the odds go times 3.
    by = math.log(3) * math.sqrt(1 + math.pi * 0.44 / 8)
    successes, trials = shifted(*one(4, 8), np.array([by]))
    mean, _ = posterior(successes, trials)
    assert mean[0] == pytest.approx(3 / 4)
    # The weight after it is 11 * (1/4) / (3/16) - 1.
    assert trials[0] + 2 == pytest.approx(41 / 3)
    assert successes[0] + 1 == pytest.approx(41 / 4)


def test_a_wide_posterior_moves_as_the_mean_of_all_its_rates() -> None:
    random = np.random.default_rng(0)
    for successes, trials, by in ((0, 0, 3.0), (1, 4, 2.0), (8, 8, -3.0), (6, 8, 1.5)):
        rates = random.beta(1 + successes, 1 + trials - successes, size=40_000)
        truth = shifted_rate(rates, np.full_like(rates, by)).mean()
        mean = posterior(*shifted(*one(successes, trials), np.array([by])))[0][0]
        assert mean == pytest.approx(truth, abs=0.04), (successes, trials, by)


def test_a_shift_leaves_the_certainty_in_logits() -> None:
    for successes, trials in ((0.0, 0.0), (0.0, 8.0), (8.0, 8.0), (3.0, 30.0)):
        for by in (-3.0, 0.7, 3.0):
            before = posterior(*one(successes, trials))
            after = posterior(*shifted(*one(successes, trials), np.array([by])))
            spreads = [float(d[0] / (m[0] * (1 - m[0]))) for m, d in (before, after)]
            assert spreads[0] == pytest.approx(spreads[1])


def test_rates_of_0_and_1_stay() -> None:
    rates = shifted_rate(np.array([0.0, 0.5, 1.0]), np.array([2.0, math.log(3), -2.0]))
    assert rates.tolist() == pytest.approx([0, 3 / 4, 1])


def test_closeness_of_an_unknown_rate_by_hand() -> None:
    # Over a uniform rate: the bell's area between 0 and 1, 2.5 deviations to each side.
    area = 0.2 * math.sqrt(2 * math.pi) * math.erf(2.5 / math.sqrt(2))
    assert closeness(*one(0, 0), 0.5, 0.2)[0] == pytest.approx(area, rel=1e-3)
    sure = closeness(*one(3000, 4000), 0.5, 0.2)[0]
    assert sure == pytest.approx(math.exp(-(0.25**2) / 0.08), rel=0.02)


def test_closeness_is_what_thompson_draws_come_to() -> None:
    """Sample a rate at each look and take the prompt with the bell's chance at it."""
    random = np.random.default_rng(0)
    for successes, trials, target in ((2, 8, 0.6), (0, 4, 0.3), (9, 10, 0.75)):
        rates = random.beta(1 + successes, 1 + trials - successes, size=40_000)
        taken = random.random(40_000) < np.exp(-((rates - target) ** 2) / 0.08)
        expected = closeness(*one(successes, trials), target, 0.2)[0]
        assert taken.mean() == pytest.approx(expected, abs=0.01)


def test_a_level_moves_by_what_was_shown_against_what_was_expected() -> None:
    # Mean 1/2, weight 10, 8 answers count as 8 * 11/18; variance 1: 2.44 / (1 + 1.22).
    learnt = evidence((4, 8, 0), (4, 8, 1))
    learnt.learn([(0, 8, 8)])
    score, information = 4 * 11 / 18, 2 * 11 / 18
    assert learnt.levels.tolist() == pytest.approx([score / (1 + information), 0])
    before = learnt.levels[0]
    learnt.learn([(0, 0, 8)])
    assert learnt.levels[0] < before
    still = evidence((4, 8, 0), drift=0.0)
    still.learn([(0, 8, 8)])
    assert still.levels.tolist() == [0]


def test_what_some_prompts_show_is_believed_of_all_and_what_is_seen_now_is_not_moved_again() -> (
    None
):
    learnt = evidence((4, 8, 0), (4, 8, 0), (4, 8, 1))
    learnt.learn([(0, 8, 8)])
    learnt.add(0, 8, 8)
    level = np.full(1, learnt.levels[0])
    successes, trials = learnt.today()
    # Half of the first one's evidence is of today: 12 of 16, moved by half of the level.
    for stratum, (seen, by) in enumerate((((12, 16), level / 2), ((4, 8), level), ((4, 8), 0.0))):
        expected = shifted(*one(*seen), np.zeros(1) + by)
        assert [successes[stratum], trials[stratum]] == pytest.approx([e[0] for e in expected])
    assert posterior(successes, trials)[0][2] == pytest.approx(1 / 2)


def test_a_policy_that_gets_better_is_followed_where_nobody_looks() -> None:
    """Half of a pool is asked each version while every rate rises by 0.15 logits."""
    random, size = np.random.default_rng(1), 400
    logits = random.logistic(size=size)
    errors = {}
    for drift in (0.0, 0.2):
        truth, random = logits.copy(), np.random.default_rng(2)
        mined = random.binomial(8, 1 / (1 + np.exp(-truth)))
        learnt = Evidence(mined.tolist(), [8] * size, [0] * size, decay=0.95, drift=drift)
        for version in range(20):
            truth += 0.15
            asked = range(version % 2, size // 2, 2)
            shown = random.binomial(8, 1 / (1 + np.exp(-truth[asked])))
            learnt.fade()
            learnt.learn([(n, int(s), 8) for n, s in zip(asked, shown, strict=True)])
            for number, successes in zip(asked, shown, strict=True):
                learnt.add(number, int(successes), 8)
        unseen = posterior(*learnt.today())[0][size // 2 :]
        errors[drift] = float((1 / (1 + np.exp(-truth[size // 2 :]))).mean() - unseen.mean())
    assert errors[0.0] > 0.3
    assert abs(errors[0.2]) < 0.03


def test_moved_evidence_still_gives_chances() -> None:
    """Also where a rate is believed to be more extreme than counts can say."""
    for by in (-6.0, 6.0):
        moved = shifted(*one(8, 8), np.array([by]))
        assert 0 <= gradient_chance(*moved, group_size=8)[0] <= 1
        assert 0 <= closeness(*moved, 0.5, 0.2)[0] <= 1
