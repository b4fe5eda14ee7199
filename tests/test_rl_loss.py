"""The policy losses and masks against hand-made numbers and gradient identities."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rl.loss import (
    aipo,
    cispo,
    clip,
    decoupled,
    effective_share,
    fresh_gap,
    icepop_mask,
    interpolated,
    mismatch,
    oldest_of_rows,
    reference_kl,
    sequence_mask,
)


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def gradient(loss_of: Callable[[Tensor], Tensor], logprobs: Tensor) -> list[float]:
    logprobs = logprobs.clone().requires_grad_()
    (got,) = torch.autograd.grad(loss_of(logprobs).sum(), logprobs)
    return got.tolist()


MU = doubles(0.5, 0.4, 0.1)
PI = doubles(0.5, 0.8, 0.9)
"""rho = 1, 2, 9"""
ADVANTAGES = doubles(1.0, -0.5, 2.0)


# --- aipo and cispo ---------------------------------------------------------------------------


def test_aipo_of_hand_made_tokens() -> None:
    loss = aipo(PI.log(), MU.log(), ADVANTAGES, rho_max=4.0)
    expected = [-1 * 1 * math.log(0.5), -2 * -0.5 * math.log(0.8), -4 * 2 * math.log(0.9)]
    assert loss.tolist() == pytest.approx(expected, abs=1e-12)


def test_on_policy_the_gradient_is_reinforce() -> None:
    logits = torch.tensor([[0.3, -0.2, 0.9], [0.0, 1.0, -1.0]], dtype=torch.float64)
    logits.requires_grad_()
    advantages = doubles(0.5, -0.5)
    logprobs = logits.log_softmax(-1)[[0, 1], [2, 0]]
    (got,) = torch.autograd.grad(aipo(logprobs, logprobs.detach(), advantages, 4.0).sum(), logits)
    onehot = torch.tensor([[0.0, 0, 1], [1, 0, 0]], dtype=torch.float64)
    reinforce = -advantages[:, None] * (onehot - logits.softmax(-1))
    assert torch.allclose(got, reinforce, atol=1e-12)


def test_a_truncated_token_keeps_its_gradient_at_the_bound() -> None:
    logprobs, ones = doubles(-0.1, -0.1), doubles(1, 1)
    behavior = doubles(-0.1 - math.log(100), -0.1 - math.log(3))
    got = gradient(lambda x: aipo(x, behavior, ones, 4.0), logprobs)
    assert got == pytest.approx([-4.0, -3.0], abs=1e-12)


def test_the_weight_itself_carries_no_gradient() -> None:
    got = gradient(lambda x: aipo(x, doubles(-2.0), doubles(1), 4.0), doubles(-1.0))
    assert got == pytest.approx([-math.e], abs=1e-12)


def test_cispo_bounds_the_weight_on_both_sides() -> None:
    # rho = 0.1, 1, 9 → weights 0.5, 1, 5
    logprobs, behavior = doubles(0.05, 0.5, 0.9).log(), doubles(0.5, 0.5, 0.1).log()
    got = gradient(lambda x: cispo(x, behavior, doubles(1, 1, -1), 0.5, 5.0), logprobs)
    assert got == pytest.approx([-0.5, -1.0, 5.0], abs=1e-12)


# --- clip and decoupled -----------------------------------------------------------------------


def test_clip_takes_the_worse_side_and_silences_what_went_too_far() -> None:
    # rho = 1.5, 1.5, 0.5, 0.5, 1.25 with A = +1, -1, +1, -1, +1 and bounds 0.8 … 1.28.
    behavior = doubles(0.4, 0.4, 0.4, 0.4, 0.4).log()
    logprobs = doubles(0.6, 0.6, 0.2, 0.2, 0.5).log()
    advantages = doubles(1, -1, 1, -1, 1)
    loss = clip(logprobs, behavior, advantages, low=0.2, high=0.28)
    assert loss.tolist() == pytest.approx([-1.28, 1.5, -0.5, 0.8, -1.25], abs=1e-12)
    # The gradient of rho in log pi is rho; clipped tokens have none.
    got = gradient(lambda x: clip(x, behavior, advantages, 0.2, 0.28), logprobs)
    assert got == pytest.approx([0.0, 1.5, -0.5, 0.0, -1.25], abs=1e-12)


def test_decoupled_weighs_the_trust_region_by_proximal_over_sampler() -> None:
    # pi_prox / mu = 1.5 and 3 (cut to 2); r = 0.9 and 1.4 (cut to 1.2 where A > 0).
    behavior, proximal = doubles(0.2, 0.1).log(), doubles(0.3, 0.3).log()
    logprobs = doubles(0.27, 0.42).log()
    loss = decoupled(logprobs, proximal, behavior, doubles(2, 1), 0.2, 0.2, 2.0)
    assert loss.tolist() == pytest.approx([-1.5 * 0.9 * 2, -2 * 1.2], abs=1e-12)
    got = gradient(
        lambda x: decoupled(x, proximal, behavior, doubles(2, 1), 0.2, 0.2, 2.0), logprobs
    )
    assert got == pytest.approx([-1.5 * 0.9 * 2, 0.0], abs=1e-12)


def test_with_the_learner_itself_as_proximal_policy_decoupled_has_aipos_gradient() -> None:
    logprobs = PI.log()
    got = gradient(lambda x: decoupled(x, logprobs, MU.log(), ADVANTAGES, 0.2, 0.2, 2.0), logprobs)
    assert got == pytest.approx(gradient(lambda x: aipo(x, MU.log(), ADVANTAGES, 2.0), logprobs))


def test_the_interpolated_policy_moves_towards_the_learner_with_the_tokens_age() -> None:
    behavior = doubles(-3, -3, -3)
    learner = doubles(-1, -1, -1).requires_grad_()
    proximal = interpolated(learner, behavior, torch.tensor([0, 1, 3]))
    assert proximal.tolist() == pytest.approx([-3.0, -2.0, -1.5])
    assert not proximal.requires_grad


# --- masks and the KL -------------------------------------------------------------------------


def test_icepop_keeps_ratios_within_its_bounds_and_the_bounds_themselves() -> None:
    logprobs = doubles(0.2, 0.25, 1.0, 0.6).log()
    behavior = doubles(0.5, 0.5, 0.2, 0.1).log()
    # rho = 0.4, 0.5, 5, 6
    assert icepop_mask(logprobs, behavior, 0.5, 5.0 + 1e-12).tolist() == [False, True, True, False]


def test_the_sequence_mask_drops_whole_bad_answers_that_the_learner_left_behind() -> None:
    # Mean log(mu / pi): row 0: 0.6, row 1: 0.4, row 2: 0.6 but with a good answer.
    rows = torch.tensor([0, 0, 1, 1, 2])
    behavior = doubles(-0.5, -0.3, -0.5, -0.5, -0.4)
    logprobs = doubles(-1.5, -0.5, -0.6, -1.2, -1.0)
    advantages = doubles(-1, -1, -1, -1, 1)
    kept = sequence_mask(logprobs, behavior, advantages, rows, 0.5)
    assert kept.tolist() == [False, False, True, True, True]


def test_the_reference_kl_is_unbiased_in_value_and_gradient_off_policy() -> None:
    logits = doubles(0.3, -0.4, 1.0).requires_grad_()
    mu, reference = doubles(0.2, 0.5, 0.3), doubles(0.6, 0.3, 0.1).log()
    logprobs = logits.log_softmax(-1)
    estimate = (mu * reference_kl(logprobs, mu.log(), reference)).sum()
    exact = (logprobs.exp() * (logprobs - reference)).sum()
    assert estimate.item() == pytest.approx(exact.item(), abs=1e-12)
    (got,) = torch.autograd.grad(estimate, logits, retain_graph=True)
    (want,) = torch.autograd.grad(exact, logits)
    assert got.tolist() == pytest.approx(want.tolist(), abs=1e-12)


def test_the_reference_kl_of_one_token_by_hand() -> None:
    # pi = 0.4, mu = 0.2, q = 0.1: 2 * (1/4 - 1 + ln 4)
    got = reference_kl(doubles(0.4).log(), doubles(0.2).log(), doubles(0.1).log())
    assert got.item() == pytest.approx(2 * (0.25 - 1 + math.log(4)))


# --- what is measured -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weights", "share"), [([1, 1, 1, 1], 1.0), ([4, 0, 0, 0], 0.25), ([0.5, 1.5], 0.8), ([0], 0.0)]
)
def test_the_effective_share_of_a_batch(weights: list[float], share: float) -> None:
    assert effective_share(torch.tensor(weights)) == pytest.approx(share)


def test_mismatch_of_hand_made_ratios() -> None:
    behavior = doubles(0.4, 0.2, 0.1).log()
    logprobs = doubles(0.2, 0.3, 0.6).log()
    measured = mismatch(logprobs, behavior)
    rho = [0.5, 1.5, 6.0]
    assert measured["rho_mean"] == pytest.approx(8 / 3)
    # Linear quantiles of three values: 0.1 of the way from the first, 0.9 of the way to the last.
    assert measured["rho_p05"] == pytest.approx(0.6)
    assert measured["rho_p50"] == pytest.approx(1.5)
    assert measured["rho_p95"] == pytest.approx(5.55)
    assert measured["rho_max"] == pytest.approx(6.0)
    assert measured["ess"] == pytest.approx(64 / (3 * 38.5))
    assert measured["mismatch_kl"] == pytest.approx(sum(r - 1 - math.log(r) for r in rho) / 3)


def test_the_mismatch_is_the_divergence_from_sampler_to_learner_not_the_other_one() -> None:
    """Two outcomes, drawn as often as mu says: the mean of the estimator is exactly the KL."""
    mu, pi = doubles(0.5, 0.5), doubles(0.25, 0.75)
    drawn = torch.tensor([0, 1])
    measured = mismatch(pi.log()[drawn], mu.log()[drawn])["mismatch_kl"]
    assert measured == pytest.approx(0.5 * math.log(4 / 3))
    assert measured == pytest.approx(float((mu * (mu / pi).log()).sum()))
    assert measured != pytest.approx(float((pi * (pi / mu).log()).sum()), rel=0.05)


def test_the_gap_of_fresh_tokens_leaves_older_ones_out() -> None:
    logprobs, behavior = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([-1.5, -2.25, -9.0])
    gap = fresh_gap(logprobs, behavior, torch.tensor([0, 0, 1]))
    assert gap == {"fresh_gap_mean": 0.375, "fresh_gap_max": 0.5}
    assert fresh_gap(logprobs, behavior, torch.tensor([2, 1, 1])) == {}
    ages, rows = torch.tensor([0, 0, 2, 0, 1]), torch.tensor([1, 1, 0, 0, 2])
    assert oldest_of_rows(ages, rows).tolist() == [0, 0, 2, 2, 1]
    assert oldest_of_rows(ages[:0], rows[:0]).tolist() == []


def test_on_policy_there_is_no_mismatch() -> None:
    logprobs = torch.tensor([-0.3, -2.0, -0.01])
    measured = mismatch(logprobs, logprobs)
    assert measured["rho_mean"] == measured["rho_p05"] == measured["ess"] == 1.0
    assert measured["mismatch_kl"] == 0.0
