"""How the herd is taught: the optimizer's algebra, the order of lessons, and that it learns."""

from __future__ import annotations

from typing import cast

import pytest
import torch
from transformers import Llama4TextConfig

from ground.answers import final_answer
from ground.chat import ChatTemplate
from ground.herd import lessons as lessons_module
from ground.herd.config import Lessons, Shape
from ground.herd.lessons import Course, teach
from ground.herd.muon import Muon, orthogonal
from ground.herd.shape import new_model
from ground.herd.tokenizer import build_tokenizer
from ground.judging import JUDGE_QUESTION
from ground.records import LABELS

TINY = Shape(hidden_size=32, num_heads=2, num_key_value_heads=1, dense_size=32, expert_size=16)  # pyright: ignore[reportCallIssue]


def test_orthogonal_brings_singular_values_near_one_and_keeps_the_vectors() -> None:
    matrices = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    found = left.mT @ orthogonal(matrices) @ right.mT
    assert torch.allclose(torch.diagonal(found, dim1=-2, dim2=-1), torch.ones(3, 5), atol=0.4)
    off_diagonal = found - torch.diag_embed(torch.diagonal(found, dim1=-2, dim2=-1))
    assert off_diagonal.abs().max() < 1e-4


def test_muon_moves_a_matrix_by_its_learning_rate_whatever_the_gradient() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 4))
    for scale in (1.0, 1000.0):
        optimizer = Muon([weight], lr=0.1)
        before = weight.detach().clone()
        weight.grad = scale * torch.eye(4)
        optimizer.step()
        moved = before - weight.detach()
        assert torch.linalg.matrix_norm(moved, 2).item() == pytest.approx(0.1, rel=0.4)


def test_the_learning_rate_rises_holds_and_falls() -> None:
    rates = [lessons_module._rate(step, 1000) for step in (0, 19, 300, 600, 800, 1000)]
    assert rates == pytest.approx([0.05, 1.0, 1.0, 1.0, 0.5, 0.0])


def _course(**options: object) -> Course:
    return Course(Lessons.model_validate(options), frozenset(), "test")


def test_lessons_begin_easy_and_without_mistakes() -> None:
    course = _course(think=1.0, slip=(1.0, 1.0, 1.0))
    for talk in (course.conversation(0.0) for _ in range(100)):
        if talk[-2].content.startswith("Calculate "):
            total = eval(talk[-2].content.removeprefix("Calculate ").rstrip("."))
            assert len(talk[-2].content.split(" ")) <= 6
            assert final_answer(talk[-1].content) == str(total)


def test_a_judge_learns_labels_and_never_of_a_family_kept_from_it() -> None:
    course = _course(judgements=1.0)
    for talk in (course.conversation(1.0) for _ in range(200)):
        assert talk[0].content.startswith(JUDGE_QUESTION)
        assert talk[1].content in LABELS
        question = talk[0].content.removeprefix(JUDGE_QUESTION)
        assert not question.startswith(("Calculate", "Your task is to count", "Solve the follow"))


def test_a_loss_does_not_depend_on_how_a_batch_is_padded() -> None:
    tokenizer = build_tokenizer(256)
    model = new_model(TINY, tokenizer, seed=0)
    rows = [([2, 9, 10, 11], [0, 0, 1, 1]), ([2, 9, 10, 11, 12, 13, 14], [0, 0, 0, 0, 1, 1, 1])]
    with torch.no_grad():
        together = lessons_module._loss(model, *lessons_module._padded(rows, 0)).item()
        apart = sum(
            lessons_module._loss(model, *lessons_module._padded([row], 0)).item() for row in rows
        )
    assert together == pytest.approx(apart, rel=1e-4)


def test_equal_seeds_give_equal_models() -> None:
    tokenizer = build_tokenizer(256)
    first, second = (new_model(TINY, tokenizer, seed=3) for _ in range(2))
    other = new_model(TINY, tokenizer, seed=4)
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


def test_layers_alternate_between_dense_and_mixture_and_the_last_has_no_rope() -> None:
    model = new_model(TINY, build_tokenizer(256), seed=0)
    assert [layer.is_moe_layer for layer in model.model.layers] == [False, True, False, True]
    config = cast(Llama4TextConfig, model.config)
    assert config.no_rope_layers == [1, 1, 1, 0]
    assert config.attention_chunk_size == 256


def test_teaching_lowers_the_loss() -> None:
    tokenizer = build_tokenizer(256)
    model = new_model(TINY, tokenizer, seed=0)
    plan = Lessons(steps=15, batch_size=16)  # pyright: ignore[reportCallIssue]
    losses: list[float] = []
    course = Course(plan, frozenset(), "test")
    teach(model, ChatTemplate(tokenizer), course, plan, lambda _, loss: losses.append(loss))
    assert len(losses) == 15
    assert losses[0] == pytest.approx(6.0, abs=0.3)
    assert losses[-1] < losses[0] - 1.0
