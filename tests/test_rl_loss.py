"""The policy loss against hand-made numbers and gradient identities."""

from __future__ import annotations

import math

import pytest
import torch

from rl.loss import aipo, mismatch


def test_loss_of_hand_made_tokens() -> None:
    logprobs = torch.log(torch.tensor([0.5, 0.8, 0.9], dtype=torch.float64))
    behavior = torch.log(torch.tensor([0.5, 0.4, 0.1], dtype=torch.float64))
    advantages = torch.tensor([1.0, -0.5, 2.0], dtype=torch.float64)
    loss = aipo(logprobs, behavior, advantages, rho_max=4.0)
    expected = [-1 * 1 * math.log(0.5), -2 * -0.5 * math.log(0.8), -4 * 2 * math.log(0.9)]
    assert loss.tolist() == pytest.approx(expected, abs=1e-12)


def test_on_policy_the_gradient_is_reinforce() -> None:
    logits = torch.tensor([[0.3, -0.2, 0.9], [0.0, 1.0, -1.0]], dtype=torch.float64)
    logits.requires_grad_()
    advantages = torch.tensor([0.5, -0.5], dtype=torch.float64)
    logprobs = logits.log_softmax(-1)[[0, 1], [2, 0]]
    (got,) = torch.autograd.grad(aipo(logprobs, logprobs.detach(), advantages, 4.0).sum(), logits)
    onehot = torch.tensor([[0.0, 0, 1], [1, 0, 0]], dtype=torch.float64)
    reinforce = -advantages[:, None] * (onehot - logits.softmax(-1))
    assert torch.allclose(got, reinforce, atol=1e-12)


def test_a_truncated_token_keeps_its_gradient_at_the_bound() -> None:
    logprobs = torch.tensor([-0.1, -0.1], dtype=torch.float64, requires_grad=True)
    behavior = torch.tensor([-0.1 - math.log(100), -0.1 - math.log(3)], dtype=torch.float64)
    aipo(logprobs, behavior, torch.ones(2, dtype=torch.float64), 4.0).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == pytest.approx([-4.0, -3.0], abs=1e-12)


def test_the_weight_itself_carries_no_gradient() -> None:
    logprobs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
    behavior = torch.tensor([-2.0], dtype=torch.float64)
    aipo(logprobs, behavior, torch.ones(1, dtype=torch.float64), 4.0).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(-math.e, abs=1e-12)


def test_mismatch_of_hand_made_ratios() -> None:
    behavior = torch.log(torch.tensor([0.4, 0.2, 0.1], dtype=torch.float64))
    logprobs = torch.log(torch.tensor([0.2, 0.3, 0.6], dtype=torch.float64))
    measured = mismatch(logprobs, behavior, rho_max=4.0)
    rho = [0.5, 1.5, 6.0]
    assert measured["rho_mean"] == pytest.approx(8 / 3)
    assert measured["rho_p50"] == pytest.approx(1.5)
    assert measured["rho_max"] == pytest.approx(6.0)
    assert measured["clip_share"] == pytest.approx(1 / 3)
    assert measured["ess"] == pytest.approx(64 / (3 * 38.5))
    assert measured["mismatch_kl"] == pytest.approx(sum(r - 1 - math.log(r) for r in rho) / 3)


def test_on_policy_there_is_no_mismatch() -> None:
    logprobs = torch.tensor([-0.3, -2.0, -0.01])
    measured = mismatch(logprobs, logprobs, rho_max=4.0)
    assert measured["rho_mean"] == measured["ess"] == 1.0
    assert measured["mismatch_kl"] == measured["clip_share"] == 0.0
