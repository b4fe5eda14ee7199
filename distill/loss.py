"""The soft and the hard loss of tokens, from hidden states, without the logits of all of them.

N trained tokens (flat over rows, however these are packed or dealt out), V vocabulary, H hidden
size, K outcomes that are kept of a teacher's word, O = K + 1 outcomes with the tail.

With z the student's logits over the temperature, S the outcomes that are kept, and
r = log sum of e^z over all tokens outside of S, every loss here is a function of z_S and r alone:

    log Z = log(e^r + sum over S of e^z),  log q_k = z_k - log Z,  log q_tail = r - log Z

So the LM head runs once for hard and soft target together, tile by tile (distill/outcomes.py), and
what is kept for the backward pass is [N, O]. For `full` K is V: the reference, for small
vocabularies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.config import DivergenceKind, FormatKind
from distill.outcomes import outcome_logits
from distill.targets import TeacherTargets
from ground.errors import RecipeError
from ground.logprobs import compute_dtype, token_logprobs

FLOOR = -30.0
"""Log-prob that stands for -inf where a loss would be infinite without it."""
_NEVER = -1e4
"""As good as -inf in a sum, and finite."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """Which distance between teacher and student is the soft loss.

    Example:
        Divergence("jsd", beta=0.5)
    """

    kind: DivergenceKind = "forward"
    beta: float = 0.5
    """Of `jsd`."""
    temperature: float = 1.0
    """The one that the targets were made at."""

    def require_format(self, kind: FormatKind) -> None:
        """Refuse targets of which this cannot be computed.

        Raises:
            RecipeError: `sampled` knows the teacher where it was drawn only.
        """
        if kind == "sampled" and self.kind != "forward":
            raise RecipeError(
                f"sft.distill.divergence '{self.kind}' cannot be computed from sampled targets",
                why="it needs the teacher's probability of what the student does, and draws tell "
                "nothing of tokens that were not drawn",
                fix="set targets.format to topk_tail, or the divergence to forward",
            )


def distill_loss(
    hard_N: Tensor, soft_N: Tensor, weights_N: Tensor, num_tokens: Tensor | float
) -> Tensor:
    """((1 - w) hard + w soft), summed and divided by the tokens of the whole step.

    Args:
        weights_N: share of the soft target of each token, without gradient.
        num_tokens: over all passes and ranks, so that the loss does not depend on the split.
    """
    per_token_N = hard_N + weights_N * (soft_N - hard_N)
    return per_token_N.sum() / torch.as_tensor(num_tokens).clamp(min=1)


def token_losses(
    hidden_NH: Tensor,
    head_weight_VH: Tensor,
    labels_N: Tensor,
    targets: TeacherTargets,
    divergence: Divergence,
) -> tuple[Tensor, Tensor]:
    """Cross-entropy with the label, and the distance from the teacher, of each token in nats.

    The distance is multiplied by the squared temperature, which keeps the size of its gradient
    (arXiv 1503.02531). Where the teacher says nothing (all of it -inf) it is 0, without gradient.
    That of `sampled` targets is an unbiased estimate, which may be negative.

    Example:
        q = [0.5, 0.5], t = [0.9, 0.1], label 0: hard = 0.6931, soft (forward) = 0.3681

    Args:
        hidden_NH: last hidden states at the positions that predict the labels.
        targets: one entry per label; its first outcome is the label, unless it is `full`.
    """
    student_NO = _student(hidden_NH, head_weight_VH, targets, divergence.temperature)
    if divergence.temperature != 1:
        hard_N = -token_logprobs(hidden_NH, head_weight_VH, labels_N)[0]
    elif targets.ids_TK is None:
        hard_N = -student_NO.gather(1, labels_N[:, None])[:, 0]
    else:
        hard_N = -student_NO[:, 0]
    return hard_N, _soft(student_NO, targets, divergence)


def soft_losses(
    hidden_NH: Tensor, head_weight_VH: Tensor, targets: TeacherTargets, divergence: Divergence
) -> Tensor:
    """The distance alone, where there is no label to be true to; see `token_losses`."""
    student_NO = _student(hidden_NH, head_weight_VH, targets, divergence.temperature)
    return _soft(student_NO, targets, divergence)


def _soft(student_NO: Tensor, targets: TeacherTargets, divergence: Divergence) -> Tensor:
    """The distance of each token from its teacher, times the squared temperature."""
    teacher_NO = torch.cat([targets.logprobs_TK, targets.tail_T[:, None]], dim=1)
    teacher_NO = teacher_NO.to(student_NO.dtype)
    soft_N = _distance(student_NO, teacher_NO, divergence)
    if targets.kind == "sampled":
        is_spoken_N = torch.isfinite(teacher_NO).any(-1)
        drawn_N = torch.special.entr(teacher_NO.exp()).sum(-1)
        soft_N = soft_N + (drawn_N - targets.entropy_T) * is_spoken_N
    return divergence.temperature**2 * soft_N


def _student(
    hidden_NH: Tensor, head_weight_VH: Tensor, targets: TeacherTargets, temperature: float
) -> Tensor:
    """The student's log-probs of the outcomes that the targets have, tail last; [N, O]."""
    if targets.ids_TK is None:
        width = targets.logprobs_TK.shape[1]
        dtype = compute_dtype(hidden_NH)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            logits_NV = hidden_NH.to(dtype) @ head_weight_VH.to(dtype).T / temperature
        picked_NK, others = logits_NV[:, :width], logits_NV[:, width:]
        empty_N = others.new_full((len(others),), -torch.inf)
        rest_N = others.logsumexp(-1) if others.shape[1] else empty_N
    else:
        picked_NK, rest_N = outcome_logits(hidden_NH, head_weight_VH, targets.ids_TK, temperature)
    return torch.cat([picked_NK, rest_N[:, None]], dim=1).log_softmax(-1)


def _distance(student_NO: Tensor, teacher_NO: Tensor, divergence: Divergence) -> Tensor:
    """The divergence over outcomes; 0 where the teacher says nothing."""
    if divergence.kind == "forward":
        return _kl(teacher_NO, student_NO)
    is_spoken_N1 = torch.isfinite(teacher_NO).any(-1, keepdim=True)
    student_NO = student_NO.masked_fill(~is_spoken_N1, -torch.inf)
    if divergence.kind == "reverse":
        return _kl(student_NO, teacher_NO)
    beta = divergence.beta
    mixed_NO = torch.logaddexp(
        teacher_NO.clamp(min=_NEVER) + math.log(beta),
        student_NO.clamp(min=_NEVER) + math.log1p(-beta),
    )
    return beta * _kl(teacher_NO, mixed_NO) + (1 - beta) * _kl(student_NO, mixed_NO)


def _kl(first_NO: Tensor, second_NO: Tensor) -> Tensor:
    """sum of p (log p - log q): 0 where p is 0, and q at least e^FLOOR where p is not."""
    is_possible_NO = first_NO > -torch.inf
    first_NO = first_NO.masked_fill(~is_possible_NO, 0)
    second_NO = second_NO.masked_fill(second_NO == -torch.inf, FLOOR)
    terms_NO = first_NO.exp() * (first_NO - second_NO)
    return terms_NO.masked_fill(~is_possible_NO, 0).sum(-1)
