"""Synchronous RL as a plain loop: engine, loss and optimizer, nothing of the machinery.

draw → sample → score → (flat? draw the next one) → one AdamW step → load → again
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from transformers import PreTrainedModel

from curation.curriculum import Curriculum, Observation
from ground.chat import ChatTemplate
from ground.logprobs import model_logprobs
from ground.model import load_model, load_tokenizer
from ground.records import Group, Prompt
from rl.batch import collate, rows_of
from rl.config import RlSection
from rl.loss import aipo
from rl.objective_config import AipoLoss
from rollout.engine import Completion, Request, generate
from rollout.hf_engine import HfEngine
from rollout.seeds import sample_seed

Score = Callable[[Prompt, int, tuple[int, ...], list[Completion]], Group]


def reference_loop(
    path: Path, pool: Sequence[Prompt], section: RlSection, seed: int, score: Score
) -> Iterator[tuple[list[Group], dict[str, Tensor]]]:
    """Yield the groups of each step that teach, and the weights that it leads to."""
    model, template = load_model(path), ChatTemplate(load_tokenizer(path))
    slots, length = section.engine.num_slots, section.engine.max_length
    engine = HfEngine(load_model(path), num_slots=slots, max_length=length, pad_id=template.pad_id)
    rates, group_size = section.optimizer, section.group_size
    optimizer = torch.optim.AdamW(
        model.parameters(), rates.learning_rate, rates.betas, weight_decay=rates.weight_decay
    )
    curriculum = Curriculum(
        pool, section.curriculum, seed=seed, group_size=group_size, steps=section.steps
    )
    for version in range(section.steps):
        turns, stride = slots_of(curriculum, section.groups_per_step)
        kept: list[Group] = []
        seen: list[Observation] = []
        for slot, (capability, rank) in enumerate(turns, version * section.groups_per_step):
            for attempt in range(section.max_refills + 1):
                place = rank + attempt * stride[capability]
                prompt = curriculum.draw(version, capability, place)
                number = slot * (section.max_refills + 1) + attempt
                ids = tuple(template.encode_prompt(prompt.messages))
                asked = section.sampling.max_new_tokens, section.sampling.temperature
                requests = [
                    Request(
                        str(n),
                        ids,
                        *asked,
                        sample_seed(seed, prompt.id, number, n),
                        template.stop_ids,
                    )
                    for n in range(section.group_size)
                ]
                group = score(prompt, number, ids, generate(engine, requests, timeout_seconds=60))
                passed = sum(rollout.passed for rollout in group.rollouts)
                seen.append(Observation(prompt.id, passed, section.group_size))
                if len(set(group.rewards)) > 1:
                    kept.append(group)
                    break
        loss_of(model, kept, section, template.pad_id).backward()
        clip_grad_norm_(model.parameters(), rates.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        curriculum.observe(version + 1, seen)
        weights = {name: t.detach().clone() for name, t in model.state_dict().items()}
        engine.load(version + 1, weights)
        yield kept, weights
    engine.close()


def slots_of(curriculum: Curriculum, count: int) -> tuple[list[tuple[str, int]], dict[str, int]]:
    """Capability and rank within it of each slot, and slots by capability (largest remainder)."""
    exact = {name: share * count for name, share in sorted(curriculum.shares().items())}
    stride = {name: int(value) for name, value in exact.items()}
    for name in sorted(exact, key=lambda n: stride[n] - exact[n])[: count - sum(stride.values())]:
        stride[name] += 1
    places = [((k + 0.5) / n, name, k) for name, n in stride.items() for k in range(n)]
    return [(name, rank) for _, name, rank in sorted(places)], stride


def loss_of(model: PreTrainedModel, groups: list[Group], section: RlSection, pad: int) -> Tensor:
    """AIPO over all tokens of the step, in one right-padded batch, longest row first."""
    rows = sorted(rows_of(groups, section.advantages, 0), key=len, reverse=True)
    batch = collate([[row] for row in rows], pad)
    tokens, mask_BT, heat = batch.tokens_BT, batch.loss_mask_BT, section.sampling.temperature
    logprobs_BT, _ = model_logprobs(
        model, tokens, batch.segments_BT, temperature=heat, wanted_BT=mask_BT
    )
    mu_N, advantages_N = batch.behavior_logprobs_BT[mask_BT], batch.advantages_BT[mask_BT]
    loss_N = aipo(logprobs_BT[mask_BT], mu_N, advantages_N, AipoLoss().rho_max)
    return loss_N.sum() * (1 / len(loss_N))
