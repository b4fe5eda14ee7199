"""One rank of a learner in a process of its own: `python rl_rank.py MODEL OUT`, told by torchrun's
environment. Rank 0 writes what the steps gave.

The plans are made so that ranks have different numbers of passes, that one of them has no row at
all, and that a poisoned row is on the other rank only.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from rl_doubles import make_group, make_learner, make_plan
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from ground.errors import DivergedError
from ground.records import Group
from rl.books import Plan
from rl.learner import Learner

SETTINGS: dict[str, Any] = {
    "micro_batch_tokens": 24,
    "advantages": {"kind": "batch_std"},
    "ess_floor": 0.9,
    "max_braked_steps": 99,
    "optimizer": {"learning_rate": 1e-2, "max_grad_norm": 1e9},  # gradients come as they are
}
LOSSES: list[dict[str, Any]] = [
    {"kind": "aipo", "rho_max": 2, "icepop": {"low": 0.02}, "reference_kl": 0.1},
    {"kind": "cispo", "rho_min": 0.1, "rho_max": 3},
    {"kind": "clip", "low": 0.5, "high": 3, "sequence_mask": 3.7},
    {"kind": "decoupled", "low": 0.5, "high": 3, "proximal": "interpolate"},
]


def alone(group: Group) -> Group:
    """Only the first answer says anything: a step of one row."""
    silent = [replace(rollout, segments=()) for rollout in group.rollouts[1:]]
    return replace(group, rollouts=(group.rollouts[0], *silent))


def plans() -> list[Plan]:
    """Uneven rows, one row, many rows; the second step finds other weights than the first."""
    long = [make_group(n, prompt_length=4 + 5 * n) for n in range(3)]
    return [
        make_plan(*long, step=0),
        make_plan(alone(make_group(1)), step=1),
        make_plan(*long, make_group(3, logprob=-4.0), step=2),
    ]


def poisoned() -> Plan:
    """NaN in the shortest row, which is the second rank's."""
    group = make_group(0)
    short = group.rollouts[1]
    bad = replace(short.segments[0], logprobs=(math.nan, math.nan))
    rollouts = list(group.rollouts)
    rollouts[1] = replace(short, segments=(bad,))
    return make_plan(replace(group, rollouts=tuple(rollouts)), step=3)


def train(learner: Learner) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The numbers of all steps and how the poisoned one ended; gradients and weights."""
    found: dict[str, Tensor] = {}

    def keep(optimizer: Optimizer, *_: object) -> None:
        grads = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        found[f"gradient {len(found)}"] = torch.cat(grads).clone()

    handle = register_optimizer_step_pre_hook(keep)
    numbers = [learner.step(plan) for plan in plans()]
    handle.remove()
    before, error = learner.model_tensors(), ""
    try:
        learner.step(poisoned())
    except DivergedError as refusal:
        error = refusal.what
    kept = all(bool((before[k] == v).all()) for k, v in learner.model_tensors().items())
    facts = {"numbers": numbers, "error": error, "kept": kept}
    return facts, found | learner.model_tensors()


def main() -> None:
    """Run as a rank."""
    model, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    # Without the backend accelerate makes two worlds of one rank each on a machine without GPUs.
    accelerator = Accelerator(cpu=True, kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")])
    assert accelerator.num_processes == 2
    for loss in LOSSES:
        facts, tensors = train(make_learner(model, accelerator, loss=loss, **SETTINGS))
        name = f"{loss['kind']}_{accelerator.process_index}"
        (out / f"{name}.json").write_text(json.dumps(facts))
        save_file(tensors, out / f"{name}.safetensors")
    accelerator.end_training()


if __name__ == "__main__":
    main()
