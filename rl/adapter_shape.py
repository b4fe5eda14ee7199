"""The size of an adapter, from the model's shape alone: no weights, no torch.

adapter_parameters(shape, LoraSection(rank=16)) → 41.9e6 of Llama 3.1 8B's 8.03e9
"""

from __future__ import annotations

from ground.lora import LoraSection
from ground.shape import ModelShape


def adapter_parameters(shape: ModelShape, lora: LoraSection) -> int:
    """Rank times (inputs + outputs) of each target.

    Targets count by the last part of their names, under the names that Llama has; LM head, routers
    and routed experts have no adapter, and maps of other names are left out.
    """
    maps = _maps(shape)
    wanted = set(maps) if lora.targets is None else {t.split(".")[-1] for t in lora.targets}
    sides = sum(
        count * (inputs + outputs)
        for name, kinds in maps.items()
        if name in wanted
        for count, inputs, outputs in kinds
    )
    return lora.rank * sides


def _maps(shape: ModelShape) -> dict[str, list[tuple[int, int, int]]]:
    """Number, inputs and outputs of the linear maps of each name."""
    queries, keys = shape.heads * shape.head_width, shape.kv_heads * shape.head_width
    mlps = (shape.layers - shape.expert_layers, shape.mlp_width)
    shared = (shape.expert_layers, shape.shared_width)
    widths = [(count, width) for count, width in (mlps, shared) if count and width]
    into = [(count, shape.hidden, width) for count, width in widths]
    return {
        "q_proj": [(shape.layers, shape.hidden, queries)],
        "k_proj": [(shape.layers, shape.hidden, keys)],
        "v_proj": [(shape.layers, shape.hidden, keys)],
        "o_proj": [(shape.layers, queries, shape.hidden)],
        "gate_proj": into,
        "up_proj": into,
        "down_proj": [(count, width, shape.hidden) for count, width in widths],
    }
