"""Weights with an adapter added to them: the one formula, W + scale · B A.

M outputs, N inputs, R rank.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import Tensor

from ground.errors import DataError

A, B, WEIGHT = ".lora_A.weight", ".lora_B.weight", ".weight"
"""How tensors of a module end: A [R, N], B [M, R], W [M, N]."""


def merged_weight(weight_MN: Tensor, a_RN: Tensor, b_MR: Tensor, scale: float) -> Tensor:
    """W + scale · B A, the product first.

    Example:
        W = 0, A = [[1, 2]], B = [[3], [4]], scale 0.5 → [[1.5, 3], [2, 4]]
    """
    return weight_MN + (b_MR @ a_RN) * scale


def merged_targets(
    base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float
) -> Iterator[tuple[str, Tensor]]:
    """Name and sum of each weight that the adapter is added to, one after the other.

    Args:
        adapter: `<module>.lora_A.weight` and `<module>.lora_B.weight` of each module.

    Raises:
        DataError: an A without its B, or of no weight of the base, or of another shape.
    """
    for module in modules_of(adapter):
        weight, a, b = (
            t.get(module + end) for t, end in ((base, WEIGHT), (adapter, A), (adapter, B))
        )
        if weight is None or a is None or b is None or (len(b), a.shape[-1]) != weight.shape:
            shapes = [None if each is None else tuple(each.shape) for each in (weight, a, b)]
            raise DataError(
                f"an adapter must have A and B for a weight of its base, {module} has weight, A "
                f"and B of shapes {', '.join(map(str, shapes))}",
                where="adapter",
                fix="use the adapter with the model that it was trained on",
            )
        yield module + WEIGHT, merged_weight(weight, a, b, scale)


def modules_of(adapter: Mapping[str, Tensor]) -> list[str]:
    """Names of the modules that an adapter has tensors for, in order."""
    return list(dict.fromkeys(name.removesuffix(A).removesuffix(B) for name in adapter))
