"""How named tensors lie in one flat run of bytes; importable without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

ALIGNMENT = 256
"""Bytes. Matrix kernels choose by a tensor's alignment, so all tensors have the same."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies.

    Example:
        Place(offset=512, shape=(418, 128), dtype="torch.float32")
    """

    offset: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True)
class Layout:
    """Places of all tensors, in the order of their offsets.

    Example:
        Layout({"norm.weight": Place(0, (128,), "torch.float32")}, size=512)
    """

    places: dict[str, Place]
    size: int
    """Bytes in all."""

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """One tensor behind the other, each aligned."""
        places, offset = {}, 0
        for name, tensor in tensors.items():
            places[name] = Place(offset, tuple(tensor.shape), str(tensor.dtype))
            offset += -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT
        return cls(places, offset)
