"""One of two ranks that takes the plans of rl_rank.py with every loss: `… MODEL OUT`.

In double precision, so that what a split of the rows over ranks changes is rounding alone.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import rl_rank
import torch
from rl_doubles import make_ensemble, make_learner, taught
from safetensors.torch import save_file
from torch import Tensor
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from distill.config import RolloutDistillSection
from distill.plan import plan_teaching
from ground.errors import DivergedError
from ground.ranks import Ranks, join_ranks
from rl.buffer import Plan
from rl.ensemble import Ensemble

TEACHER = "teacher"
"""A folder in OUT."""
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
CASES: dict[str, dict[str, Any]] = {loss["kind"]: {"loss": loss} for loss in LOSSES}
CASES["adapter"] = {"loss": LOSSES[0], "lora": {"rank": 4}}
TAUGHT = {"k": 6, "temperature": 0.7, "weighting": {"peak": 2.0}}  # that of sampling
CASES["taught"] = {"loss": LOSSES[0], "distill": TAUGHT}
CASES["taught adapter"] = {"distill": TAUGHT, "lora": {"rank": 4}}
"""Name → what it has besides `SETTINGS`."""


def plans(case: str, model: Path, teacher: Path) -> list[Plan]:
    """Those of rl_rank.py, and a poisoned one; the teacher has spoken where there is one."""
    made = [*rl_rank.plans(), rl_rank.poisoned()]
    if "distill" not in CASES[case]:
        return made
    section = RolloutDistillSection.model_validate(CASES[case]["distill"])
    teaching = plan_teaching(section, teacher, model, 64)
    return [taught(plan, section, teaching) for plan in made]


def train(learners: Ensemble, plans: list[Plan]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The numbers of all steps and how the poisoned one ended; gradients and weights."""
    found: dict[str, Tensor] = {}

    def keep(optimizer: Optimizer, *_: object) -> None:
        grads = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"]]
        found[f"gradient {len(found)}"] = torch.cat(grads).clone()

    handle = register_optimizer_step_pre_hook(keep)
    *sound, poisoned = plans
    numbers = [learners.step(plan) for plan in sound]
    handle.remove()
    before, error = learners.model_tensors(), ""
    try:
        learners.step(poisoned)
    except DivergedError as refusal:
        error = refusal.what
    kept = all(bool((before[k] == v).all()) for k, v in learners.model_tensors().items())
    facts = {"numbers": numbers, "error": error, "kept": kept}
    return facts, found | learners.model_tensors()


def ensemble(model: Path, teacher: Path, ranks: Ranks, case: str) -> Ensemble:
    """The learners of all ranks in a case."""
    distill = CASES[case].get("distill")
    section = RolloutDistillSection.model_validate(distill) if distill else None
    teaching = plan_teaching(section, teacher, model, 64) if section else None
    settings = CASES[case] | SETTINGS
    return make_ensemble(
        make_learner(model, ranks.accelerator, teaching=teaching, **settings), ranks
    )


def main() -> None:
    """Run as a rank."""
    model, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    ranks = join_ranks("test", seconds=60)
    for case in CASES:
        learners = ensemble(model, out / TEACHER, ranks, case)
        if not ranks.is_main:
            learners.follow()
            continue
        facts, tensors = train(learners, plans(case, model, out / TEACHER))
        learners.end()
        (out / f"{case}.json").write_text(json.dumps(facts))
        save_file(tensors, out / f"{case}.safetensors")


if __name__ == "__main__":
    main()
