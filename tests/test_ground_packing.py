"""Packed rows are worth what they are worth alone: log-probs, entropies and gradients."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from conftest import make_tiny_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config
from transformers import Qwen3ForCausalLM as Qwen3

from ground.errors import DataError
from ground.logprobs import model_logprobs
from ground.model import load_model
from ground.packing import is_packed, masks, positions_of

LENGTHS = (21, 9, 30, 4)
"""Rows of two and more chunks of 8; the temperature's threshold of 4 is passed several times."""


def llama() -> PreTrainedModel:
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=264,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.1,
        )
    )


def llama4(folder: Path, **settings: Any) -> PreTrainedModel:
    return load_model(make_tiny_model(folder / "m", **settings))


def make_model(kind: str, folder: Path) -> PreTrainedModel:
    if kind == "llama":
        return llama()
    if kind == "llama4 dense":
        return llama4(folder, moe_layers=[], attention_chunk_size=8, floor_scale=4)
    return llama4(folder, attention_chunk_size=8, floor_scale=4, attn_scale=0.5)


KINDS = ("llama", "llama4 dense", "llama4 moe")


def make_rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(256, (length,), generator=generator) for length in LENGTHS]


def packed(rows: list[Tensor], bins: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens and segments, filled up with padding to the longest sequence plus two."""
    width = max(sum(len(rows[i]) for i in each) for each in bins) + 2
    tokens = torch.full((len(bins), width), 261)
    segments = torch.zeros_like(tokens)
    for number, each in enumerate(bins):
        joined = torch.cat([rows[i] for i in each])
        tokens[number, : len(joined)] = joined
        segments[number, : len(joined)] = torch.cat(
            [torch.full((len(rows[i]),), i + 1) for i in each]
        )
    return tokens, segments


def scored(
    model: PreTrainedModel, tokens: Tensor, segments: Tensor
) -> tuple[dict[int, Tensor], dict[str, Tensor]]:
    """Log-probs and entropies by row, and the gradient of an uneven sum over all of them."""
    model.zero_grad()
    logprobs, entropy = model_logprobs(model, tokens, segments, temperature=0.8)
    rows = {
        int(number): torch.stack([logprobs[segments == number], entropy[segments == number]])
        for number in segments.unique()
        if number
    }
    weighted = [
        ((1.0 + torch.arange(row.shape[1]) / 7) * row[0] * (-1.0) ** number).sum()
        for number, row in rows.items()
    ]
    torch.stack(weighted).sum().backward()
    grads = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {number: row.detach() for number, row in rows.items()}, grads


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference as a share of the largest number: what rounding in fp32 allows."""
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
def test_packing_changes_neither_logprobs_nor_gradients(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model, rows = make_model(kind, tmp_path), make_rows()
    nn.Module.to(model, dtype)
    alone, alone_grads = scored(model, *packed(rows, [[0], [1], [2], [3]]))
    for bins in ([[0, 1, 2, 3]], [[2, 0], [3, 1]]):
        together, grads = scored(model, *packed(rows, bins))
        for number, row in alone.items():
            assert error(together[number], row) < 1e-6
        for name, grad in alone_grads.items():
            assert error(grads[name], grad) < 1e-6, name


@pytest.mark.parametrize("kind", KINDS)
def test_rows_alone_agree_with_the_models_own_logits(kind: str, tmp_path: Path) -> None:
    """So that packed and unpacked are not wrong together."""
    model, rows = make_model(kind, tmp_path), make_rows()
    tokens, segments = packed(rows, [[2, 0], [3, 1]])
    logprobs, _ = model_logprobs(model, tokens, segments)
    reference = make_model(kind, tmp_path)
    for number, row in enumerate(rows):
        logits = reference(row[None], use_cache=False).logits[0, :-1].log_softmax(-1)
        expected = logits.gather(-1, row[1:, None])[:, 0]
        got = logprobs[segments == number + 1]
        assert got[0] == 0
        torch.testing.assert_close(got[1:], expected, atol=1e-5, rtol=1e-5)


def test_a_packed_model_still_scores_plain_rows_beyond_the_chunk(tmp_path: Path) -> None:
    """Our attention stays in the model; transformers must go on making its chunk masks."""
    model, row = make_model("llama4 moe", tmp_path), make_rows()[2]
    tokens, segments = row[None], torch.ones(1, len(row))
    before, _ = model_logprobs(model, tokens, segments)
    model_logprobs(model, *packed(make_rows(), [[0, 1, 2, 3]]))
    after, _ = model_logprobs(model, tokens, segments)
    torch.testing.assert_close(after, before, atol=1e-6, rtol=0)


def test_positions_begin_anew_with_each_row() -> None:
    segments = torch.tensor([[1, 1, 1, 2, 2, 0], [7, 0, 0, 0, 0, 0]])
    assert positions_of(segments).tolist() == [[0, 1, 2, 0, 1, 0], [0, 0, 1, 2, 3, 4]]


def test_masks_of_two_rows_and_chunks_of_two(tmp_path: Path) -> None:
    config = llama4(tmp_path, attention_chunk_size=2).config
    segments = torch.tensor([[1, 1, 1, 2, 2, 0]])
    found = cast(dict[str, Tensor], masks(config, segments, positions_of(segments)))
    full = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]
    assert found["full_attention"][0, 0].int().tolist() == full
    chunked = [row[:] for row in full]
    chunked[2] = [0, 0, 1, 0, 0, 0]
    assert found["chunked_attention"][0, 0].int().tolist() == chunked
    plain = masks(llama().config, segments, positions_of(segments))
    assert cast(Tensor, plain)[0, 0].int().tolist() == full


@pytest.mark.parametrize(
    ("segments", "packed_rows"),
    [([1, 1, 0, 0], False), ([3, 3, 3, 3], False), ([1, 1, 2, 0], True), ([1, 2, 2, 2], True)],
)
def test_padding_does_not_count_as_a_second_row(segments: list[int], packed_rows: bool) -> None:
    assert is_packed(torch.tensor([segments])) is packed_rows


def test_layers_whose_mask_is_unknown_are_refused_when_packed() -> None:
    settings = {"vocab_size": 64, "hidden_size": 16, "intermediate_size": 16}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    model = Qwen3(Qwen3Config(**settings, **heads, **window, head_dim=8))
    tokens = torch.arange(6)[None]
    model_logprobs(model, tokens, torch.ones(1, 6))
    with pytest.raises(DataError, match="packed rows need layers of"):
        model_logprobs(model, tokens, torch.tensor([[1, 1, 1, 2, 2, 2]]))
