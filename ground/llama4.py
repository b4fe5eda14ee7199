"""What Llama 4 needs beyond transformers 5.19 and TRL 1.16; everything about that in one place.

Each shim has a contract test in tests/test_ground_model.py that fails when the library mends the
fault itself: then shim and test go together.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import (
    Llama4ForCausalLM,
    Llama4ForConditionalGeneration,
    Llama4TextConfig,
)


def apply_shims() -> None:
    """Mend the library classes in this process; calling it again changes nothing.

    - `Llama4ForCausalLM.base_model` is the model itself, because its prefix names an attribute
      that it lacks; TRL and `model_logprobs` ask it for the backbone that yields hidden states.
    - `Llama4TextConfig` calls its experts `num_local_experts`, while TRL's router balancing loss
      reads `num_experts`.
    - `Llama4ForConditionalGeneration` (images and text) has no single backbone at its prefix.
    """
    Llama4ForCausalLM.base_model_prefix = "model"
    Llama4TextConfig.attribute_map = {
        **Llama4TextConfig.attribute_map,
        "num_experts": "num_local_experts",
    }
    Llama4ForConditionalGeneration.base_model = property(_text_backbone)  # pyright: ignore[reportAttributeAccessIssue]


def _text_backbone(model: Llama4ForConditionalGeneration) -> nn.Module:
    return model.language_model.model


def retempered(
    module: nn.Module, query: Tensor, positions_BT: Tensor, assumed_BT: Tensor
) -> Tensor:
    """Query under the attention temperature of its real positions.

    Layers without RoPE scale the query at position p by log(1 + ⌊(p + 1) / floor⌋) · a + 1, and
    transformers takes p from the index in the tensor.

    Args:
        query: [B, heads, T, D], already scaled for `assumed_BT`.
    """
    if not getattr(module, "attn_temperature_tuning", False) or module.use_rope:
        return query
    scale_BT = _temperature(module, positions_BT) / _temperature(module, assumed_BT)
    return (query * scale_BT[:, None, :, None]).to(query.dtype)


def _temperature(module: nn.Module, positions: Tensor) -> Tensor:
    floor_scale, attn_scale = module.floor_scale, module.attn_scale
    assert isinstance(floor_scale, int | float) and isinstance(attn_scale, int | float)
    steps = torch.floor((positions.float() + 1.0) / floor_scale)
    return torch.log1p(steps) * attn_scale + 1.0
