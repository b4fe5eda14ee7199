"""pass@k against counting by hand, and intervals against published numbers."""

from fractions import Fraction
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from rollout.passk import bootstrap, mean_pass_at_k, pass_at_k, passes, wilson


def test_two_right_of_four_leave_one_bad_pair_of_six():
    assert pass_at_k(4, 2, 2) == float(Fraction(5, 6))
    assert pass_at_k(4, 2, 1) == 0.5
    assert pass_at_k(4, 2, 3) == 1.0


def test_edges():
    assert pass_at_k(16, 0, 16) == 0.0
    assert pass_at_k(16, 16, 1) == 1.0
    assert pass_at_k(1, 1, 1) == 1.0


@given(
    st.integers(1, 9).flatmap(
        lambda n: st.tuples(*[st.just(n), st.integers(0, n), st.integers(1, n)])
    )
)
def test_equals_counting_all_subsets(case: tuple[int, int, int]):
    n, c, k = case
    right = [True] * c + [False] * (n - c)
    subsets = list(combinations(right, k))
    assert pass_at_k(n, c, k) == float(Fraction(sum(map(any, subsets)), len(subsets)))


def test_large_counts_stay_exact():
    """As a float C(2000, 1000) overflows; half of all choices hold the one right sample."""
    assert pass_at_k(2000, 1, 1000) == 0.5


@pytest.mark.parametrize(("n", "c", "k"), [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_impossible_counts_are_refused(n: int, c: int, k: int):
    with pytest.raises(ValueError, match=f"got n={n}, c={c}, k={k}"):
        pass_at_k(n, c, k)


@pytest.mark.parametrize(
    ("successes", "trials"), [(0, 10), (5, 10), (10, 10), (1, 1000), (81, 263)]
)
def test_wilson_agrees_with_scipy(successes: int, trials: int):
    expected = binomtest(successes, trials).proportion_ci(method="wilson")
    estimate = wilson(successes, trials)
    assert estimate.mean == successes / trials
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_nothing_says_nothing():
    estimate = wilson(0, 0)
    assert (estimate.low, estimate.high) == (0.0, 1.0)


def test_bootstrap_is_seeded_and_as_wide_as_theory():
    values = [0.0, 1.0] * 200
    estimate = bootstrap(values, seed=3)
    assert estimate == bootstrap(values, seed=3)
    assert estimate != bootstrap(values, seed=4)
    assert estimate.mean == 0.5
    theory = 1.96 * 0.5 / np.sqrt(400)
    assert (estimate.high - estimate.low) / 2 == pytest.approx(theory, rel=0.1)


def test_bootstrap_where_all_agree_is_not_certain():
    estimate = bootstrap([1.0] * 10)
    assert estimate.mean == estimate.high == 1.0
    assert estimate.low == pytest.approx(wilson(10, 10).low)


def test_bootstrap_of_nothing_is_refused():
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap([])


def test_mean_over_prompts_with_different_numbers_of_samples():
    """5/6 for 2 of 4, 0 for 0 of 2: mean 5/12."""
    assert mean_pass_at_k([(4, 2), (2, 0)], k=2).mean == pytest.approx(5 / 12)


def test_a_sample_without_a_verdict_costs_its_own_prompt_alone():
    """Nine prompts of 4 samples and one of 3: pass@4 over nine, all right; over 8 of 10 nothing."""
    outcomes = [(4, 4)] * 9 + [(3, 0)]
    found = passes(outcomes, ks=[4, 1, 1])
    assert list(found) == ["pass@1", "pass@4"]
    assert found["pass@1"]["mean"] == pytest.approx(0.9) and "prompts" not in found["pass@1"]
    assert found["pass@4"]["mean"] == 1.0 and found["pass@4"]["prompts"] == 9
    assert list(passes([*outcomes[1:], (3, 0)], ks=[1, 4])) == ["pass@1"]
    assert passes([], ks=[1]) == {}
