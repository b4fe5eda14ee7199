"""The lessons of a model of the herd, from easy to hard, and the loop that teaches them.

    easy questions → easy and medium → all, with the authors' mistakes from two fifths of the way on

So the mechanics of copying and counting are learned on short, clean rows before long ones come.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from random import Random

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils import clip_grad_norm_
from transformers import Llama4ForCausalLM

from ground.chat import ChatTemplate
from ground.herd.config import Lessons
from ground.herd.corpus import SYSTEMS, Authors, Habits, Questions, conversation
from ground.herd.families import JUDGED_ONLY, SOLVED
from ground.herd.muon import Muon
from ground.judging import judgement
from ground.records import LABELS, Message

Row = tuple[list[int], list[int]]
"""Token ids and the mask of those that are learned."""

_MEDIUM_FROM, _HARD_FROM, _MISTAKES_FROM = 0.2, 0.4, 0.4
_SYSTEM_SHARE = 0.3
_WARM_UP_STEPS = 20
_DECAY_SHARE = 0.4
_MAX_GRAD_NORM = 1.0
_NUM_THREADS = 2
_NUM_PARTS = 4


class Course:
    """A seeded stream of conversations to learn from, by progress in [0, 1]."""

    def __init__(self, lessons: Lessons, forbidden: Collection[str], *seed: object) -> None:
        habits = Habits(lessons.think, lessons.slip, lessons.guess)
        judged = [family for family in (*SOLVED, *JUDGED_ONLY) if family.judge_learns]
        self._judgements = lessons.judgements
        self._authors = Authors(habits, *seed)
        self._questions = Questions(*seed, forbidden=forbidden)
        self._judged = Questions(*seed, "judged", families=judged, forbidden=forbidden)
        self._random = Random("/".join(map(str, ("course", *seed))))

    def conversation(self, progress: float) -> tuple[Message, ...]:
        """The next conversation."""
        if self._random.random() < self._judgements:
            task = self._judged.ask()
            return judgement(task.prompt.messages, task.label)
        num_levels = 1 + (progress >= _MEDIUM_FROM) + (progress >= _HARD_FROM)
        task = self._questions.ask(LABELS[:num_levels])
        completion = self._authors.answer(task, careful=progress < _MISTAKES_FROM)
        has_system = self._random.random() < _SYSTEM_SHARE
        return conversation(task, completion, self._random.choice(SYSTEMS) if has_system else "")


def teach(
    model: Llama4ForCausalLM,
    chat: ChatTemplate,
    course: Course,
    lessons: Lessons,
    report: Callable[[int, float], None],
) -> None:
    """Train a model from nothing; `report` is told each step's number and loss.

    The number of threads is fixed, because the bits of a sum depend on it.
    """
    torch.set_num_threads(_NUM_THREADS)
    matrices, others = _split_parameters(model)
    optimizers = (
        Muon(matrices, lr=lessons.matrix_lr),
        torch.optim.AdamW(others, lr=lessons.other_lr, betas=(0.9, 0.95), weight_decay=0.0),
    )
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, lessons.steps))
        for optimizer in optimizers
    ]
    model.train()
    for step in range(1, lessons.steps + 1):
        progress = (step - 1) / lessons.steps
        talks = (course.conversation(progress) for _ in range(lessons.batch_size))
        loss = _accumulate(model, [chat.encode_demonstration(talk) for talk in talks], chat.pad_id)
        clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        report(step, loss)


def _rate(step: int, num_steps: int) -> float:
    """Share of the learning rate: up in 20 steps, level, down to nothing in the last 40 %."""
    return min(1.0, (step + 1) / _WARM_UP_STEPS, (1 - step / num_steps) / _DECAY_SHARE)


def _split_parameters(model: Llama4ForCausalLM) -> tuple[list[Tensor], list[Tensor]]:
    """Matrices for Muon; embedding, routers and norms for AdamW."""
    matrices: list[Tensor] = []
    others: list[Tensor] = []
    for name, parameter in model.named_parameters():
        is_matrix = parameter.ndim >= 2 and "embed" not in name and "router" not in name
        (matrices if is_matrix else others).append(parameter)
    return matrices, others


def _accumulate(model: Llama4ForCausalLM, rows: list[Row], pad_id: int) -> float:
    """Add up the gradient of a batch's mean loss and return that loss.

    The batch is cut into parts of like lengths, so that little is padded. All of its rows share one
    step: steps on rows of one length, hence of few families, learned half as fast.
    """
    rows = sorted(rows, key=lambda row: len(row[0]))
    num_learned = sum(sum(mask) for _, mask in rows)
    size = -(-len(rows) // _NUM_PARTS)
    total = 0.0
    for start in range(0, len(rows), size):
        loss = _loss(model, *_padded(rows[start : start + size], pad_id)) / num_learned
        loss.backward()
        total += loss.item()
    return total


def _padded(rows: list[Row], pad_id: int) -> tuple[Tensor, Tensor]:
    """ids_BT and mask_BT, padded on the right."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [pad_id] * (longest - len(ids)) for ids, _ in rows])
    mask = torch.tensor([mask + [0] * (longest - len(mask)) for _, mask in rows])
    return ids, mask.bool()


def _loss(model: Llama4ForCausalLM, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Summed cross-entropy of the learned tokens; they cannot see the padding on the right."""
    hidden = model.model(input_ids=ids_BT[:, :-1], use_cache=False).last_hidden_state
    wanted = mask_BT[:, 1:]
    logits = model.lm_head(hidden[wanted]).float()
    return cross_entropy(logits, ids_BT[:, 1:][wanted], reduction="sum")
