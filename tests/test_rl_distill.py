"""The teacher's term in RL: by hand, invariant, own denominator, refused where it is another's."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_model, make_tiny_tokenizer
from rl_doubles import ANSWERS, make_group, make_learner, make_plan, taught
from test_rl_learner import traced

from distill.config import AlignedWeight, RolloutDistillSection
from distill.plan import plan_teaching
from distill.ranks import require_whole_weights
from distill.word import Teaching
from ground.errors import DataError, DivergedError, RecipeError, SetupError
from ground.launch import Launch
from ground.model import load_model
from ground.recipe import load_recipe
from ground.records import Group
from packtrain.recipe import read_recipe
from packtrain.validate import require_files
from rl.batch import rows_of
from rl.buffer import Plan
from rl.consumed import Consumed
from rl.learner import Learner

STATIC: dict[str, object] = {"weighting": {"kind": "static", "share": 0.5}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same family: sharper, so that it has something to say."""
    return make_tiny_model(
        tmp_path_factory.mktemp("teacher") / "model", seed=5, initializer_range=0.3
    )


class School:
    """A student, a teacher and what one says of the other's answers."""

    def __init__(self, student: Path, teacher: Path, **distill: object) -> None:
        self.section = RolloutDistillSection.model_validate({"k": 6, **STATIC, **distill})
        self.student = student
        self.teaching: Teaching = plan_teaching(self.section, teacher, student, 64)

    def learner(self, **settings: Any) -> Learner:
        if self.section.weighting.kind == "aligned":  # it compares at one temperature
            settings = {"sampling": {"temperature": self.section.temperature}, **settings}
        return make_learner(self.student, teaching=self.teaching, distill=self.section, **settings)

    def plan(self, *groups: Group, step: int = 1) -> Plan:
        return taught(make_plan(*groups, step=step), self.section, self.teaching)


def logprobs(folder: Path, group: Group) -> list[torch.Tensor]:
    """Of the whole vocabulary before each token of each answer."""
    model = load_model(folder, dtype=torch.float64)
    found = []
    for tokens, _ in ANSWERS:
        ids = torch.tensor([*group.prompt_ids, *tokens])
        found.append(model(ids[None], use_cache=False).logits[0].log_softmax(-1)[3:-1])
    return found


@pytest.mark.parametrize("format", ["full", "topk_tail"])
def test_the_loss_is_the_policys_and_the_teachers_each_over_its_own_tokens(
    format: str, tiny_model: Path, teacher: Path
) -> None:
    """Written out naively, over the tokenizer's 262 ids and, for top-k, what is left of them."""
    school, group = School(tiny_model, teacher, format=format), make_group(0)
    plain = make_learner(tiny_model).step(make_plan(group))
    numbers = school.learner().step(school.plan(group))
    total = 0.0
    said = zip(logprobs(teacher, group), logprobs(tiny_model, group), ANSWERS, strict=True)
    for t_TV, q_TV, (tokens, _) in said:
        t_TV = t_TV[:, :262].log_softmax(-1).float().double()
        for t_V, q_V, token in zip(t_TV, q_TV, tokens, strict=True):
            kept = list(range(262))
            if format == "topk_tail":
                order = t_V.argsort(descending=True).tolist()
                kept = [token, *[each for each in order if each != token][:6]]
            rest = [each for each in range(264) if each not in kept]
            t_rest = t_V[[each for each in rest if each < 262]].exp().sum()
            total += (t_V[kept].exp() * (t_V[kept] - q_V[kept])).sum().item()
            if t_rest > 0:
                total += (t_rest * (t_rest.log() - q_V[rest].logsumexp(-1))).item()
    assert numbers["teacher_kl"] == pytest.approx(total / 12, rel=2e-3)  # kept in half precision
    assert numbers["distill_loss"] == pytest.approx(0.5 * numbers["teacher_kl"], rel=1e-6)
    assert numbers["loss"] == pytest.approx(plain["loss"] + numbers["distill_loss"], rel=1e-6)
    assert numbers["distill_weight/sums"] == 0.5
    assert (numbers["untaught_tokens"], numbers["distill_misfits"]) == (0.0, 0.0)


SPLITS = ((10_000, 0), (12, 0), (10_000, 64), (40, 30))


@pytest.mark.parametrize(
    "settings",
    [
        {"format": "topk_tail", "divergence": "reverse", "temperature": 2.0},
        {"format": "sampled", "draws": 8},
        {"format": "full", "divergence": "jsd", "weighting": {"peak": 2.0}},
    ],
    ids=lambda settings: str(settings["format"]),
)
def test_neither_split_nor_packing_changes_loss_or_gradient(
    settings: dict[str, object], tiny_model: Path, teacher: Path
) -> None:
    school = School(tiny_model, teacher, **settings)
    groups = make_group(0), make_group(1, -4.0, prompt_length=9)
    plan, made = school.plan(*groups, step=2), []
    for micro_batch_tokens, pack_tokens in SPLITS:
        learner = school.learner(micro_batch_tokens=micro_batch_tokens, pack_tokens=pack_tokens)
        made.append(traced(learner, plan))
    (numbers, grads), *others = made
    assert numbers["teacher_kl"] > 0.1 and numbers["distill_loss"] > 0.01
    for other_numbers, other_grads in others:
        assert other_numbers == pytest.approx(numbers, rel=1e-6, abs=1e-9)
        for name, grad in grads.items():
            assert (other_grads[name] - grad).abs().max() < 1e-6 * grad.abs().max(), name


def test_with_the_teacher_alone_the_student_comes_to_it(tiny_model: Path, teacher: Path) -> None:
    """A learner whose rewards say nothing: w = 1 and ratios that are masked away."""
    school = School(tiny_model, teacher, weighting={"kind": "static", "share": 1.0}, k=64)
    learner = school.learner(loss={"icepop": {"low": 0.99, "high": 1.01}}, ess_floor=0)
    plan = school.plan(make_group(0))
    told = [learner.step(replace(plan, step=step))["teacher_kl"] for step in range(8)]
    assert all(later < sooner for sooner, later in pairwise(told))
    assert told[-1] < 0.5 * told[0]


@pytest.mark.parametrize("format", ["full", "topk_tail", "sampled"])
def test_a_rank_without_rows_makes_a_pass_that_moves_nothing(
    format: str, tiny_model: Path, teacher: Path
) -> None:
    school = School(tiny_model, teacher, format=format, weighting={"kind": "aligned"})
    learner = school.learner()
    plan = school.plan(make_group(0))
    rows = rows_of(plan.groups, learner._section.advantages, 1, plan.words)
    assert learner.lesson
    learner.lesson.begin(rows, 1)
    batch, said = learner._pass([], 0, spare=[[[row] for row in rows]])
    assert said is not None and len(said) == batch.num_loss_tokens == 0
    numbers = learner._backward(batch, said, num_tokens=12)
    assert numbers.shape == (13, 0) and learner.lesson.misfits == 0
    assert all(p.grad is None or not p.grad.any() for p in learner.model.parameters())


def test_75_poisoned_weights_are_refused_with_a_teacher_too(
    tiny_model: Path, teacher: Path
) -> None:
    school = School(tiny_model, teacher, weighting="aligned")
    learner = school.learner()
    with torch.no_grad():
        next(learner.model.parameters())[70, 0] = math.inf
    with pytest.raises(DivergedError, match="must be finite, got nan"):
        learner.step(school.plan(make_group(0)))


def test_an_id_that_is_no_token_ends_what_the_teacher_hears(
    tiny_model: Path, teacher: Path
) -> None:
    """The tiny model's head has 264 rows, its tokenizer 262 ids. One answer goes on after 262."""
    school, group = School(tiny_model, teacher), make_group(0)
    first = group.rollouts[0]
    odd = replace(first.segments[0], token_ids=(70, 262, 260))
    group = replace(group, rollouts=(replace(first, segments=(odd,)), *group.rollouts[1:]))
    plan = school.plan(group)
    assert [said.num_tokens for said in plan.words[group.id].rows] == [1, 2, 5, 2]
    numbers = school.learner().step(plan)
    assert numbers["trained_tokens"] == 12
    assert numbers["untaught_tokens"] == pytest.approx(2 / 12)
    assert numbers["distill_misfits"] == 2
    mean = numbers["distill_loss"] / 0.5
    assert mean == pytest.approx(numbers["teacher_kl"], rel=1e-6), "over 10 tokens, not 12"


def test_71_the_word_of_another_teacher_and_on_other_tokens_is_refused_by_name(
    tiny_model: Path, teacher: Path, tmp_path: Path
) -> None:
    school = School(tiny_model, teacher)
    plan = school.plan(make_group(0))
    other = School(tiny_model, make_tiny_model(tmp_path / "other", seed=9))
    with pytest.raises(DataError, match=r"another teacher, tokenizer, template or format"):
        other.learner().step(plan)
    with pytest.raises(DataError, match=r"another teacher, tokenizer, template or format"):
        School(tiny_model, teacher, k=7).learner().step(plan)
    (group,) = plan.groups
    changed = replace(group, prompt_ids=(9, *group.prompt_ids[1:]))
    (outcome,) = plan.outcomes
    strange = replace(plan, groups=(changed,), outcomes=(replace(outcome, group=changed),))
    with pytest.raises(DataError, match="must be on the tokens that are trained"):
        school.learner().step(strange)
    with pytest.raises(DataError, match="must have its teacher's word"):
        school.learner().step(make_plan(group))


def test_86_a_word_with_nonsense_in_it_is_silent_there_and_counted(
    tiny_model: Path, teacher: Path
) -> None:
    school = School(tiny_model, teacher)
    plan = school.plan(make_group(0))
    (outcome,), word = plan.outcomes, plan.words[plan.groups[0].id]
    own, other = word.rows[0], word.rows[2]
    rows = (replace(own, content=other.content), *word.rows[1:])  # 5 tokens for 3, others' first
    spoilt = replace(outcome, word=replace(word, rows=rows))
    numbers = school.learner().step(replace(plan, outcomes=(spoilt,)))
    assert numbers["distill_misfits"] >= 2 and math.isfinite(numbers["loss"])
    torn = replace(outcome, word=replace(word, rows=(replace(own, content=b"x"), *word.rows[1:])))
    with pytest.raises(DataError, match="damaged"):
        school.learner().step(replace(plan, outcomes=(torn,)))


def test_72_a_teacher_of_other_tokens_and_one_that_reads_too_little_are_refused(
    tiny_model: Path, tmp_path: Path
) -> None:
    other = make_tiny_model(tmp_path / "other", seed=9)
    make_tiny_tokenizer("{{ messages[0]['content'] }}").save_pretrained(other)
    with pytest.raises(DataError, match="chat templates differ"):
        plan_teaching(RolloutDistillSection(), other, tiny_model, 64)
    with pytest.raises(RecipeError, match=r"rl.engine.max_length must be at most the teacher's"):
        plan_teaching(RolloutDistillSection(), tiny_model, tiny_model, 1025)


def test_the_journal_gives_the_same_step_bit_for_bit_without_a_teacher(
    tiny_model: Path, teacher: Path, tmp_path: Path
) -> None:
    """Weights that learn included: two steps, the second one weighed by what the first has told."""
    school = School(tiny_model, teacher, weighting={"peak": 2.0})
    plans = [school.plan(make_group(n), step=n) for n in range(2)]
    consumed = Consumed(tmp_path)
    for plan in plans:
        consumed.write(plan)
    live, again = school.learner(dtype=torch.float32), school.learner(dtype=torch.float32)
    told = [live.step(plan) for plan in plans]
    replayed = [again.step(plan) for plan in consumed.after(0)]
    assert replayed == told and told[1]["teacher_kl"] > 0
    fresh = school.learner(dtype=torch.float32).step(plans[1])["teacher_agreement/sums"]
    assert told[1]["teacher_agreement/sums"] != fresh, "the first step is remembered"
    assert max(each["distill_loss"] for each in told) > 0, "the teacher is heard"
    for name, tensor in live.model_tensors().items():
        assert (again.model_tensors()[name] == tensor).all(), name


def test_75_rewards_that_are_no_numbers_end_the_stage_by_name_with_a_weight_that_learns(
    tiny_model: Path, teacher: Path
) -> None:
    school = School(tiny_model, teacher, weighting="aligned")
    group = make_group(0)
    rollouts = tuple(replace(each, reward=math.nan) for each in group.rollouts)
    plan = school.plan(replace(group, rollouts=rollouts))
    with pytest.raises(DivergedError, match="must be finite, got nan"):
        school.learner().step(plan)


def test_a_teacher_that_foresees_the_rewards_is_heard_and_its_opposite_is_not(
    tiny_model: Path, teacher: Path
) -> None:
    """The answers that the teacher likes better than who sampled them are rewarded; then others."""
    group = make_group(0)
    leads = [
        said_TV.gather(1, torch.tensor(tokens)[:, None]).sum().item()
        - sum(each.segments[0].logprobs)
        for said_TV, (tokens, _), each in zip(
            logprobs(teacher, group), ANSWERS, group.rollouts, strict=True
        )
    ]
    order = torch.tensor(leads).argsort().argsort().tolist()
    for sign in (1.0, -1.0):
        rewards = [sign * float(place >= 2) for place in order]
        rollouts = tuple(
            replace(each, reward=reward)
            for each, reward in zip(group.rollouts, rewards, strict=True)
        )
        school = School(tiny_model, teacher, format="full", weighting={"peak": 0.5})
        plan = school.plan(replace(group, rollouts=rollouts), step=1)
        numbers = school.learner().step(plan)
        expected = torch.corrcoef(torch.tensor([leads, rewards]))[0, 1].item()
        assert numbers["teacher_agreement/sums"] == pytest.approx(expected, rel=1e-2)
        left = 1 - 1 / school.learner()._section.steps
        assert numbers["distill_weight/sums"] == pytest.approx(
            max(0.5 * left * expected, 0.0), rel=1e-2
        )
        assert sign * expected > 0.3


RECIPE = Path(__file__).parents[1] / "recipes" / "tiny" / "distill.yaml"


def test_the_shipped_recipe_is_valid_and_says_what_it_is() -> None:
    recipe = read_recipe(load_recipe(RECIPE))
    assert recipe.name == "tiny-distill" and recipe.rl and recipe.rl.distill
    assert recipe.rl.steps == 30, "the rest is the tiny recipe's"
    assert recipe.rl.distill.weighting == AlignedWeight()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("rl.distill.weighting=entropy", "must be 'static', 'schedule', 'aligned'"),
        ("rl.distill.weighting={labels_from: 0.5}", "labels_from is not a key"),
        ("rl.distill.temperature=2.0", "distill.temperature must be sampling.temperature (1)"),
        ("rl.learner.spread=zero3", "set learner.spread to ddp or zero2, got zero3"),
        ("rl.distill={format: sampled, divergence: jsd}", "cannot be computed from sampled"),
    ],
)
def test_what_makes_no_sense_in_rl_is_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=re.escape(message)):
        read_recipe(load_recipe(RECIPE, [override]))


def test_ranks_that_hold_parts_of_a_model_are_refused_under_a_launcher_too() -> None:
    with pytest.raises(SetupError, match="zero3 on 2 ranks"):
        require_whole_weights(Launch("zero3", 0, 2), "rl")
    require_whole_weights(Launch("zero2", 0, 2), "rl")


def test_a_recipe_without_a_teacher_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps({"name": "a", "rl": {"steps": 1, "distill": {}}}))
    document = load_recipe(path)
    with pytest.raises(RecipeError, match=re.escape("rl.distill needs teacher.path")):
        require_files(document, read_recipe(document))
