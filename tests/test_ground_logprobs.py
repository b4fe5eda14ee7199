"""Per-token log-probs: right numbers, right gradients, and never all logits at once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ground.logprobs import LogprobModel, head_weight, model_logprobs, token_logprobs
from ground.model import load_model


def naive(hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float):
    logprobs = torch.log_softmax(hidden @ weight.T / temperature, dim=-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None]).squeeze(-1), entropy


def case(num_tokens: int, vocabulary: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(num_tokens, 6, generator=generator, dtype=dtype)
    weight = torch.randn(vocabulary, 6, generator=generator, dtype=dtype)
    targets = torch.randint(vocabulary, (num_tokens,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


class LargestTensor(TorchDispatchMode):
    """Records the number of elements of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max([self.elements, *sizes])
        return result


def test_a_coin_of_odds_three_to_one_by_hand():
    hidden, weight = torch.tensor([[1.0]]), torch.tensor([[0.0], [math.log(3)]])
    logprobs, entropy = token_logprobs(hidden, weight, torch.tensor([1]))
    assert logprobs.item() == pytest.approx(math.log(0.75), abs=1e-6)
    assert entropy.item() == pytest.approx(0.562335, abs=1e-6)
    # At temperature 0.5 the odds are squared: 9 to 1.
    logprobs, _ = token_logprobs(hidden, weight, torch.tensor([1]), temperature=0.5)
    assert logprobs.item() == pytest.approx(math.log(0.9), abs=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_gradients_of_both_results_hold_in_fp64(monkeypatch, temperature):
    monkeypatch.setattr("ground.logprobs.BLOCK_TOKENS", 2)
    monkeypatch.setattr("ground.logprobs.TILE_ELEMENTS_CPU", 6)
    hidden, weight, targets = case(5, 4, torch.float64)
    assert torch.autograd.gradcheck(
        lambda h, w: token_logprobs(h, w, targets, temperature), (hidden, weight)
    )


@pytest.mark.parametrize("parts", [(1.0, 0.0), (0.0, 1.0), (1.0, 0.3)])
@pytest.mark.parametrize("tile", [1, 91, 10_000])
def test_values_and_gradients_equal_the_naive_ones_in_fp32(monkeypatch, parts, tile):
    """By one column, by tiles of 13 (the last one is narrower), and all at once."""
    monkeypatch.setattr("ground.logprobs.BLOCK_TOKENS", 7)
    monkeypatch.setattr("ground.logprobs.TILE_ELEMENTS_CPU", tile)
    hidden, weight, targets = case(40, 50, torch.float32)
    upstream = torch.linspace(-1, 1, 40)
    gradients = []
    for function in (token_logprobs, naive):
        logprobs, entropy = function(hidden, weight, targets, 0.8)
        loss = parts[0] * (logprobs * upstream).sum() + parts[1] * (entropy * upstream).sum()
        gradients.append((logprobs, entropy, *torch.autograd.grad(loss, (hidden, weight))))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_logits_far_apart_in_different_tiles_do_not_overflow(monkeypatch):
    """The largest logit may come first or last; exp(400) is infinite in fp32."""
    monkeypatch.setattr("ground.logprobs.BLOCK_TOKENS", 2)
    monkeypatch.setattr("ground.logprobs.TILE_ELEMENTS_CPU", 4)
    hidden = torch.tensor([[1.0], [-1.0]])
    weight = torch.tensor([[-200.0], [0.0], [1.0], [200.0], [199.0]])
    for target in range(5):
        targets = torch.full((2,), target)
        ours, theirs = token_logprobs(hidden, weight, targets), naive(hidden, weight, targets, 1.0)
        for got, want in zip(ours, theirs, strict=True):
            torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_no_tensor_of_all_logits_is_ever_made():
    hidden, weight, targets = case(4096, 2000, torch.float32)
    with LargestTensor() as largest:
        logprobs, entropy = token_logprobs(hidden, weight, targets)
        (logprobs.sum() + entropy.sum()).backward()
    assert largest.elements <= 2**20 < 4096 * 2000 / 7
    with LargestTensor() as largest:
        naive(hidden, weight, targets, 1.0)
    assert largest.elements == 4096 * 2000


def test_lm_head_stays_in_fp32_under_autocast():
    hidden, weight, targets = case(20, 30, torch.float32)
    expected = naive(hidden, weight, targets, 1.0)[0]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logprobs, _ = token_logprobs(hidden, weight, targets)
    torch.testing.assert_close(logprobs, expected, atol=1e-5, rtol=1e-5)


def test_no_wanted_token_gives_a_zero_gradient_not_an_error(tiny_model):
    model = load_model(tiny_model)
    tokens, mask = torch.tensor([[256, 5, 6]]), torch.ones(1, 3)
    logprobs, _ = model_logprobs(model, tokens, mask, wanted_BT=torch.zeros(1, 3))
    logprobs.sum().backward()
    weight = head_weight(model)
    assert weight.grad is not None and weight.grad.abs().max() == 0


def test_frozen_head_gets_no_gradient():
    hidden, weight, targets = case(5, 4, torch.float32)
    weight.requires_grad_(False)
    token_logprobs(hidden, weight, targets)[0].sum().backward()
    assert hidden.grad is not None and weight.grad is None


@pytest.mark.parametrize("chunk_size", [128, 8])
def test_model_logprobs_are_those_of_the_models_own_logits(tmp_path: Path, chunk_size):
    """With rows longer than the attention chunk, padded on the right and alone."""
    model = load_model(make_tiny_model(tmp_path / "m", attention_chunk_size=chunk_size)).eval()
    long = torch.arange(30) * 7 % 250
    short = torch.arange(11) * 3 % 250
    tokens = torch.stack([long, torch.cat([short, torch.full((19,), 261)])])
    mask = torch.ones(2, 30)
    mask[1, 11:] = 0
    with torch.no_grad():
        logprobs, entropy = model_logprobs(model, tokens, mask, temperature=0.9)
        for row, ids in ((0, long), (1, short)):
            logits = model(input_ids=ids[None], use_cache=False).logits[0] / 0.9
            expected = torch.log_softmax(logits, -1)
            for t in range(1, len(ids)):
                assert float(logprobs[row, t]) == pytest.approx(
                    float(expected[t - 1, ids[t]]), abs=2e-5
                )
            torch.testing.assert_close(
                entropy[row, 1 : len(ids)],
                -(expected.exp() * expected).sum(-1)[:-1],
                atol=2e-5,
                rtol=1e-4,
            )
    assert logprobs[:, 0].tolist() == [0, 0]
    assert logprobs[1, 11:].abs().max() == 0


def test_chunk_size_changes_the_answer_so_the_mask_is_really_chunked(tmp_path: Path):
    tokens, mask = torch.arange(30)[None] * 7 % 250, torch.ones(1, 30)
    far, near = (
        model_logprobs(
            load_model(make_tiny_model(tmp_path / str(size), attention_chunk_size=size)),
            tokens,
            mask,
        )[0]
        for size in (128, 8)
    )
    torch.testing.assert_close(far[0, :9], near[0, :9])
    assert (far[0, 10:] - near[0, 10:]).abs().max() > 1e-3


def test_wanted_tokens_only(tiny_model):
    model = load_model(tiny_model)
    tokens, mask = torch.tensor([[256, 5, 6, 7]]), torch.ones(1, 4)
    everything, _ = model_logprobs(model, tokens, mask)
    some, _ = LogprobModel(model)(tokens, mask, torch.tensor([[0, 0, 1, 0]]))
    torch.testing.assert_close(some[0, 2], everything[0, 2])
    assert some[0, [0, 1, 3]].abs().max() == 0
