"""The gain of a token against gradients that autograd makes, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distill import signal
from distill.signal import HeadTokens, SoftTokens, token_gains

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


def by_autograd(soft_loss: str, temperature: float = 1.0, hard: bool = True) -> Tensor:
    """<g, gradient of KL - CE> of each token, from explicit gradients of the head."""
    head_VH = HEAD_VH.clone().requires_grad_()
    heldout_loss = F.cross_entropy(HELDOUT.hidden_NH @ head_VH.T, HELDOUT.labels_N)
    (g_VH,) = torch.autograd.grad(heldout_loss, head_VH)
    gains = []
    for j in range(N):
        z_V = TRAINED.hidden_NH[j] @ head_VH.T
        log_q_V = (z_V / temperature).log_softmax(-1)
        loss = temperature**2 * -(TEACHER_NV[j] * log_q_V).sum()
        if soft_loss == "topk_tail":
            is_kept = torch.zeros(V, dtype=torch.bool).index_fill(0, IDS_NK[j], True)
            tail = 1 - PROBS_NK[j].sum()
            log_rest = log_q_V.masked_fill(is_kept, -torch.inf).logsumexp(-1)
            loss = -(PROBS_NK[j] * log_q_V[IDS_NK[j]]).sum() - tail * log_rest
        if hard:
            loss = loss - F.cross_entropy(z_V[None], TRAINED.labels_N[j : j + 1])
        (change_VH,) = torch.autograd.grad(loss, head_VH)
        gains.append((g_VH * change_VH).sum())
    return torch.stack(gains)


@pytest.fixture(autouse=True, params=[4, 1 << 22], ids=["tiles", "at once"])
def tile_elements(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token of the vocabulary at a time, and all of them together."""
    monkeypatch.setattr(signal, "TILE_ELEMENTS", request.param)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("hard", [True, False])
def test_gains_are_products_of_the_head_s_gradients(temperature: float, hard: bool) -> None:
    soft = SoftTokens(None, TEACHER_NV, NO_TAIL, temperature)
    got = token_gains(HELDOUT, TRAINED, soft, HEAD_VH, hard=hard)
    torch.testing.assert_close(got, by_autograd("full", temperature, hard))


def test_a_tail_is_shared_as_the_student_shares_it() -> None:
    soft = SoftTokens(IDS_NK, PROBS_NK, 1 - PROBS_NK.sum(-1))
    got = token_gains(HELDOUT, TRAINED, soft, HEAD_VH)
    torch.testing.assert_close(got, by_autograd("topk_tail"))


def test_all_of_the_vocabulary_kept_by_ids_is_the_full_distribution() -> None:
    ids_NK = torch.arange(V).flip(0).expand(N, V)
    by_ids = SoftTokens(ids_NK, TEACHER_NV.flip(1), NO_TAIL)
    torch.testing.assert_close(
        token_gains(HELDOUT, TRAINED, by_ids, HEAD_VH),
        token_gains(HELDOUT, TRAINED, SoftTokens(None, TEACHER_NV, NO_TAIL), HEAD_VH),
    )


def test_a_place_without_an_outcome_counts_for_nothing() -> None:
    padded = SoftTokens(
        torch.cat([IDS_NK, torch.full((N, 1), -1)], 1),
        torch.cat([PROBS_NK, torch.full((N, 1), 9.0)], 1),
        1 - PROBS_NK.sum(-1),
    )
    plain = SoftTokens(IDS_NK, PROBS_NK, padded.tail_N)
    torch.testing.assert_close(
        token_gains(HELDOUT, TRAINED, padded, HEAD_VH),
        token_gains(HELDOUT, TRAINED, plain, HEAD_VH),
    )


def test_a_gain_by_hand() -> None:
    """The student is uniform over two tokens; held-out and trained label are 0, h = 1 for both.

    g = (0.5 - 1, 0.5); the teacher says (0.25, 0.75), so change = (1 - 0.25, -0.75) and
    gain = -0.5 * 0.75 + 0.5 * -0.75 = -0.75: this teacher is the wrong one to listen to.
    """
    token = HeadTokens(torch.ones(1, 1), torch.zeros(1, dtype=torch.long))
    soft = SoftTokens(None, torch.tensor([[0.25, 0.75]]), torch.zeros(1))
    assert token_gains(token, token, soft, torch.zeros(2, 1)).item() == pytest.approx(-0.75)
