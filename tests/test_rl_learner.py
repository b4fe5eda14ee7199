"""One optimizer step: what it computes, what it is invariant to, and what it refuses."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model, make_tiny_with_images
from rl_doubles import ANSWERS, PROMPT, make_group, make_learner, make_plan
from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4Router

from ground.chat import ChatTemplate
from ground.errors import DataError, DivergedError
from ground.model import load_model, load_tokenizer
from ground.records import Group, Rollout, Segment, Span
from rl.buffer import Plan
from rl.config import OptimizerSection
from rl.learner import Learner
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


@pytest.fixture(scope="module")
def chunky_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chunks of 8 and a temperature that changes every 4 positions: shorter than the rows."""
    folder = tmp_path_factory.mktemp("chunky") / "model"
    return make_tiny_model(folder, attention_chunk_size=8, floor_scale=4)


LOSSES: list[dict[str, object]] = [
    {"kind": "aipo", "rho_max": 2},
    {"kind": "cispo", "rho_min": 0.1, "icepop": {"low": 0.01}},
    {"kind": "clip", "sequence_mask": 3.7},
    {"kind": "decoupled", "proximal": "interpolate", "reference_kl": 0.2},
]


def traced(learner: Learner, plan: Plan) -> tuple[dict[str, float], dict[str, Tensor]]:
    """A step's numbers and the whole gradient before clipping, which the last pass leaves."""
    grads: dict[str, Tensor] = {}

    def keep(name: str, parameter: Tensor) -> None:
        assert parameter.grad is not None
        grads[name] = parameter.grad.clone()

    hooks = [
        parameter.register_post_accumulate_grad_hook(partial(keep, name))
        for name, parameter in learner.model.named_parameters()
    ]
    numbers = learner.step(plan)
    for hook in hooks:
        hook.remove()
    return numbers, grads


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: str(loss["kind"]))
def test_neither_split_nor_packing_changes_loss_or_gradient(
    loss: dict[str, object], chunky_model: Path
) -> None:
    plan, made = make_plan(make_group(0), make_group(1, -4.0, prompt_length=9), step=2), []
    for micro_batch_tokens, pack_tokens in ((10_000, 0), (12, 0), (10_000, 64), (40, 30)):
        learner = make_learner(
            chunky_model,
            loss=loss,
            advantages={"kind": "batch_std"},
            micro_batch_tokens=micro_batch_tokens,
            pack_tokens=pack_tokens,
        )
        made.append(traced(learner, plan))
    (numbers, grads), *others = made
    assert numbers["grad_norm"] > 0.1 and 0 < numbers["rho_p05"] < numbers["rho_p95"]
    for other_numbers, other_grads in others:
        assert other_numbers == pytest.approx(numbers, rel=1e-6, abs=1e-9)
        for name, grad in grads.items():
            assert (other_grads[name] - grad).abs().max() < 1e-6 * grad.abs().max(), name


def test_what_a_step_measures_by_hand(tiny_model: Path) -> None:
    """Four tokens of three rows, of which the first alone is fresh."""
    numbers = {
        "loss": [0.0, 0.0, 0.0, 0.0],
        "logprobs": [-1.0, -2.0, -1.0, -3.0],
        "behavior": [-1.25, -2.0, -1.0, -3.0],
        "entropy": [0.5, 1.5, 2.0, 0.0],
        "ages": [0.0, 0.0, 1.0, 3.0],
        "weights": [1.0, 1.0, 0.0, 2.0],
        "clipped": [1.0, 0.0, 0.0, 0.0],
        "kept": [1.0, 1.0, 0.0, 1.0],
        "oldest": [0.0, 1.0, 1.0, 3.0],
    }
    stacked = torch.tensor(list(numbers.values()), dtype=torch.float64)
    measured = make_learner(tiny_model)._measured(stacked)
    rho = math.exp(0.25)
    expected = {
        "rho_mean": (rho + 3) / 4,
        "rho_max": rho,
        "ess": (rho + 3) ** 2 / (4 * (rho**2 + 3)),
        "mismatch_kl": (rho - 1 - 0.25) / 4,
        "fresh_gap_mean": 0.25,
        "fresh_gap_max": 0.25,
        "ess_applied": 16 / (4 * 6),
        "clip_share": 0.25,
        "masked_share": 0.25,
        "entropy": 1.0,
        "staleness_mean": 1.0,
        "staleness_min": 0.0,
        "staleness_max": 3.0,
        "stale_share": 0.5,
    }
    assert {name: measured[name] for name in expected} == pytest.approx(expected)


def test_what_a_pass_hands_to_the_metrics_stands_in_their_order(tiny_model: Path) -> None:
    """Ages 0 and 2 in the two halves of every answer, a ratio far beyond the clip."""
    group = make_group(0, logprob=-9.0)
    mixed = [
        replace(r, segments=(replace(s, versions=(Span(0, 1), Span(2, len(s.token_ids) - 1))),))
        for r in group.rollouts
        for s in r.segments
    ]
    plan = make_plan(replace(group, rollouts=tuple(mixed)), step=2)
    learner = make_learner(tiny_model, loss={"kind": "aipo", "rho_max": 1})
    measured = learner.step(plan)
    # 12 tokens in 4 answers: the first of each is two versions old, the other 8 are new.
    assert measured["staleness_mean"] == pytest.approx(4 * 2 / 12)
    assert (measured["staleness_min"], measured["staleness_max"]) == (0.0, 2.0)
    assert measured["stale_share"] == pytest.approx(4 / 12)
    assert (measured["clip_share"], measured["masked_share"]) == (1.0, 0.0)
    assert measured["ess_applied"] == pytest.approx(1.0), "every weight is cut to 1"
    assert "fresh_gap_mean" not in measured, "no answer is of one version from the start"
    assert 0 < measured["entropy"] < math.log(264)


def test_75_a_poisoned_batch_is_refused_and_the_weights_stay(tiny_model: Path) -> None:
    learner = make_learner(tiny_model)
    learner.step(make_plan(make_group(0)))
    before, moments = learner.model_tensors(), learner.optimizer_tensors()
    with pytest.raises(DivergedError, match="loss and gradient must be finite") as caught:
        learner.step(make_plan(make_group(0, logprob=math.nan)))
    assert caught.value.exit_code == 5
    assert difference(before, learner.model_tensors()) == 0
    assert difference(moments, learner.optimizer_tensors()) == 0
    assert math.isfinite(learner.step(make_plan(make_group(0)))["loss"])


def test_75_a_poisoned_weight_is_refused(tiny_model: Path) -> None:
    learner = make_learner(tiny_model)
    with torch.no_grad():
        next(learner.model.parameters())[70, 0] = math.inf
    with pytest.raises(DivergedError, match="got nan and a gradient norm nan"):
        learner.step(make_plan(make_group(0)))


def test_75_a_gradient_that_overflows_is_refused_although_the_loss_is_finite(
    tiny_model: Path,
) -> None:
    learner = make_learner(tiny_model)
    head = learner.model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    head.weight.register_hook(lambda grad: grad * math.inf)
    before = learner.model_tensors()
    with pytest.raises(DivergedError, match=r"got -?[\d.]+ and a gradient norm (nan|inf)"):
        learner.step(make_plan(make_group(0)))
    assert difference(before, learner.model_tensors()) == 0


def test_75_an_infinite_reward_is_refused(tiny_model: Path) -> None:
    learner, group = make_learner(tiny_model), make_group(0)
    rollouts = [replace(rollout, reward=math.inf) for rollout in group.rollouts]
    before = learner.model_tensors()
    with pytest.raises(DivergedError, match="must be finite"):
        learner.step(make_plan(replace(group, rollouts=tuple(rollouts))))
    assert difference(before, learner.model_tensors()) == 0


def test_76_a_step_without_groups_moves_nothing(tiny_model: Path) -> None:
    learner = make_learner(tiny_model)
    before = learner.model_tensors()
    assert learner.step(make_plan()) == {}
    assert difference(before, learner.model_tensors()) == 0


def answered(*answers: tuple[int, ...]) -> Group:
    """A group of these answers, right and wrong by turns."""
    group = make_group(0)
    rollouts = tuple(
        Rollout(
            index,
            (Segment("policy", tokens, (-5.0,) * len(tokens), (Span(0, len(tokens)),)),),
            text="",
            finish="length" if len(tokens) > 5 else "stop",
            reward=float(index % 2),
        )
        for index, tokens in enumerate(answers)
    )
    return replace(group, rollouts=rollouts)


def test_83_odd_completions_train_what_they_have(tiny_model: Path) -> None:
    """Empty, instant end of turn, cut at the length, special tokens alone."""
    group = answered((), (260,), (70,) * 30, (256, 257, 258, 259, 260, 261))
    numbers = make_learner(tiny_model).step(make_plan(group))
    assert numbers["trained_tokens"] == 0 + 1 + 30 + 6
    assert math.isfinite(numbers["loss"]) and numbers["grad_norm"] > 0
    assert make_learner(tiny_model).step(make_plan(answered((), ()))) == {}


def test_84_a_step_of_one_token(tiny_model: Path) -> None:
    numbers = make_learner(tiny_model).step(make_plan(answered((), (70,))))
    assert numbers["trained_tokens"] == numbers["ess"] == numbers["ess_applied"] == 1
    assert numbers["rho_p05"] == numbers["rho_p95"] == numbers["rho_max"]
    assert math.isfinite(numbers["loss"]) and numbers["grad_norm"] > 0


def test_84_when_a_mask_drops_every_token_nothing_moves_not_even_by_momentum(
    tiny_model: Path,
) -> None:
    learner = make_learner(tiny_model, loss={"icepop": {"low": 0.3}})
    learner.step(make_plan(make_group(0, logprob=-5.5)))
    before = learner.model_tensors()
    numbers = learner.step(make_plan(make_group(1, logprob=-0.01)))
    assert numbers["masked_share"] == 1
    assert numbers["loss"] == numbers["grad_norm"] == numbers["ess_applied"] == 0
    assert difference(before, learner.model_tensors()) == 0


def test_85_a_collapsed_router_leaves_the_numbers_finite_and_shows_in_the_gauge(
    tiny_model: Path,
) -> None:
    healthy = make_learner(tiny_model).step(make_plan(make_group(0)))
    assert healthy["experts_idle"] < 6 and healthy["expert_share_max"] < 1
    learner = make_learner(tiny_model)
    layers = [m for m in learner.model.modules() if isinstance(m, Llama4Router)]
    for router in layers:
        # Expert 2 wins by a bias that no hidden state can make up for.
        router.register_forward_pre_hook(lambda module, args: (torch.ones_like(args[0]),))
        with torch.no_grad():
            router.weight.fill_(-1.0)
            router.weight[2] = 1.0
    before = learner.model_tensors()
    numbers = learner.step(make_plan(make_group(0)))
    assert (len(layers), numbers["experts_idle"], numbers["expert_share_max"]) == (2, 6, 1.0)
    assert math.isfinite(numbers["loss"]) and numbers["grad_norm"] > 0
    after = learner.model_tensors()
    experts = [name for name in after if name.endswith("experts.down_proj")]
    for name in experts:
        moved_E = (after[name] - before[name]).abs().amax(dim=(1, 2))
        assert moved_E[2] > 0 and moved_E[[0, 1, 3]].tolist() == [0, 0, 0]


def test_the_brake_scales_the_step_by_the_share_that_is_missing(tiny_model: Path) -> None:
    """Adam's first step has the size of the learning rate, whatever the gradient's."""
    plan = make_plan(make_group(0, logprob=-5.5), step=0)
    free, braked = (make_learner(tiny_model, ess_floor=floor) for floor in (0.0, 1.0))
    start = free.model_tensors()
    numbers, held = free.step(plan), braked.step(plan)
    assert numbers["brake"] == 1
    assert 0 < held["brake"] == held["ess_applied"] < 0.95
    full, part = difference(start, free.model_tensors()), difference(start, braked.model_tensors())
    assert part / full == pytest.approx(held["brake"], rel=1e-4)


def test_the_brakes_share_is_that_of_the_weights_applied(tiny_model: Path) -> None:
    """One token with a huge ratio ruins the raw share, not the truncated one."""
    group = answered(*[(70 + n, 71, 72) for n in range(8)])
    odd = replace(group.rollouts[0].segments[0], logprobs=(-30.0, -5.0, -5.0))
    rollouts = (replace(group.rollouts[0], segments=(odd,)), *group.rollouts[1:])
    numbers = make_learner(tiny_model).step(make_plan(replace(group, rollouts=rollouts)))
    assert numbers["ess"] < 0.06 and numbers["ess_applied"] > 0.3


def test_too_many_braked_steps_end_the_run_before_the_last_one_is_made(tiny_model: Path) -> None:
    learner = make_learner(tiny_model, ess_floor=1.0, max_braked_steps=2)
    learner.step(make_plan(make_group(0)))
    before = learner.model_tensors()
    with pytest.raises(DivergedError, match="2 times in a row") as caught:
        learner.step(make_plan(make_group(1), step=2))
    assert caught.value.exit_code == 5
    assert difference(before, learner.model_tensors()) == 0


def test_the_reference_is_the_first_model_also_after_a_restart(tiny_model: Path) -> None:
    """At the start its KL is 0 and has no gradient; it does not move with the learner."""
    plain, tied = (make_learner(tiny_model, loss={"reference_kl": w}) for w in (0.0, 0.5))
    first, first_tied = (learner.step(make_plan(make_group(0))) for learner in (plain, tied))
    assert first_tied["loss"] == pytest.approx(first["loss"], rel=1e-6)
    assert first_tied["grad_norm"] == pytest.approx(first["grad_norm"], rel=1e-6)
    again = make_learner(tiny_model, loss={"reference_kl": 0.5})
    again.load(tied.model_tensors(), tied.optimizer_tensors())
    second, second_tied, resumed = (
        learner.step(make_plan(make_group(1), step=2)) for learner in (plain, tied, again)
    )
    assert second_tied["loss"] > second["loss"] + 1e-3
    assert resumed["loss"] == second_tied["loss"]


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


def test_what_text_does_not_reach_has_no_moments_and_a_cut_that_counts_it_is_refused(
    tmp_path: Path,
) -> None:
    """The encoder of images comes first: it had the numbers 0 to 25, without moments."""
    learner = make_learner(make_tiny_with_images(tmp_path), optimizer={"weight_decay": 0.5})
    before = learner.model_tensors()
    learner.step(make_plan(make_group(0)))
    after, moments = learner.model_tensors(), learner.optimizer_tensors()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) is not name.startswith("language_model."), name
    kinds = ("step", "exp_avg", "exp_avg_sq")
    assert moments.keys() == {f"{n}.{kind}" for n in range(45) for kind in kinds} | {"rng"}
    counted = {f"{n + 26}.{kind}": moments[f"{n}.{kind}"] for n in range(45) for kind in kinds}
    with pytest.raises(DataError, match=r"those of the 45 .* 156 are missing or unknown: 0\.exp"):
        learner.load(before, {**counted, "rng": moments["rng"]})
    learner.load(before, moments)


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
