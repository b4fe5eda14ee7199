"""From the recipe's `rl.loss` to a number per token: which formula, which masks, which weight.

N trained tokens of a micro-batch, flat over rows; the formulas stand in rl/loss.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rl.loss import (
    aipo,
    cispo,
    clip,
    decoupled,
    icepop_mask,
    interpolated,
    reference_kl,
    sequence_mask,
)
from rl.objective_config import AipoLoss, CispoLoss, ClipLoss, LossSection


@dataclass(frozen=True, slots=True)
class Tokens:
    """What a loss may look at, one entry per trained token."""

    logprobs_N: Tensor
    """log pi, differentiable."""
    behavior_N: Tensor
    advantages_N: Tensor
    ages_N: Tensor
    """Versions between sampling and this step."""
    rows_N: Tensor
    """Which row of the micro-batch a token belongs to; rows are whole."""
    reference_N: Tensor | None = None
    """log-prob under the stage's first model, where the loss wants it."""


@dataclass(frozen=True, slots=True)
class TokenLosses:
    """The loss of each token and what the loss made of it."""

    loss_N: Tensor
    weights_N: Tensor
    """What A * grad log pi is multiplied with; 0 where the token is silenced."""
    clipped_N: Tensor
    """True where the formula cut the ratio or silenced the token."""
    kept_N: Tensor
    """False where a mask dropped the token."""


def policy_loss(section: LossSection, tokens: Tokens) -> TokenLosses:
    """Loss of each token; divide the global sum by the global number of tokens, dropped or not.

    A mask multiplies, so that a NaN stays one and ends in the learner's guard.
    """
    loss_N, weights_N, clipped_N = _formula(section, tokens)
    kept_N = _kept(section, tokens)
    if tokens.reference_N is not None:
        kl_N = reference_kl(tokens.logprobs_N, tokens.behavior_N, tokens.reference_N)
        loss_N = loss_N + section.reference_kl * kl_N
    return TokenLosses(loss_N * kept_N, weights_N * kept_N, clipped_N, kept_N)


def _formula(section: LossSection, tokens: Tokens) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, weight and whether the formula's bound is met, of each token."""
    given = (tokens.behavior_N, tokens.advantages_N)
    logprobs_N = tokens.logprobs_N.detach()
    rho_N = (logprobs_N - tokens.behavior_N).exp()
    if isinstance(section, AipoLoss):
        loss_N = aipo(tokens.logprobs_N, *given, section.rho_max)
        return loss_N, rho_N.clamp(max=section.rho_max), rho_N > section.rho_max
    if isinstance(section, CispoLoss):
        bounds = section.rho_min, section.rho_max
        weights_N = rho_N.clamp(*bounds)
        return cispo(tokens.logprobs_N, *given, *bounds), weights_N, weights_N != rho_N
    widths = section.low, section.high
    if isinstance(section, ClipLoss):
        silenced_N = _is_silenced(rho_N, tokens.advantages_N, *widths)
        return clip(tokens.logprobs_N, *given, *widths), rho_N * ~silenced_N, silenced_N
    proximal_N = logprobs_N
    if section.proximal == "interpolate":
        proximal_N = interpolated(logprobs_N, tokens.behavior_N, tokens.ages_N)
    loss_N = decoupled(tokens.logprobs_N, proximal_N, *given, *widths, section.weight_max)
    r_N, correction_N = (logprobs_N - proximal_N).exp(), (proximal_N - tokens.behavior_N).exp()
    silenced_N = _is_silenced(r_N, tokens.advantages_N, *widths)
    weights_N = correction_N.clamp(max=section.weight_max) * r_N * ~silenced_N
    return loss_N, weights_N, silenced_N | (correction_N > section.weight_max)


def _is_silenced(ratio_N: Tensor, advantages_N: Tensor, low: float, high: float) -> Tensor:
    """Where PPO's minimum takes the clipped side, which has no gradient."""
    too_high_N = (advantages_N > 0) & (ratio_N > 1 + high)
    return too_high_N | ((advantages_N < 0) & (ratio_N < 1 - low))


def _kept(section: LossSection, tokens: Tokens) -> Tensor:
    kept_N = torch.ones_like(tokens.behavior_N, dtype=torch.bool)
    if section.icepop:
        mask = section.icepop
        kept_N &= icepop_mask(tokens.logprobs_N, tokens.behavior_N, mask.low, mask.high)
    if section.sequence_mask:
        kept_N &= sequence_mask(
            tokens.logprobs_N,
            tokens.behavior_N,
            tokens.advantages_N,
            tokens.rows_N,
            section.sequence_mask,
        )
    return kept_N
