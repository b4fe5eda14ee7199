"""Log-probabilities of given tokens, without ever holding the logits of all of them.

B rows, T tokens a row, N tokens in a flat list, H hidden size, V vocabulary.

A batch of 16 rows of 4,096 tokens over Llama 4's 202,048 entries would take 53 GB of fp32 logits,
and as much again for their gradient. Here the LM head runs tile by tile, some hundred tokens by a
part of the vocabulary; the forward pass keeps one number per token (the log of the softmax
denominator) and the backward pass computes the tile again. LM-head arithmetic is in fp32 whatever
the model's own precision.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import PreTrainedModel

from ground.errors import DataError
from ground.packing import has_context, hidden_states

BLOCK_TOKENS = 256
"""Least number of tokens that share a tile: enough rows to keep a matrix unit busy."""
TILE_ELEMENTS = 2**26
"""Logits of a tile, at most (256 MiB in fp32)."""
TILE_ELEMENTS_CPU = 2**20
"""On a CPU a tile stays in the cache of a core, so that only the matrix products cost time."""


def token_logprobs(
    hidden_NH: Tensor,
    head_weight_VH: Tensor,
    targets_N: Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of its distribution, at a temperature.

    Differentiable in `hidden_NH` and `head_weight_VH`, through both results.

    Example:
        logits [0, ln 3] at temperature 1: log-prob of target 1 is ln 0.75, entropy 0.5623 nats

    Args:
        hidden_NH: last hidden states at the positions that predict the targets.
        temperature: logits are divided by it, as the sampler does.
    Returns:
        logprobs_N and entropy_N in nats, at least fp32.
    """
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    result = _TokenLogprobs.apply(hidden_NH, head_weight_VH, targets_N, temperature)
    return cast(tuple[Tensor, Tensor], result)


def model_logprobs(
    model: PreTrainedModel,
    tokens_BT: Tensor,
    segments_BT: Tensor,
    *,
    temperature: float = 1.0,
    wanted_BT: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of each token given its row so far; index t speaks of token t.

    The first token of a row has no context and gets 0, as do padding and tokens that are not
    wanted, for which the LM head does not run.

    Args:
        segments_BT: number of each token's row (ground/packing.py), 0 on the padding at the end;
            for one right-padded row per sequence a mask of ones and zeros.
        wanted_BT: tokens whose numbers are needed; all by default.
    """
    hidden_BTH = hidden_states(model, tokens_BT, segments_BT)
    return spoken_logprobs(
        hidden_BTH, head_weight(model), tokens_BT, segments_BT, temperature, wanted_BT
    )


def spoken_logprobs(
    hidden_BTH: Tensor,
    head_weight_VH: Tensor,
    tokens_BT: Tensor,
    segments_BT: Tensor,
    temperature: float,
    wanted_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`model_logprobs` from the last hidden states of the same tokens."""
    scored_BT = has_context(segments_BT)
    if wanted_BT is not None:
        scored_BT = scored_BT & wanted_BT[:, 1:].bool()
    logprobs_N, entropy_N = token_logprobs(
        hidden_BTH[:, :-1][scored_BT],
        head_weight_VH,
        tokens_BT[:, 1:][scored_BT],
        temperature,
    )
    return _spread(logprobs_N, scored_BT), _spread(entropy_N, scored_BT)


class LogprobModel(nn.Module):
    """`model_logprobs` as a forward pass, for wrappers (DDP, FSDP, ZeRO) that hook into forward.

    Prepare this with accelerate; a wrapped bare model whose backbone is called from outside reduces
    no gradients.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        tokens_BT: Tensor,
        segments_BT: Tensor,
        wanted_BT: Tensor | None = None,
        temperature: float = 1.0,
    ) -> tuple[Tensor, Tensor]:
        """See `model_logprobs`."""
        return model_logprobs(
            self.model, tokens_BT, segments_BT, temperature=temperature, wanted_BT=wanted_BT
        )


def head_weight(model: PreTrainedModel) -> Tensor:
    """The LM head's weight [V, H]; heads with a bias are refused, since it would be left out."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise DataError(
            "the LM head must be a linear map without bias",
            where=type(model).__name__,
            fix="use a model of the families that ground/model.py lists",
        )
    return head.weight


def _spread(values_N: Tensor, scored_BT: Tensor) -> Tensor:
    """Put the scored values back to their places, zeros elsewhere, one column in front."""
    rows, columns = scored_BT.shape
    spread_BT = values_N.new_zeros(rows, columns + 1)
    return spread_BT.index_put((scored_BT.nonzero()[:, 0], scored_BT.nonzero()[:, 1] + 1), values_N)


class _TokenLogprobs(torch.autograd.Function):
    """Logits tile by tile, twice: the backward pass makes each again from its log-denominator.

    With z the logits over temperature, p = softmax(z), H = -Σ p log p:
    ∂ log p_y / ∂z_j = [j = y] - p_j   and   ∂H / ∂z_j = -p_j (log p_j + H).
    """

    @staticmethod
    def forward(
        ctx: FunctionCtx,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        targets_N: Tensor,
        temperature: float,
    ) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(hidden_NH)
        logprobs_N = hidden_NH.new_empty(len(targets_N), dtype=dtype)
        entropy_N, denominator_N = torch.empty_like(logprobs_N), torch.empty_like(logprobs_N)
        for part, hidden_CH in blocks(hidden_NH, weight_VH, temperature):
            found = _forward_block(hidden_CH, weight_VH, targets_N[part])
            logprobs_N[part], entropy_N[part], denominator_N[part] = found
        ctx.save_for_backward(hidden_NH, weight_VH, targets_N, denominator_N, entropy_N)
        ctx.temperature = temperature  # pyright: ignore[reportAttributeAccessIssue]
        ctx.set_materialize_grads(False)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: _Saved, logprob_grad_N: Tensor | None, entropy_grad_N: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, None, None]:
        hidden_NH, weight_VH, targets_N, denominator_N, entropy_N = ctx.saved_tensors
        dtype = denominator_N.dtype
        gradients = HeadGradients(hidden_NH, weight_VH, ctx.needs_input_grad, dtype)
        if logprob_grad_N is None:
            logprob_grad_N = torch.zeros_like(denominator_N)
        for part, hidden_CH in blocks(hidden_NH, weight_VH, ctx.temperature):
            upstream_C, inner_C = logprob_grad_N[part].to(dtype), None
            if entropy_grad_N is not None:
                inner_C = entropy_grad_N[part].to(dtype)
            for span, weight_DH, logits_CD in tiles(hidden_CH, weight_VH):
                logits_CD -= denominator_N[part, None]
                grad_CD = _tile_gradient(logits_CD, upstream_C, inner_C, entropy_N[part])
                _add_targets(grad_CD, targets_N[part], span, upstream_C)
                gradients.hidden_by(part, grad_CD, weight_DH, ctx.temperature)
                gradients.weight_by(span, grad_CD, hidden_CH)
        return (*gradients.whole(), None, None)


class _Saved(FunctionCtx):
    """What `forward` leaves for `backward` (types only)."""

    saved_tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    needs_input_grad: tuple[bool, ...]
    temperature: float


def _forward_block(
    hidden_CH: Tensor, weight_VH: Tensor, targets_C: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-prob, entropy and log-denominator of a block, its softmax summed up over the tiles.

    With m the largest logit so far: total = Σ e^(z - m) and weighted = Σ e^(z - m) (z - m).
    """
    target_C = hidden_CH.new_zeros(len(hidden_CH))
    total_C, weighted_C, largest_C = target_C.clone(), target_C.clone(), None
    for span, _, logits_CD in tiles(hidden_CH, weight_VH):
        place_C, inside_C = _place(targets_C, span)
        picked_C = logits_CD.gather(-1, place_C[:, None]).squeeze(-1)
        target_C = torch.where(inside_C, picked_C, target_C)
        here_C = logits_CD.amax(-1)
        if largest_C is None:
            largest_C = here_C
        above_C = torch.maximum(largest_C, here_C)
        shift_C = largest_C - above_C
        logits_CD -= above_C[:, None]
        exps_CD = logits_CD.exp()
        weighted_C = shift_C.exp() * (weighted_C + shift_C * total_C)
        total_C = shift_C.exp() * total_C + exps_CD.sum(-1)
        weighted_C += exps_CD.mul_(logits_CD).sum(-1)
        largest_C = above_C
    assert largest_C is not None
    denominator_C = largest_C + total_C.log()
    return target_C - denominator_C, total_C.log() - weighted_C / total_C, denominator_C


def _tile_gradient(
    logprobs_CD: Tensor, upstream_C: Tensor, inner_C: Tensor | None, entropy_C: Tensor
) -> Tensor:
    """Gradient by a tile's logits, targets left out; the tile of log p is used up."""
    if inner_C is None:
        return logprobs_CD.exp_().mul_(-upstream_C[:, None])
    factor_CD = (logprobs_CD + entropy_C[:, None]).mul_(inner_C[:, None]).add_(upstream_C[:, None])
    return logprobs_CD.exp_().mul_(factor_CD).neg_()


def _add_targets(grad_CD: Tensor, targets_C: Tensor, span: slice, upstream_C: Tensor) -> None:
    """Add the upstream gradient where a target lies in the tile."""
    place_C, inside_C = _place(targets_C, span)
    grad_CD.scatter_add_(-1, place_C[:, None], (upstream_C * inside_C)[:, None])


def _place(targets_C: Tensor, span: slice) -> tuple[Tensor, Tensor]:
    """Each target's column in the tile (any column when it is elsewhere), and whether it is in."""
    columns_C = targets_C - span.start
    inside_C = (columns_C >= 0) & (columns_C < span.stop - span.start)
    return columns_C.clamp(0, span.stop - span.start - 1), inside_C


class HeadGradients:
    """Gradients of hidden states and head weight, summed up tile by tile where they are wanted."""

    def __init__(
        self, hidden_NH: Tensor, weight_VH: Tensor, wanted: Sequence[bool], dtype: torch.dtype
    ) -> None:
        """`wanted` is for hidden states and weight; sums are of `dtype`, results of their own."""
        self._dtypes = hidden_NH.dtype, weight_VH.dtype
        self._hidden_NH = torch.zeros_like(hidden_NH, dtype=dtype) if wanted[0] else None
        self._weight_VH = torch.zeros_like(weight_VH, dtype=dtype) if wanted[1] else None

    def hidden_by(
        self, part: slice, grad_CD: Tensor, weight_DH: Tensor, temperature: float
    ) -> None:
        """Add what a tile's gradient says of the hidden states of its block."""
        if self._hidden_NH is not None:
            self._hidden_NH[part].addmm_(grad_CD, weight_DH, alpha=1 / temperature)

    def weight_by(self, span: slice, grad_CD: Tensor, hidden_CH: Tensor) -> None:
        """Add what it says of the weights of its part of the vocabulary.

        Args:
            hidden_CH: over the temperature, as `blocks` yields them.
        """
        if self._weight_VH is not None:
            self._weight_VH[span].addmm_(grad_CD.T, hidden_CH)

    def whole(self) -> tuple[Tensor | None, Tensor | None]:
        """Of hidden states and weight, None where not wanted."""
        hidden_NH, weight_VH = self._hidden_NH, self._weight_VH
        return (
            None if hidden_NH is None else hidden_NH.to(self._dtypes[0]),
            None if weight_VH is None else weight_VH.to(self._dtypes[1]),
        )


def blocks(
    hidden_NH: Tensor, weight_VH: Tensor, temperature: float
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (slice of N, its hidden states over temperature), so that a tile of logits is small."""
    dtype = compute_dtype(hidden_NH)
    size = max(BLOCK_TOKENS, _tile_elements(hidden_NH) // len(weight_VH))
    for start in range(0, len(hidden_NH), size):
        part = slice(start, min(start + size, len(hidden_NH)))
        yield part, hidden_NH[part].to(dtype) / temperature


def tiles(hidden_CH: Tensor, weight_VH: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield (slice of V, its weights, its logits); the logits are the caller's to overwrite."""
    vocabulary = len(weight_VH)
    width = max(_tile_elements(hidden_CH) // len(hidden_CH), 1)
    for start in range(0, vocabulary, width):
        span = slice(start, min(start + width, vocabulary))
        with torch.autocast(hidden_CH.device.type, enabled=False):
            weight_DH = weight_VH[span].to(hidden_CH.dtype)
            logits_CD = hidden_CH @ weight_DH.T
        yield span, weight_DH, logits_CD


def _tile_elements(like: Tensor) -> int:
    return TILE_ELEMENTS_CPU if like.device.type == "cpu" else TILE_ELEMENTS


def compute_dtype(hidden_NH: Tensor) -> torch.dtype:
    return torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
