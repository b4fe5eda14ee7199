"""Several rows side by side in one sequence: attention and positions of each row's own.

B sequences, T tokens. `segments_BT` numbers the rows: equal numbers stand together, 0 is padding at
the end. A plain 0/1 mask of right-padded rows is the case of one row per sequence.

    segments   1 1 1 2 2 0    token t sees token s iff s <= t and both are of the same row;
    positions  0 1 2 0 1 0    with Llama 4's chunks also position // chunk must be the same

transformers counts Llama 4's chunks and attention temperature by the index in the sequence, so
packed rows get masks and temperature from here, by way of an attention function of our own.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface

from ground.errors import DataError
from ground.llama4 import retempered

ATTENTION = "packtrain_packed"
"""Name of our attention in transformers' registry; for unpacked rows it is the library's sdpa."""
_KNOWN_LAYERS = {"full_attention", "chunked_attention"}


def hidden_states(model: PreTrainedModel, tokens_BT: Tensor, segments_BT: Tensor) -> Tensor:
    """Last hidden states [B, T, H]; each row's are those that it would have alone.

    Right padding is invisible to the causal attention of the tokens before it, so unpacked rows
    need no mask at all and run the library's fastest kernel.

    Raises:
        DataError: rows are packed and the model has layers whose masks are not known here.
    """
    backbone = cast(PreTrainedModel, model.base_model)
    if not is_packed(segments_BT):
        return backbone(input_ids=tokens_BT, use_cache=False).last_hidden_state
    _use_own_attention(backbone)
    positions_BT = positions_of(segments_BT)
    return backbone(
        input_ids=tokens_BT,
        attention_mask=masks(backbone.config, segments_BT, positions_BT),
        position_ids=positions_BT,
        use_cache=False,
        row_positions_BT=positions_BT,
    ).last_hidden_state


def is_packed(segments_BT: Tensor) -> bool:
    """Whether any sequence holds more than one row."""
    changes_BT = segments_BT[:, 1:] != segments_BT[:, :-1]
    return bool((changes_BT & (segments_BT[:, 1:] != 0)).any())


def has_context(segments_BT: Tensor) -> Tensor:
    """True on tokens that another token of the same row stands before; [B, T - 1], from index 1."""
    return (segments_BT[:, 1:] == segments_BT[:, :-1]) & (segments_BT[:, 1:] != 0)


def positions_of(segments_BT: Tensor) -> Tensor:
    """Place of each token in its own row, from 0; padding counts from its own start."""
    indices_T = torch.arange(segments_BT.shape[1], device=segments_BT.device)
    begins_BT = torch.ones_like(segments_BT, dtype=torch.bool)
    begins_BT[:, 1:] = segments_BT[:, 1:] != segments_BT[:, :-1]
    return indices_T - (indices_T * begins_BT).cummax(dim=1).values


def masks(
    config: PreTrainedConfig, segments_BT: Tensor, positions_BT: Tensor
) -> Tensor | dict[str, Tensor]:
    """What each token may see, [B, 1, T, T], for each kind of layer that the model has.

    Padding sees padding: a row of a mask without any True would make NaN, also in the gradient.
    """
    length = segments_BT.shape[1]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=segments_BT.device).tril()
    full = causal_TT & (segments_BT[:, :, None] == segments_BT[:, None, :])
    if "chunked_attention" not in layer_types(config):
        return full[:, None]
    chunks_BT = positions_BT // int(config.attention_chunk_size)
    chunked = full & (chunks_BT[:, :, None] == chunks_BT[:, None, :])
    return {"full_attention": full[:, None], "chunked_attention": chunked[:, None]}


def layer_types(config: PreTrainedConfig) -> list[str]:
    """Kind of attention of each layer; models that do not say are full attention throughout."""
    return getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    row_positions_BT: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """The library's sdpa, with Llama 4's temperature by positions in the row where rows are packed.

    Args:
        query: [B, heads, T, D], scaled by transformers as if the index were the position.
    """
    if row_positions_BT is not None:
        indices_1T = torch.arange(query.shape[2], device=query.device)[None]
        query = retempered(module, query, row_positions_BT, indices_1T)
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # pyright: ignore[reportArgumentType]


def _use_own_attention(backbone: PreTrainedModel) -> None:
    """Let the model call `attention` from now on; unpacked rows see no difference."""
    config = backbone.config
    if config._attn_implementation == ATTENTION:
        return
    unknown = set(layer_types(config)) - _KNOWN_LAYERS
    if unknown or getattr(config, "sliding_window", None):
        raise DataError(
            f"packed rows need layers of {sorted(_KNOWN_LAYERS)}, got "
            f"{sorted(unknown) or 'a sliding window'}",
            where=f"model type {config.model_type}",
            fix="set rl.pack_tokens to 0",
        )
    backbone.set_attn_implementation(ATTENTION)


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
