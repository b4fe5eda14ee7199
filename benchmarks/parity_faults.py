"""Ten ways in which an engine can end up with other weights than it was handed.

Each is what a defect of a loader leaves behind; put together from the version that was handed over
and, where something is stale, the version before. For the parity benchmark and its fast tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]
Damage = Callable[[Weights, Weights], dict[str, Tensor]]


def damages(names: Weights) -> dict[str, Damage]:
    """The faults that a model with these tensors can have, by what the issue calls them."""
    has_experts = any("experts.down_proj" in name for name in names)
    experts: dict[str, Damage] = {
        "one expert stale": _stale_expert,
        "two experts swapped": _swapped_experts,
        "router stale": lambda now, old: _stale(now, old, "router"),
    }
    return (experts if has_experts else {}) | {
        "1% scale on one matrix": lambda now, old: _changed(now, _matrix(now), lambda w: w * 1.01),
        "transposed square matrix": _transposed,
        "one layer from the version before": lambda now, old: _stale(now, old, "layers.1."),
        "one missing norm": lambda now, old: _changed(now, "layers.1.input_layer", torch.ones_like),
        "embeddings stale": lambda now, old: _stale(now, old, "embed_tokens"),
        "a NaN": _nan,
        "wrong dtype cast": lambda now, old: _changed(now, _matrix(now), _coarser),
    }


def _coarser(tensor: Tensor) -> Tensor:
    """Through the next smaller type and back."""
    small = torch.float8_e4m3fn if tensor.dtype == torch.bfloat16 else torch.bfloat16
    return tensor.to(small).to(tensor.dtype)


def _matrix(weights: Weights) -> str:
    return next(name for name in weights if "layers.1." in name and "o_proj" in name)


def _changed(now: Weights, part: str, change: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    (name,) = [name for name in now if part in name]
    return {**now, name: change(now[name])}


def _stale(now: Weights, old: Weights, part: str) -> dict[str, Tensor]:
    assert any(part in name for name in now)
    return {name: old[name] if part in name else tensor for name, tensor in now.items()}


def _expert_tensors(now: Weights) -> list[str]:
    """Tensors [E, …] of the experts of one layer."""
    first = next(name for name in now if "experts.down_proj" in name)
    return [name for name in now if name.startswith(first.removesuffix("down_proj"))]


def _stale_expert(now: Weights, old: Weights) -> dict[str, Tensor]:
    names = _expert_tensors(now)
    # An expert that the step did not touch cannot be stale.
    moved_E = sum((now[name] - old[name]).float().abs().flatten(1).sum(1) for name in names)
    assert isinstance(moved_E, Tensor) and bool(moved_E.any())
    expert = int(moved_E.argmax())
    changed = {**now, **{name: now[name].clone() for name in names}}
    for name in names:
        changed[name][expert] = old[name][expert]
    return changed


def _swapped_experts(now: Weights, old: Weights) -> dict[str, Tensor]:
    del old
    order = [1, 0, *range(2, len(now[_expert_tensors(now)[0]]))]
    return {**now, **{name: now[name][order] for name in _expert_tensors(now)}}


def _transposed(now: Weights, old: Weights) -> dict[str, Tensor]:
    del old
    squares = (name for name, each in now.items() if each.ndim == 2 and len({*each.shape}) == 1)
    name = next(squares)
    return {**now, name: now[name].T.contiguous()}


def _nan(now: Weights, old: Weights) -> dict[str, Tensor]:
    del old
    name = _matrix(now)
    tensor = now[name].clone()
    tensor.view(-1)[tensor.numel() // 2] = float("nan")
    return {**now, name: tensor}
