"""Key-value cache of fixed shape, and the attention over it, for decoding in slots.

S slots, H key-value heads, L cached positions, D head size, T query positions.

Every slot is a row of one static tensor and is at a position of its own, so masks and positions
are ours and go past transformers' own: a 4-D mask is taken as it is, and Llama 4's attention
temperature, which transformers derives from one shared cache length, is applied here per row.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from ground.llama4 import retempered
from ground.packing import layer_types

ATTENTION = "packtrain_slots"
"""Name of our attention in transformers' registry."""


@dataclass(slots=True)
class Aim:
    """Where the coming step writes and how far it reads; shared by all layers."""

    rows_S: Tensor
    positions_S: Tensor = field(init=False)
    length: int = field(init=False)


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, [S, H, L, D]; each step writes one position per slot."""

    def __init__(self, aim: Aim, max_length: int) -> None:
        super().__init__()
        self.aim, self.max_length = aim, max_length

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Zeros of the full shape: a masked position must be finite, for 0 · NaN is NaN."""
        slots, heads, _, size = key_states.shape
        self.keys = key_states.new_zeros(slots, heads, self.max_length, size)
        self.values = torch.zeros_like(self.keys)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Write [S, H, 1, D] at each slot's position; returns the part up to `aim.length`."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        where = (self.aim.rows_S, slice(None), self.aim.positions_S)
        self.keys[where] = key_states[:, :, 0]
        self.values[where] = value_states[:, :, 0]
        return self.keys[:, :, : self.aim.length], self.values[:, :, : self.aim.length]

    def get_seq_length(self) -> int:
        """Always 0: transformers must not derive positions from it, ours are per row."""
        return 0

    def get_max_length(self) -> int:
        """Positions that a slot can hold."""
        return self.max_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of what `update` returns."""
        return self.aim.length, 0


class SlotCache(Cache):
    """All layers; `aim` before every step, `fill` when a sequence moves in."""

    def __init__(self, num_layers: int, num_slots: int, max_length: int, like: Tensor) -> None:
        self.aimed = Aim(torch.arange(num_slots, device=like.device))
        self.slot_layers = [SlotLayer(self.aimed, max_length) for _ in range(num_layers)]
        super().__init__(layers=list(self.slot_layers))

    def aim(self, positions_S: Tensor, length: int) -> None:
        """Set where the coming step writes (`positions_S`) and how far it reads (`length`)."""
        self.aimed.positions_S, self.aimed.length = positions_S, length

    def fill(self, slot: int, prefix: PrefixStates) -> None:
        """Copy a prefilled prompt into a slot."""
        for layer, (keys_HTD, values_HTD) in zip(self.slot_layers, prefix, strict=True):
            assert layer.keys is not None and layer.values is not None
            layer.keys[slot, :, : keys_HTD.shape[1]] = keys_HTD
            layer.values[slot, :, : values_HTD.shape[1]] = values_HTD

    def clear(self, slot: int) -> None:
        """Make a slot's row finite again."""
        for layer in self.slot_layers:
            assert layer.keys is not None and layer.values is not None
            layer.keys[slot] = 0
            layer.values[slot] = 0


PrefixStates = list[tuple[Tensor, Tensor]]
"""Keys and values [H, T, D] of each layer for one prompt."""


@dataclass(frozen=True, slots=True)
class Masks:
    """Builds additive 4-D masks for a model's layer types.

    Example:
        chunk 4, position 5: full attends to 0…5, chunked to 4…5
    """

    chunk: int | None
    """Llama 4's attention chunk; None for a model without chunked layers."""
    dtype: torch.dtype

    @staticmethod
    def of(config: PreTrainedConfig, dtype: torch.dtype) -> Masks:
        """Masks for this model; `chunk` is set iff it has chunked layers."""
        is_chunked = "chunked_attention" in layer_types(config)
        return Masks(int(config.attention_chunk_size) if is_chunked else None, dtype)

    def __call__(self, queries_BT: Tensor, length: int) -> Tensor | dict[str, Tensor]:
        """Mask of queries at these positions over keys 0…length - 1, each [B, 1, T, length]."""
        full = causal_mask(queries_BT, length, self.dtype)
        if self.chunk is None:
            return full
        chunked = full
        if length > self.chunk:
            keys_L = torch.arange(length, device=queries_BT.device)
            first_BT = queries_BT // self.chunk * self.chunk
            chunked = full.masked_fill(keys_L < first_BT[:, None, :, None], float("-inf"))
        return {"full_attention": full, "chunked_attention": chunked}


def causal_mask(queries_BT: Tensor, length: int, dtype: torch.dtype) -> Tensor:
    """Additive mask [B, 1, T, length] that lets each query see the keys up to its own position."""
    keys_L = torch.arange(length, device=queries_BT.device)
    hidden = keys_L > queries_BT[:, None, :, None]
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(
        hidden, float("-inf")
    )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    slot_positions: Tensor | None = None,
    **kwargs: object,
) -> tuple[Tensor, None]:
    """Attention of [B, heads, T, D] queries under our mask, in transformers' calling convention.

    Args:
        slot_positions: [B] in a decode step (T = 1), where every row is at its own position.
    """
    if slot_positions is not None:
        zeros_S1 = torch.zeros_like(slot_positions)[:, None]
        # Exactly 1 at position 0, which is what transformers assumed, where floor_scale > 1.
        query = retempered(module, query, slot_positions[:, None], zeros_S1)
        return decode_attention(query, key, value, attention_mask, scaling).transpose(1, 2), None
    grouped = query.shape[1] != key.shape[1]
    output = F.scaled_dot_product_attention(
        query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=grouped
    )
    return output.transpose(1, 2), None


def decode_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None
) -> Tensor:
    """One query position per slot; the heads that share keys stand in as query positions."""
    slots, heads, _, size = query.shape
    shared = query.reshape(slots, key.shape[1], heads // key.shape[1], size)
    output = F.scaled_dot_product_attention(shared, key, value, attn_mask=mask, scale=scaling)
    return output.reshape(slots, heads, 1, size)


def exact_lengths(
    num_slots: int, heads: int, kv_heads: int, head_size: int, max_length: int, like: Tensor
) -> tuple[int, ...]:
    """Cached lengths to which a step may be cut with the bits of the whole `max_length`.

    Masked keys add exact zeros, but a kernel may sum in another order at another length; so each
    candidate is tried on this machine with the engine's own shapes, and kept only if it is equal.
    """
    generator = torch.Generator(device=like.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=like.device).to(like.dtype)

    query = normal(num_slots, heads, 1, head_size)
    key, value = (normal(num_slots, kv_heads, max_length, head_size) for _ in range(2))

    def attend(positions_S1: Tensor, length: int) -> Tensor:
        mask = causal_mask(positions_S1, length, like.dtype)
        return decode_attention(query, key[:, :, :length], value[:, :, :length], mask, None)

    kept = []
    for length in _candidate_lengths(max_length):
        positions_S1 = torch.arange(num_slots, device=like.device)[:, None] % length
        if torch.equal(attend(positions_S1, max_length), attend(positions_S1, length)):
            kept.append(length)
    return (*kept, max_length)


def _candidate_lengths(max_length: int) -> list[int]:
    """32, 64, 96, 128, 192, 256, 384, 512, … below `max_length`."""
    powers = [32 << n for n in range(max_length.bit_length())]
    return sorted(
        n for power in powers for n in (power, power * 3 // 2) if n < max_length and not n % 32
    )


AttentionInterface.register(ATTENTION, attention)
