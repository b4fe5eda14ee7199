"""What only a CUDA device shows: memory of log-probs there, and a learner's step in bf16.

Skipped without one; a few minutes with one:  python -m pytest tests/gpu
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ground.logprobs import token_logprobs
from ground.model import load_model

sys.path.append(str(Path(__file__).parents[1]))
# The doubles of the flat test folder above.
from conftest import make_tiny_model
from rl_doubles import make_group, make_plan

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device, torch sees none"
)

VOCABULARY, HIDDEN, TOKENS = 131_072, 1024, 8192


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    options = {"generator": generator, "device": "cuda", "dtype": dtype}
    hidden = torch.randn(TOKENS, HIDDEN, **options).requires_grad_()
    weight = (torch.randn(VOCABULARY, HIDDEN, **options) / HIDDEN**0.5).requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=generator, device="cuda")
    return hidden, weight, targets


def naive(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    logprobs = (hidden.float() @ weight.float().T).log_softmax(-1)
    with torch.no_grad():
        (logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(-1, targets[:, None])[:, 0]


def ours(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return token_logprobs(hidden, weight, targets)[0]


def cost(function, dtype: torch.dtype) -> tuple[float, float, list[Tensor]]:
    """Peak bytes above the inputs, best seconds of three, and value and gradients."""
    hidden, weight, targets = case(dtype)
    seconds, peak, found = [], 0, []
    for _ in range(4):
        hidden.grad = weight.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        logprobs = function(hidden, weight, targets)
        logprobs.mean().backward()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000)
        peak = torch.cuda.max_memory_allocated() - base
        assert hidden.grad is not None and weight.grad is not None
        found = [logprobs.detach(), hidden.grad, weight.grad]
    return peak, min(seconds[1:]), found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_logprobs_take_an_eighth_of_the_memory(dtype: torch.dtype) -> None:
    """Where matrix products are all that costs time, the repeated one makes it 4/3."""
    expected = cost(naive, dtype)
    torch.cuda.empty_cache()
    got = cost(ours, dtype)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    for mine, theirs in zip(got[2], expected[2], strict=True):
        error = (mine.float() - theirs.float()).abs().max() / theirs.float().abs().max()
        assert error < tolerance
    memory, time = got[0] / expected[0], got[1] / expected[1]
    assert memory <= 1 / 8, f"{got[0] / 2**20:.0f} of {expected[0] / 2**20:.0f} MiB"
    assert time <= 1.4, f"{got[1]:.3f} of {expected[1]:.3f} s"


@pytest.mark.parametrize("pack_tokens", [0, 64])
def test_a_step_in_bf16_is_near_the_step_in_fp32(tmp_path: Path, pack_tokens: int) -> None:
    from accelerate import Accelerator

    from rl.config import RlSection
    from rl.learner import Learner

    path = make_tiny_model(tmp_path / "m", attention_chunk_size=8, floor_scale=4)
    section = RlSection.model_validate(
        {
            "steps": 3,
            "pack_tokens": pack_tokens,
            "loss": {"reference_kl": 0.05},
            "optimizer": {"learning_rate": 1e-3},
        }
    )
    plan = make_plan(make_group(0, logprob=-5.0), make_group(1, -5.0, prompt_length=9))
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        learner = Learner(load_model(path, dtype=dtype), Accelerator(), section, pad_id=261)
        before = learner.model_tensors()
        numbers = learner.step(plan)
        after = learner.model_tensors()
        assert all(math.isfinite(value) for value in numbers.values())
        assert any(not torch.equal(before[name], after[name]) for name in before)
        assert all(bool(tensor.isfinite().all()) for tensor in after.values())
        found[dtype] = numbers
    full, half = found[torch.float32], found[torch.bfloat16]
    assert half["trained_tokens"] == full["trained_tokens"]
    assert half["entropy"] == pytest.approx(full["entropy"], abs=0.05)
    assert half["loss"] == pytest.approx(full["loss"], abs=0.05)
    assert half["grad_norm"] == pytest.approx(full["grad_norm"], rel=0.15)


def test_a_packed_step_equals_the_padded_one_on_the_device(tmp_path: Path) -> None:
    from ground.logprobs import model_logprobs

    path = make_tiny_model(tmp_path / "m", attention_chunk_size=8, floor_scale=4)
    model = load_model(path)
    nn.Module.to(model, "cuda")
    rows = [torch.randint(250, (length,), device="cuda") for length in (30, 9)]
    packed = torch.cat(rows)[None]
    segments = torch.tensor([[1] * 30 + [2] * 9], device="cuda")
    together, _ = model_logprobs(model, packed, segments)
    alone = [model_logprobs(model, row[None], torch.ones_like(row)[None])[0] for row in rows]
    torch.testing.assert_close(together, torch.cat(alone, dim=1), atol=1e-4, rtol=1e-5)
