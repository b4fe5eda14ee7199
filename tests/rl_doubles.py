"""Hand-made groups, plans and a learner of the tiny model, for the tests of rl."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator

from distill.config import RolloutDistillSection
from distill.word import Teaching
from ground.adapter import Adapter
from ground.launch import Launch
from ground.model import load_model
from ground.ranks import Ranks
from ground.records import Group, Message, Prompt, Rollout, Segment, Span
from rl.buffer import Outcome, Plan
from rl.config import RlSection
from rl.ensemble import Ensemble
from rl.learner import Learner
from rl.prober import Prober
from rl.source import Draw
from rl.speech import open_teacher, word_on

PROMPT = Prompt.make((Message("user", "2+2="),), capability="sums", reward="exact", answer="4")
ANSWERS = [((70, 71, 260), 1.0), ((72, 260), 0.0), ((70, 73, 74, 75, 260), 0.0), ((9, 260), 1.0)]


def make_group(number: int, logprob: float = -2.0, prompt_length: int = 4) -> Group:
    rollouts = tuple(
        Rollout(
            index,
            (
                Segment(
                    "policy",
                    tokens,
                    tuple(logprob - 0.1 * place for place in range(len(tokens))),
                    (Span(0, len(tokens)),),
                ),
            ),
            text="",
            reward=reward,
            passed=reward > 0,
        )
        for index, (tokens, reward) in enumerate(ANSWERS)
    )
    prompt_ids = tuple(range(20 + number, 20 + number + prompt_length))
    return Group(f"{PROMPT.id}.{number}", PROMPT, prompt_ids, rollouts)


def taught(plan: Plan, section: RolloutDistillSection, teaching: Teaching) -> Plan:
    """The same plan after a real teacher has spoken to its groups."""
    teacher = open_teacher(section, teaching)
    outcomes = [
        replace(o, word=word_on(o.group, teacher, teaching)) if o.group else o
        for o in plan.outcomes
    ]
    return replace(plan, outcomes=tuple(outcomes))


def make_plan(*groups: Group, step: int = 1) -> Plan:
    """A step whose every slot was settled by its first draw."""
    draws = [Draw(slot, slot, 0, 0, group.prompt) for slot, group in enumerate(groups)]
    outcomes = [Outcome(draw, "", None, group) for draw, group in zip(draws, groups, strict=True)]
    return Plan.of(step, outcomes)


def make_ensemble(learner: Learner, ranks: Ranks | None = None) -> Ensemble:
    """The learners of all ranks; of this process alone by default."""
    ranks = ranks or Ranks(Launch(), 0.0)
    is_split = learner.update.splits_weights
    prober = Prober(
        learner.model,
        max_length=64,
        seed=0,
        through=learner.update.module if is_split else None,
        shared=ranks.shared if is_split else lambda experts: experts,
    )
    return Ensemble(learner, prober, ranks)


def make_learner(
    path: Path,
    accelerator: Callable[[], Accelerator] = lambda: Accelerator(cpu=True),
    dtype: torch.dtype = torch.float64,
    teaching: Teaching | None = None,
    **settings: object,
) -> Learner:
    section = RlSection.model_validate(
        {
            "steps": 4,
            "optimizer": {"learning_rate": 1e-2},
            "sampling": {"temperature": 0.7},
            **settings,
        }
    )
    model = load_model(path, dtype=dtype)  # first: with ZeRO-3 at hand it would come in parts
    adapter = Adapter(model, section.lora, seed=0, stage="rl") if section.lora else None
    return Learner(model, accelerator(), section, pad_id=261, adapter=adapter, teaching=teaching)
