"""One optimizer step: what it computes, what it is invariant to, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from rl_doubles import ANSWERS, PROMPT, make_group, make_learner, make_plan
from torch import Tensor

from ground.chat import ChatTemplate
from ground.errors import DivergedError
from ground.model import load_model, load_tokenizer
from ground.records import Group, Rollout
from rl.config import OptimizerSection
from rl.snapshot import Snapshot, read_books, read_snapshot, write_cut
from rollout.config import SamplingSection
from rollout.engine import Request, generate
from rollout.hf_engine import HfEngine


def difference(one: dict[str, Tensor], two: dict[str, Tensor]) -> float:
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def test_the_gradient_is_that_of_the_formula_written_out_naively(tiny_model: Path) -> None:
    model = load_model(tiny_model, dtype=torch.float64)
    group, temperature, terms = make_group(0), 0.7, []
    for (tokens, reward), rollout in zip(ANSWERS, group.rollouts, strict=True):
        ids = torch.tensor([*group.prompt_ids, *tokens])
        logits = model(ids[None], use_cache=False).logits[0] / temperature
        picked = logits.log_softmax(-1)[3:-1].gather(-1, ids[4:, None])[:, 0]
        behavior = torch.tensor(rollout.segments[0].logprobs, dtype=torch.float64)
        rho = (picked.detach() - behavior).exp().clamp(max=4.0)
        terms.append((-rho * (reward - 0.5) * picked).sum())
    num_tokens = sum(len(tokens) for tokens, _ in ANSWERS)
    loss = torch.stack(terms).sum() / num_tokens
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads))
    numbers = make_learner(tiny_model).step(make_plan(group))
    assert numbers["trained_tokens"] == num_tokens == 12
    assert numbers["loss"] == pytest.approx(loss.item(), rel=1e-5)
    assert numbers["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_the_micro_batch_split_changes_nothing(tiny_model: Path) -> None:
    plan = make_plan(make_group(0), make_group(1, prompt_length=9))
    whole, cut = (make_learner(tiny_model, micro_batch_tokens=tokens) for tokens in (10_000, 12))
    numbers, numbers_cut = whole.step(plan), cut.step(plan)
    assert numbers == pytest.approx(numbers_cut, rel=1e-6)
    assert difference(whole.model_tensors(), cut.model_tensors()) < 1e-6


def test_a_poisoned_batch_is_refused_and_the_weights_stay(tiny_model: Path) -> None:
    learner = make_learner(tiny_model)
    learner.step(make_plan(make_group(0)))
    before, moments = learner.model_tensors(), learner.optimizer_tensors()
    with pytest.raises(DivergedError, match="loss and gradient must be finite") as caught:
        learner.step(make_plan(make_group(0, logprob=math.nan)))
    assert caught.value.exit_code == 5
    assert difference(before, learner.model_tensors()) == 0
    assert difference(moments, learner.optimizer_tensors()) == 0
    assert math.isfinite(learner.step(make_plan(make_group(0)))["loss"])


def test_a_poisoned_weight_is_refused(tiny_model: Path) -> None:
    learner = make_learner(tiny_model)
    with torch.no_grad():
        next(learner.model.parameters())[70, 0] = math.inf
    with pytest.raises(DivergedError, match="got nan and a gradient norm nan"):
        learner.step(make_plan(make_group(0)))


def test_a_step_without_groups_moves_nothing(tiny_model: Path) -> None:
    learner = make_learner(tiny_model)
    before = learner.model_tensors()
    assert learner.step(make_plan()) == {}
    assert difference(before, learner.model_tensors()) == 0


def test_a_restored_learner_goes_on_bit_for_bit(tiny_model: Path, tmp_path: Path) -> None:
    unbroken = make_learner(tiny_model)
    unbroken.step(make_plan(make_group(0)))
    snapshot = Snapshot(1, unbroken.model_tensors(), unbroken.optimizer_tensors())
    write_cut(tmp_path, snapshot, {"version": 1})
    unbroken.step(make_plan(make_group(1), step=2))
    resumed, saved = make_learner(tiny_model), read_snapshot(tmp_path, 1)
    resumed.load(saved.model, saved.optimizer)
    assert read_books(tmp_path) == {"version": 1}
    resumed.step(make_plan(make_group(1), step=2))
    assert difference(unbroken.model_tensors(), resumed.model_tensors()) == 0
    assert difference(unbroken.optimizer_tensors(), resumed.optimizer_tensors()) == 0


def test_warm_up_begins_small(tiny_model: Path) -> None:
    optimizer = OptimizerSection(learning_rate=1e-2, warmup_steps=4)
    learner = make_learner(tiny_model, optimizer=optimizer)
    before = learner.model_tensors()
    learner.step(make_plan(make_group(0), step=0))
    assert difference(before, learner.model_tensors()) == pytest.approx(1e-2 / 4, rel=1e-3)


def test_the_learner_sees_the_policy_that_sampled(tiny_model: Path) -> None:
    """Engine and learner agree on log-probs at the temperature of sampling: rho is 1."""
    template = ChatTemplate(load_tokenizer(tiny_model))
    prompt_ids = tuple(template.encode_prompt(PROMPT.messages))
    engine = HfEngine(load_model(tiny_model), num_slots=4, max_length=64, pad_id=template.pad_id)
    requests = [
        Request(f"g/{n}", prompt_ids, 12, 0.7, seed=n, stop_ids=template.stop_ids) for n in range(4)
    ]
    completions = generate(engine, requests, timeout_seconds=60)
    engine.close()
    rollouts = tuple(
        Rollout(index, (completion.segment,), text="", reward=float(index % 2))
        for index, completion in enumerate(completions)
    )
    numbers = make_learner(tiny_model).step(make_plan(Group("g.0", PROMPT, prompt_ids, rollouts)))
    assert numbers["rho_mean"] == pytest.approx(1.0, abs=1e-4)
    assert numbers["rho_p95"] == pytest.approx(1.0, abs=1e-3)
    assert numbers["ess"] == pytest.approx(1.0, abs=1e-4)
    assert numbers["mismatch_kl"] < 1e-6
    wrong = make_learner(tiny_model, sampling=SamplingSection(temperature=1.0))
    assert wrong.step(make_plan(Group("g.0", PROMPT, prompt_ids, rollouts)))["mismatch_kl"] > 1e-3
