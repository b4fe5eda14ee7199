"""What held-out rows say of a teacher: by how much would more of it lower the held-out loss?

The loss of a trained token is (1 - a) CE + a KL, so a unit more of the share a changes its gradient
at the LM head by an outer product, change_j h_j, where for temperature 1

    change_j = (q_j - t_j) - (q_j - onehot(y_j)) = onehot(y_j) - t_j

With g the gradient of the held-out loss at the same head, a step of gradient descent with that unit
lowers the held-out loss, to first order, in proportion to the token's *gain*

    gain_j = < g, change_j h_j > = mean over held-out i of (residual_i . change_j) (h_i . h_j)

No gradient of the size of the head is ever made: the products are taken tile by tile over the
vocabulary. In RL there is no hard target and change_j = q_j - t_j.

The trained tokens must be ones that the student has lately been trained on, so that what it took in
of their label noise is seen; the held-out ones must be new to it.

N trained tokens, M held-out ones, H hidden size, V vocabulary, D a tile's part of it, K outcomes
that are kept of the teacher's distribution.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TILE_ELEMENTS = 1 << 22
"""Numbers in the largest intermediate result, but for one tile's share of every token."""


@dataclass(frozen=True, slots=True)
class HeadTokens:
    """Tokens as the LM head sees them.

    Example:
        HeadTokens(hidden of 512 positions, the 512 tokens that follow them)
    """

    hidden_NH: Tensor
    """The head's input at the positions that predict the labels."""
    labels_N: Tensor


@dataclass(frozen=True, slots=True)
class SoftTokens:
    """The teacher's distribution over the same tokens, as far as it is kept.

    Example:
        top-1 and tail of [0.7, 0.2, 0.1]: ids [[0]], probs [[0.7]], tail [0.3]
    """

    ids_NK: Tensor | None
    """Different ids in each row, negative where there is none; None: all of the vocabulary."""
    probs_NK: Tensor
    """Probabilities, or the weights of draws."""
    tail_N: Tensor
    """Probability of everything that is not kept, together."""
    temperature: float = 1.0
    """That the targets were made at; the soft loss is KL times its square."""


@torch.no_grad()
def token_gains(
    heldout: HeadTokens,
    trained: HeadTokens,
    soft: SoftTokens,
    head_weight_VH: Tensor,
    *,
    hard: bool = True,
) -> Tensor:
    """The gain of every trained token, [N] in fp32; positive where more of the teacher would help.

    Args:
        heldout: tokens of one capability that are not trained on.
        trained: tokens of the same capability from the last batches.
        soft: the teacher's word on the trained tokens.
        hard: whether the share goes over from a hard target to the soft one (SFT); without it the
            KL is added to what is there (RL).
    """
    sum_M = _log_sum(heldout.hidden_NH, head_weight_VH)
    sum_N = _log_sum(trained.hidden_NH, head_weight_VH)
    softened_N = _log_sum(trained.hidden_NH / soft.temperature, head_weight_VH)
    kernel_NM = trained.hidden_NH.float() @ heldout.hidden_NH.float().T / len(sum_M)
    gain_N, rest_N, rest_gain_N = torch.zeros(3, len(sum_N), device=sum_N.device)
    width = _width(head_weight_VH, len(sum_M) + len(sum_N))
    for span, weight_DH in _tiles(head_weight_VH, width):
        residual_MD = (heldout.hidden_NH.float() @ weight_DH.T - sum_M[:, None]).exp_()
        _add_labels(residual_MD, heldout.labels_N, span, -1.0)
        push_ND = kernel_NM @ residual_MD
        logits_ND = trained.hidden_NH.float() @ weight_DH.T
        q_ND = (logits_ND / soft.temperature - softened_N[:, None]).exp_()
        kept_ND, is_kept_ND = _kept(soft, span)
        gain_N += soft.temperature * ((q_ND - kept_ND) * push_ND).sum(-1)
        if hard:
            change_ND = -(logits_ND - sum_N[:, None]).exp()
            _add_labels(change_ND, trained.labels_N, span, 1.0)
            gain_N += (change_ND * push_ND).sum(-1)
        q_ND.masked_fill_(is_kept_ND, 0)
        rest_N += q_ND.sum(-1)
        rest_gain_N += (q_ND * push_ND).sum(-1)
    # What is not kept shares the tail as the student does: that is the tail bucket's gradient.
    tail_N = torch.where(rest_N > 0, soft.tail_N / rest_N, 0.0)
    return gain_N - soft.temperature * tail_N * rest_gain_N


def _log_sum(hidden_NH: Tensor, head_weight_VH: Tensor) -> Tensor:
    """The logarithm of the softmax's denominator, [N]."""
    width = _width(head_weight_VH, len(hidden_NH))
    parts = [
        (hidden_NH.float() @ weight_DH.T).logsumexp(-1)
        for _, weight_DH in _tiles(head_weight_VH, width)
    ]
    return torch.stack(parts).logsumexp(0)


def _kept(soft: SoftTokens, span: slice) -> tuple[Tensor, Tensor]:
    """The teacher's kept probabilities in a tile, 0 elsewhere, and where they stand; [N, D]."""
    if soft.ids_NK is None:
        probs_ND = soft.probs_NK[:, span].float()
        return probs_ND, torch.ones_like(probs_ND, dtype=torch.bool)
    probs_ND = soft.probs_NK.new_zeros(
        (len(soft.probs_NK), span.stop - span.start), dtype=torch.float32
    )
    is_kept_ND = torch.zeros_like(probs_ND, dtype=torch.bool)
    rows, slots = ((soft.ids_NK >= span.start) & (soft.ids_NK < span.stop)).nonzero(as_tuple=True)
    columns = soft.ids_NK[rows, slots].long() - span.start
    probs_ND[rows, columns] = soft.probs_NK[rows, slots].float()
    is_kept_ND[rows, columns] = True
    return probs_ND, is_kept_ND


def _add_labels(values_ND: Tensor, labels_N: Tensor, span: slice, amount: float) -> None:
    """Add `amount` at the labels that lie in the tile."""
    rows = ((labels_N >= span.start) & (labels_N < span.stop)).nonzero(as_tuple=True)[0]
    values_ND[rows, labels_N[rows] - span.start] += amount


def _tiles(head_weight_VH: Tensor, width: int) -> Iterator[tuple[slice, Tensor]]:
    for start in range(0, len(head_weight_VH), width):
        span = slice(start, min(start + width, len(head_weight_VH)))
        yield span, head_weight_VH[span].float()


def _width(head_weight_VH: Tensor, tokens: int) -> int:
    return max(min(TILE_ELEMENTS // max(tokens, 1), len(head_weight_VH)), 1)
