"""Logits of some tokens, and the mass of all others, without ever holding the logits of all.

N tokens in a flat list, C of them in a block, H hidden size, V vocabulary, D a tile's part of it,
K outcomes that are picked of each token.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from ground.logprobs import HeadGradients, blocks, compute_dtype, tiles


def outcome_logits(
    hidden_NH: Tensor, head_weight_VH: Tensor, ids_NK: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Logits of the picked tokens over the temperature, and logsumexp of all that are not picked.

    Differentiable in `hidden_NH` and `head_weight_VH`, through both results.

    Example:
        logits [0, ln 3, ln 5], picked [1, -1] → [[ln 3, -inf]] and [ln 6]

    Args:
        ids_NK: different ids in each row; negative ones pick nothing and give -inf.
    Returns:
        picked_NK and rest_N, at least fp32; rest is -inf where everything is picked.
    """
    result = _OutcomeLogits.apply(hidden_NH, head_weight_VH, ids_NK, temperature)
    return cast(tuple[Tensor, Tensor], result)


class _Saved(FunctionCtx):
    """What `forward` leaves for `backward` (types only)."""

    saved_tensors: tuple[Tensor, Tensor, Tensor, Tensor]
    needs_input_grad: tuple[bool, ...]
    temperature: float


class _OutcomeLogits(torch.autograd.Function):
    """Logits tile by tile, twice: the backward pass makes each again.

    ∂ picked_k / ∂z_j = [j = id_k]   and   ∂ rest / ∂z_j = e^(z_j - rest) for what is not picked.
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx, hidden_NH: Tensor, weight_VH: Tensor, ids_NK: Tensor, temperature: float
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(hidden_NH)
        picked_NK = hidden_NH.new_empty(ids_NK.shape, dtype=dtype)
        rest_N = hidden_NH.new_empty(len(ids_NK), dtype=dtype)
        for part, hidden_CH in blocks(hidden_NH, weight_VH, temperature):
            picked_NK[part], rest_N[part] = _forward_block(hidden_CH, weight_VH, ids_NK[part])
        ctx.save_for_backward(hidden_NH, weight_VH, ids_NK, rest_N)
        ctx.temperature = temperature  # pyright: ignore[reportAttributeAccessIssue]
        return picked_NK, rest_N

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: _Saved, picked_grad_NK: Tensor, rest_grad_N: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_NH, weight_VH, ids_NK, rest_N = ctx.saved_tensors
        gradients = HeadGradients(hidden_NH, weight_VH, ctx.needs_input_grad, rest_N.dtype)
        nothing_N = rest_N == -torch.inf
        rest_N, rest_grad_N = (
            rest_N.masked_fill(nothing_N, 0),
            rest_grad_N.masked_fill(nothing_N, 0),
        )
        for part, hidden_CH in blocks(hidden_NH, weight_VH, ctx.temperature):
            for span, weight_DH, grad_CD in tiles(hidden_CH, weight_VH):
                rows, slots, columns = _inside(ids_NK[part], span)
                grad_CD[rows, columns] = -torch.inf
                grad_CD.sub_(rest_N[part, None]).exp_().mul_(rest_grad_N[part, None])
                grad_CD[rows, columns] = picked_grad_NK[part][rows, slots]
                gradients.hidden_by(part, grad_CD, weight_DH, ctx.temperature)
                gradients.weight_by(span, grad_CD, hidden_CH)
        return (*gradients.whole(), None, None)


def _forward_block(hidden_CH: Tensor, weight_VH: Tensor, ids_CK: Tensor) -> tuple[Tensor, Tensor]:
    """Picked logits of a block, and the logsumexp of its others, summed up over the tiles."""
    picked_CK = hidden_CH.new_full(ids_CK.shape, -torch.inf)
    largest_C = hidden_CH.new_full((len(ids_CK),), -torch.inf)
    total_C = torch.zeros_like(largest_C)
    for span, _, logits_CD in tiles(hidden_CH, weight_VH):
        rows, slots, columns = _inside(ids_CK, span)
        picked_CK[rows, slots] = logits_CD[rows, columns]
        logits_CD[rows, columns] = -torch.inf
        above_C = torch.maximum(largest_C, logits_CD.amax(-1))
        base_C = above_C.masked_fill(above_C == -torch.inf, 0)
        total_C = total_C * (largest_C - base_C).exp()
        total_C += logits_CD.sub_(base_C[:, None]).exp_().sum(-1)
        largest_C = above_C
    return picked_CK, largest_C + total_C.log().nan_to_num(neginf=0.0)


def _inside(ids_CK: Tensor, span: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and slots of the ids that lie in a tile, and their columns there."""
    rows, slots = ((ids_CK >= span.start) & (ids_CK < span.stop)).nonzero(as_tuple=True)
    return rows, slots, ids_CK[rows, slots].long() - span.start
