"""The size of a model by parts, from its config.json alone: no weights, no torch.

    shape = read_shape(Path("recipes/scout"))
    shape.parameters → 107.8e9;  shape.active → 17.2e9;  shape.cache_bytes(2) → 196,608 per token

Counted are the text model's matrices: embeddings, attention, dense layers, experts, routers. Norms
and biases are left out (less than 0.1 % of any model here), and so is a vision encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ground.errors import DataError
from ground.model_files import read_config

_MATRICES = 3
"""Of a gated MLP: gate, up, down."""


class _Number(Protocol):
    """Looks up the first of several keys that is a number."""

    def __call__(self, *names: str, default: int | None = None) -> int: ...


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What a language model is made of.

    Example:
        ModelShape(layers=32, hidden=4096, heads=32, kv_heads=8, head_width=128, vocabulary=128_256,
                   mlp_width=14_336)    # Llama 3.1 8B: 8.03e9 parameters
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_width: int
    vocabulary: int
    mlp_width: int
    """Of a dense layer's MLP."""
    expert_layers: int = 0
    """Layers with experts instead of a dense MLP."""
    experts: int = 0
    """Of such a layer, shared ones left out."""
    experts_per_token: int = 0
    expert_width: int = 0
    shared_width: int = 0
    """Of the expert that every token passes, summed where there are several; 0 where none does."""
    is_tied: bool = False
    """Whether the LM head is the embedding."""

    @property
    def embedding(self) -> int:
        """Parameters of the input embedding, which multiplies nothing."""
        return self.vocabulary * self.hidden

    @property
    def attention(self) -> int:
        """Of all layers."""
        return 2 * self.layers * self.hidden * self.head_width * (self.heads + self.kv_heads)

    @property
    def one_expert(self) -> int:
        """Of one routed expert, summed over the layers that have them."""
        return self.expert_layers * _MATRICES * self.hidden * self.expert_width

    @property
    def dense(self) -> int:
        """What every token passes besides experts: attention, dense and shared MLPs, LM head."""
        mlps = (self.layers - self.expert_layers) * self.mlp_width
        mlps += self.expert_layers * self.shared_width
        routers = self.expert_layers * self.hidden * self.experts
        return self.attention + _MATRICES * self.hidden * mlps + routers + self.embedding

    @property
    def parameters(self) -> int:
        """In all."""
        return self.dense + self.experts * self.one_expert + self.embedding * (not self.is_tied)

    @property
    def active(self) -> int:
        """Of one token's way, the embedding included: what a name like 17B-16E counts."""
        chosen = self.experts_per_token * self.one_expert
        return self.dense + chosen + self.embedding * (not self.is_tied)

    def flops(self, context: float, *, is_routed: bool = True) -> float:
        """Of a forward pass, per token, at so many tokens of context before it.

        Two for each parameter that is multiplied, and four for each number of keys and values that
        attention reads. Llama 4's chunked layers are counted as if they saw everything.

        Args:
            is_routed: False where every expert is computed on every token, as transformers does.
        """
        experts = self.experts_per_token if is_routed else self.experts
        multiplied = self.dense + experts * self.one_expert
        return 2 * multiplied + 4 * self.layers * self.heads * self.head_width * context

    def cache_bytes(self, bytes_each: int) -> int:
        """Of keys and values, per token."""
        return 2 * self.layers * self.kv_heads * self.head_width * bytes_each

    def read_in_a_step(self, rows: int) -> float:
        """Parameters that a decoding step of so many rows reads: experts that no row chose are not.

        With equal chances, a row misses an expert with 1 - k/E, all rows with that to their number.
        """
        if not self.experts:
            return self.dense
        missed = (1 - self.experts_per_token / self.experts) ** rows
        return self.dense + self.experts * (1 - missed) * self.one_expert


def read_shape(folder: Path) -> ModelShape:
    """The shape that a folder's config.json describes.

    Raises:
        DataError: the file is missing, damaged, of an unknown family, or lacks a size.
    """
    config = read_config(folder)
    inner = config.get("text_config")
    text = inner if isinstance(inner, Mapping) else config
    return _shape_of(text, str(config["model_type"]), str(folder / "config.json"))


def _shape_of(text: Mapping[str, object], family: str, where: str) -> ModelShape:
    def number(*names: str, default: int | None = None) -> int:
        for name in names:
            value = text.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
        if default is None:
            raise DataError(f"{names[0]} must be a number", where=where, fix="copy the file again")
        return default

    hidden, heads, layers = (
        number(name) for name in ("hidden_size", "num_attention_heads", "num_hidden_layers")
    )
    is_llama4 = family.startswith("llama4")
    width = number("intermediate_size")
    experts = number("num_local_experts", "num_experts", default=0)
    expert_width = number("moe_intermediate_size", default=width) if experts else 0
    shared = expert_width if is_llama4 else number("shared_expert_intermediate_size", default=0)
    return ModelShape(
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=number("num_key_value_heads", default=heads),
        head_width=number("head_dim", default=hidden // heads),
        vocabulary=number("vocab_size"),
        mlp_width=number("intermediate_size_mlp", default=width) if is_llama4 else width,
        expert_layers=_expert_layers(text, layers, number) if experts else 0,
        experts=experts,
        experts_per_token=number("num_experts_per_tok") if experts else 0,
        expert_width=expert_width,
        shared_width=shared if experts else 0,
        is_tied=text.get("tie_word_embeddings") is True,
    )


def _expert_layers(text: Mapping[str, object], layers: int, number: _Number) -> int:
    """Llama 4 names them or says every how many; Qwen has its own word; others have all."""
    named = text.get("moe_layers")
    if isinstance(named, list):
        return len(named)
    return layers // number("interleave_moe_layer_step", "decoder_sparse_step", default=1)
