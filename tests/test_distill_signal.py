"""The gain of a token against gradients that autograd makes, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distill import signal
from distill.signal import RIDGE, Gains, HeadTokens, SoftTokens, token_gains

V, H, N, M = 11, 5, 7, 6


def tokens(seed: int, count: int) -> HeadTokens:
    generator = torch.Generator().manual_seed(seed)
    hidden_NH = torch.randn(count, H, generator=generator)
    return HeadTokens(hidden_NH, torch.randint(V, (count,), generator=generator))


HELDOUT, TRAINED = tokens(1, M), tokens(2, N)
HEAD_VH = torch.randn(V, H, generator=torch.Generator().manual_seed(3))
TEACHER_NV = torch.randn(N, V, generator=torch.Generator().manual_seed(4)).mul(2).softmax(-1)
IDS_NK = TEACHER_NV.topk(3).indices
PROBS_NK = TEACHER_NV.gather(1, IDS_NK)
NO_TAIL = torch.zeros(N)


def by_autograd(target: str, temperature: float = 1.0, count: int = N) -> Tensor:
    """<g, gradient of the target's loss (C + r)^-1> of each token, from gradients of the head."""
    head_VH = HEAD_VH.clone().requires_grad_()
    heldout_loss = F.cross_entropy(HELDOUT.hidden_NH @ head_VH.T, HELDOUT.labels_N)
    (g_VH,) = torch.autograd.grad(heldout_loss, head_VH)
    hidden_NH = TRAINED.hidden_NH[:count]
    moment_HH = hidden_NH.T @ hidden_NH / count
    moment_HH += RIDGE * moment_HH.diagonal().mean() * torch.eye(H)
    gains = []
    for j in range(count):
        z_V = hidden_NH[j] @ head_VH.T
        log_q_V = (z_V / temperature).log_softmax(-1)
        if target == "hard":
            loss = F.cross_entropy(z_V[None], TRAINED.labels_N[j : j + 1])
        elif target == "topk_tail":
            is_kept = torch.zeros(V, dtype=torch.bool).index_fill(0, IDS_NK[j], True)
            tail = 1 - PROBS_NK[j].sum()
            log_rest = log_q_V.masked_fill(is_kept, -torch.inf).logsumexp(-1)
            loss = -(PROBS_NK[j] * log_q_V[IDS_NK[j]]).sum() - tail * log_rest
        else:
            loss = temperature**2 * -(TEACHER_NV[j] * log_q_V).sum()
        (change_VH,) = torch.autograd.grad(loss, head_VH)
        gains.append((g_VH * torch.linalg.solve(moment_HH, change_VH.T).T).sum())
    return torch.stack(gains)


def gains(soft: SoftTokens) -> Gains:
    return token_gains(HELDOUT, TRAINED, soft, HEAD_VH)


@pytest.fixture(autouse=True, params=[4, 1 << 22], ids=["tiles", "at once"])
def tile_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token of the vocabulary at a time, and all of them together."""
    monkeypatch.setattr(signal, "TILE_ELEMENTS", request.param)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gains_are_products_of_the_head_s_gradients(temperature: float) -> None:
    got = gains(SoftTokens(None, TEACHER_NV, NO_TAIL, temperature))
    torch.testing.assert_close(got.soft_N, by_autograd("soft", temperature), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.hard_N, by_autograd("hard"), rtol=1e-4, atol=1e-5)


def test_fewer_tokens_than_features_give_the_same_through_the_smaller_system() -> None:
    few = HeadTokens(TRAINED.hidden_NH[:3], TRAINED.labels_N[:3])
    soft = SoftTokens(None, TEACHER_NV[:3], NO_TAIL[:3])
    got = token_gains(HELDOUT, few, soft, HEAD_VH)
    torch.testing.assert_close(got.soft_N, by_autograd("soft", count=3), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.hard_N, by_autograd("hard", count=3), rtol=1e-4, atol=1e-5)


def test_a_tail_is_shared_as_the_student_shares_it() -> None:
    got = gains(SoftTokens(IDS_NK, PROBS_NK, 1 - PROBS_NK.sum(-1)))
    torch.testing.assert_close(got.soft_N, by_autograd("topk_tail"), rtol=1e-4, atol=1e-5)


def test_all_of_the_vocabulary_kept_by_ids_is_the_full_distribution() -> None:
    by_ids = SoftTokens(torch.arange(V).flip(0).expand(N, V), TEACHER_NV.flip(1), NO_TAIL)
    full = SoftTokens(None, TEACHER_NV, NO_TAIL)
    torch.testing.assert_close(gains(by_ids).soft_N, gains(full).soft_N)


def test_a_place_without_an_outcome_counts_for_nothing() -> None:
    plain = SoftTokens(IDS_NK, PROBS_NK, 1 - PROBS_NK.sum(-1))
    padded = SoftTokens(
        torch.cat([IDS_NK, torch.full((N, 1), -1)], 1),
        torch.cat([PROBS_NK, torch.full((N, 1), 9.0)], 1),
        plain.tail_N,
    )
    torch.testing.assert_close(gains(padded).soft_N, gains(plain).soft_N)


def test_a_gain_by_hand() -> None:
    """The student is uniform over two tokens; both labels are 0, and h = 2.

    residual = (-0.5, 0.5); the teacher says (0.75, 0.25), so soft = (-0.25, 0.25) and the products
    are 0.125 + 0.125 = 0.25; hard = (-0.5, 0.5): 0.5. The one feature's second moment is 4, so each
    is multiplied by 2 * 2 / (4 + 1 * 4) = 0.5.
    """
    token = HeadTokens(torch.full((1, 1), 2.0), torch.zeros(1, dtype=torch.long))
    soft = SoftTokens(None, torch.tensor([[0.75, 0.25]]), torch.zeros(1))
    got = token_gains(token, token, soft, torch.zeros(2, 1), ridge=1.0)
    assert got.soft_N.item() == pytest.approx(0.125)
    assert got.hard_N.item() == pytest.approx(0.25)
