"""What Llama 4 needs beyond transformers 5.19 and TRL 1.16; everything about that in one place.

Each shim has a contract test in tests/test_ground_model.py that fails when the library mends the
fault itself: then shim and test go together.
"""

from __future__ import annotations

from torch import nn
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
