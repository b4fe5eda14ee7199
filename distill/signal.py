"""What held-out rows say of the last batches' targets: which of them would lower their loss?

A trained token's gradient at the LM head is an outer product change_j h_j, with

    soft_j = q_j - t_j            of KL(teacher || student)
    hard_j = q_j - onehot(y_j)    of the cross-entropy of its label

(for temperature 1; the student's distribution q, the teacher's t, the label y). With residual_i =
q_i - onehot(y_i) of the held-out tokens, the *gain* of a token's target is

    gain_j = mean over held-out i of (residual_i . change_j) (h_i . (C + ridge)^-1 h_j)

the fall of the held-out loss, to first order, when the head takes a step of ridge regression on
that target; C is the second moment of the trained tokens' h. Without C (plain gradient descent) the
few directions that all tokens share, such as how sharp the student is, drown out those in which it
learns single tokens by heart.

No gradient of the size of the head is ever made: products are taken between tokens, and tile by
tile over the vocabulary. The trained tokens must be ones that the student was lately trained on, so
that what it took in of their label noise is seen; the held-out ones must be new to it.

N trained tokens, M held-out ones, H hidden size, V vocabulary, D a tile's part of it, K outcomes
that are kept of the teacher's distribution.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.targets import TeacherTargets

TILE_ELEMENTS = 1 << 22
"""Numbers in the largest intermediate result, but for one tile's share of every token."""
RIDGE = 0.01


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

    @classmethod
    def of(
        cls, targets: TeacherTargets, chosen_N: Tensor, temperature: float, device: torch.device
    ) -> SoftTokens:
        """Some of the tokens that a teacher spoke to."""
        ids_NK = None if targets.ids_TK is None else targets.ids_TK[chosen_N].to(device)
        probs_NK = targets.logprobs_TK[chosen_N].exp().to(device)
        return cls(ids_NK, probs_NK, targets.tail_T[chosen_N].exp().to(device), temperature)


@dataclass(frozen=True, slots=True)
class Gains:
    """What the held-out loss gains from each target of the trained tokens; positive is better.

    Example:
        soft [0.2, -0.1], hard [0.1, 0.3]: the second token's teacher would raise the held-out loss
    """

    soft_N: Tensor
    hard_N: Tensor

    def pick(self, mask_N: Tensor) -> Gains:
        """Those of some tokens."""
        return Gains(self.soft_N[mask_N], self.hard_N[mask_N])


@torch.no_grad()
def token_gains(
    heldout: HeadTokens,
    trained: HeadTokens,
    soft: SoftTokens,
    head_weight_VH: Tensor,
    *,
    ridge: float = RIDGE,
) -> Gains:
    """The gains of trained tokens, in fp32.

    Args:
        heldout: tokens of one capability that are not trained on.
        trained: tokens of the same capability from the last batches; a thousand or two, since the
            time grows with their square.
        soft: the teacher's word on the trained tokens.
        ridge: added to C, in mean variances of a feature.
    """
    sum_M = _log_sum(heldout.hidden_NH, head_weight_VH)
    sum_N = _log_sum(trained.hidden_NH, head_weight_VH)
    softened_N = sum_N
    if soft.temperature != 1:
        softened_N = _log_sum(trained.hidden_NH / soft.temperature, head_weight_VH)
    kernel_NM = _kernel(trained.hidden_NH, heldout.hidden_NH, ridge)
    soft_N, hard_N, rest_N, rest_gain_N = torch.zeros(4, len(sum_N), device=sum_N.device)
    width = _width(head_weight_VH, len(sum_M) + len(sum_N))
    for span, weight_DH in _tiles(head_weight_VH, width):
        residual_MD = (heldout.hidden_NH.float() @ weight_DH.T - sum_M[:, None]).exp_()
        _add_labels(residual_MD, heldout.labels_N, span, -1.0)
        push_ND = kernel_NM @ residual_MD
        logits_ND = trained.hidden_NH.float() @ weight_DH.T
        q_ND = (logits_ND / soft.temperature - softened_N[:, None]).exp_()
        kept_ND, is_kept_ND = _kept(soft, span)
        soft_N += ((q_ND - kept_ND) * push_ND).sum(-1)
        q_ND.masked_fill_(is_kept_ND, 0)
        rest_N += q_ND.sum(-1)
        rest_gain_N += (q_ND * push_ND).sum(-1)
        hard_ND = (logits_ND - sum_N[:, None]).exp_()
        _add_labels(hard_ND, trained.labels_N, span, -1.0)
        hard_N += (hard_ND * push_ND).sum(-1)
    # What is not kept shares the tail as the student does: that is the tail bucket's gradient.
    tail_N = torch.where(rest_N > 0, soft.tail_N / rest_N, 0.0)
    return Gains(soft.temperature * (soft_N - tail_N * rest_gain_N), hard_N)


def _kernel(trained_NH: Tensor, heldout_MH: Tensor, ridge: float) -> Tensor:
    """h_j (C + r)^-1 h_i / M for every pair, [N, M]; the system is that of features or of tokens.

    With C = X'X / N it is X (X'X / N + r)^-1 = (XX' / N + r)^-1 X: the smaller one is solved.
    """
    trained_NH, heldout_HM = trained_NH.double(), heldout_MH.double().T / len(heldout_MH)
    tokens, features = trained_NH.shape
    added = ridge * (trained_NH.square().sum() / (tokens * features)).clamp_min(1e-30)
    if features < tokens:
        moment_HH = trained_NH.T @ trained_NH / tokens
        moment_HH.diagonal().add_(added)
        return (trained_NH @ torch.linalg.solve(moment_HH, heldout_HM)).float()
    gram_NN = trained_NH @ trained_NH.T / tokens
    gram_NN.diagonal().add_(added)
    return torch.linalg.solve(gram_NN, trained_NH @ heldout_HM).float()


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
        found = soft.probs_NK[:, span].float()
        beyond = span.stop - span.start - found.shape[1]  # rows of the head that are no token's
        probs_ND = torch.nn.functional.pad(found, (0, beyond))
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
