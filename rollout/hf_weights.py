"""Swapping the weights of a live model: all of them or none, checked before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ground.errors import DataError
from rollout.checksums import spread
from rollout.engine import Lent

_SHOWN = 3


def own_weights(weights: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The tensors on the model's device; copies, unless they are lent to us."""
    must_copy = not isinstance(weights, Lent)
    return {
        name: tensor.detach().to(device, copy=must_copy).contiguous()
        for name, tensor in weights.items()
    }


def swap_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Have the model use these checked tensors from now on, instead of the ones it has.

    Nothing is copied and nothing can fail half-way; a tied weight is one parameter in two places.
    """
    own = model.state_dict(keep_vars=True)
    for name, tensor in weights.items():
        own[name].data = tensor


def check_weights(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that do not belong to a model; names what is wrong.

    Args:
        own: the model's parameters and buffers themselves (`state_dict(keep_vars=True)`).
    """
    tied = _tied_names(own)
    given = {tied[name]: tensor for name, tensor in weights.items() if name in tied}
    _refuse("missing", sorted({tied[name] for name in own} - set(given)))
    _refuse("unknown", sorted(set(weights) - set(own)))
    _refuse(
        "of another shape or dtype",
        [
            f"{name} (wanted {_form(own[name])}, got {_form(tensor)})"
            for name, tensor in weights.items()
            if _form(own[name]) != _form(tensor)
        ],
    )
    _refuse(
        "not finite",
        _not_finite(weights),
    )
    _refuse(
        "tied to another but different from it",
        [
            name
            for name, tensor in weights.items()
            if given[tied[name]] is not tensor and not torch.equal(given[tied[name]], tensor)
        ],
    )


def _tied_names(own: Mapping[str, Tensor]) -> dict[str, str]:
    """Each name → the first name of the same parameter (itself, unless tied)."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in own.items()}


def _not_finite(weights: Mapping[str, Tensor]) -> list[str]:
    """Names of tensors with a NaN or an infinity, either of which a sum cannot lose."""

    def is_bad(item: tuple[str, Tensor]) -> bool:
        tensor = item[1]
        return not bool(tensor.sum().isfinite()) and not bool(tensor.isfinite().all())

    items = list(weights.items())
    bad = spread(is_bad, items, [tensor.nbytes for _, tensor in items])
    return [name for (name, _), is_bad in zip(items, bad, strict=True) if is_bad]


def _form(tensor: Tensor) -> tuple[tuple[int, ...], torch.dtype]:
    return tuple(tensor.shape), tensor.dtype


def _refuse(fault: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:_SHOWN]) + (", …" if len(names) > _SHOWN else "")
        raise DataError(
            f"weights must match the model's tensors one by one, {len(names)} are {fault}: {shown}",
            where="load",
            fix="hand over all tensors of a model with the same config.json, in the same dtype",
        )
