"""Models of the herd: Llama 4's shape, a thousandth of a thousandth of its size."""

from __future__ import annotations

import torch
from transformers import Llama4ForCausalLM, Llama4TextConfig, PreTrainedTokenizerFast

from ground.herd.config import Shape
from ground.herd.tokenizer import BEGIN, PAD, TURN_END

_ATTENTION_CHUNK = 256


def new_model(shape: Shape, tokenizer: PreTrainedTokenizerFast, seed: int) -> Llama4ForCausalLM:
    """A randomly initialised Llama 4 for this tokenizer; equal arguments give equal weights.

    As in Llama 4, every second layer is a mixture of experts with one shared expert (Maverick),
    queries and keys are normalised (Scout), and the last layer has no RoPE and scales attention.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Llama4ForCausalLM(_config(shape, tokenizer))


def _config(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> Llama4TextConfig:
    vocabulary = tokenizer.get_vocab()
    return Llama4TextConfig(
        vocab_size=len(vocabulary),
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_key_value_heads,
        head_dim=shape.hidden_size // shape.num_heads,
        intermediate_size=shape.expert_size,
        intermediate_size_mlp=shape.dense_size,
        num_local_experts=shape.num_experts,
        num_experts_per_tok=1,
        interleave_moe_layer_step=2,
        no_rope_layers=[1] * (shape.num_layers - 1) + [0],
        use_qk_norm=True,
        attn_temperature_tuning=True,
        attention_chunk_size=_ATTENTION_CHUNK,
        max_position_embeddings=shape.max_length,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        pad_token_id=vocabulary[PAD],
        bos_token_id=vocabulary[BEGIN],
        eos_token_id=vocabulary[TURN_END],
    )
