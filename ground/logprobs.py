"""Log-probabilities of given tokens, without ever holding the logits of all of them.

B rows, T tokens a row, N tokens in a flat list, H hidden size, V vocabulary.

A batch of 16 rows of 4,096 tokens over Llama 4's 202,048 entries would take 53 GB of fp32 logits,
and as much again for their gradient. Here the LM head runs over a few hundred tokens at a time; the
forward pass keeps one number per token (the log of the softmax denominator) and the backward pass
computes the chunk again. LM-head arithmetic is in fp32 whatever the model's own precision.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

import torch
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable
from transformers import PreTrainedModel

from ground.errors import DataError
from ground.packing import has_context, hidden_states

CHUNK_TOKENS = 256
"""Least number of tokens of a chunk: enough rows to keep a matrix unit busy."""
CHUNK_ELEMENTS = 2**22
"""Small vocabularies take more tokens a chunk, up to this many logits (16 MiB in fp32)."""


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
    scored_BT = has_context(segments_BT)
    if wanted_BT is not None:
        scored_BT = scored_BT & wanted_BT[:, 1:].bool()
    logprobs_N, entropy_N = token_logprobs(
        hidden_BTH[:, :-1][scored_BT],
        head_weight(model),
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
    """Chunked forward; backward recomputes each chunk from the saved log-denominators.

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
        dtype = _compute_dtype(hidden_NH)
        logprobs_N = hidden_NH.new_empty(len(targets_N), dtype=dtype)
        entropy_N = torch.empty_like(logprobs_N)
        denominator_N = torch.empty_like(logprobs_N)
        for part, logits_CV in _logits(hidden_NH, weight_VH, temperature):
            denominator_C = logits_CV.logsumexp(-1)
            target_C = logits_CV.gather(-1, targets_N[part, None]).squeeze(-1)
            logprobs_N[part] = target_C - denominator_C
            denominator_N[part] = denominator_C
            logits_CV -= denominator_C[:, None]
            entropy_N[part] = -(logits_CV.exp().mul_(logits_CV)).sum(-1)
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
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        dtype = denominator_N.dtype
        hidden_grad = torch.zeros_like(hidden_NH) if wants_hidden else None
        weight_grad = torch.zeros_like(weight_VH, dtype=dtype) if wants_weight else None
        weight_in_dtype_VH = weight_VH.to(dtype)
        for part, logits_CV in _logits(hidden_NH, weight_VH, ctx.temperature):
            logits_CV -= denominator_N[part, None]
            grad_CV = torch.zeros_like(logits_CV)
            probs_CV = logits_CV.exp()
            if entropy_grad_N is not None:
                surprise_CV = logits_CV.add_(entropy_N[part, None])
                grad_CV -= probs_CV * surprise_CV * entropy_grad_N[part, None]
            if logprob_grad_N is not None:
                upstream_C1 = logprob_grad_N[part, None]
                grad_CV -= probs_CV.mul_(upstream_C1)
                grad_CV.scatter_add_(-1, targets_N[part, None], upstream_C1)
            grad_CV /= ctx.temperature
            if hidden_grad is not None:
                hidden_grad[part] = (grad_CV @ weight_in_dtype_VH).to(hidden_grad.dtype)
            if weight_grad is not None:
                weight_grad.addmm_(grad_CV.T, hidden_NH[part].to(dtype))
        if weight_grad is not None:
            weight_grad = weight_grad.to(weight_VH.dtype)
        return hidden_grad, weight_grad, None, None


class _Saved(FunctionCtx):
    """What `forward` leaves for `backward` (types only)."""

    saved_tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
    needs_input_grad: tuple[bool, ...]
    temperature: float


def _logits(
    hidden_NH: Tensor, weight_VH: Tensor, temperature: float
) -> Iterator[tuple[slice, Tensor]]:
    """Yield (slice of N, its logits over temperature); the tensor is the caller's to overwrite."""
    dtype = _compute_dtype(hidden_NH)
    size = max(CHUNK_TOKENS, CHUNK_ELEMENTS // len(weight_VH))
    weight_HV = weight_VH.to(dtype).T
    for start in range(0, len(hidden_NH), size):
        part = slice(start, start + size)
        with torch.autocast(hidden_NH.device.type, enabled=False):
            logits_CV = (hidden_NH[part].to(dtype) @ weight_HV).div_(temperature)
        yield part, logits_CV


def _compute_dtype(hidden_NH: Tensor) -> torch.dtype:
    return torch.float64 if hidden_NH.dtype == torch.float64 else torch.float32
