"""Swapping the weights of a live model: all of them or none, checked before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ground.errors import DataError

_SHOWN = 3


def copy_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Copy checked values into the model's tensors, in place; nothing here can fail half-way."""
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)


def check_weights(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    """Refuse weights that do not belong to a model with the tensors `own`; names what is wrong."""
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
        [name for name, tensor in weights.items() if not bool(tensor.isfinite().all())],
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
    """Each name → the first name that shares its memory (itself, unless tied)."""
    first: dict[int, str] = {}
    return {name: first.setdefault(tensor.data_ptr(), name) for name, tensor in own.items()}


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
