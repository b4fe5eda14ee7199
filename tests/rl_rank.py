"""One rank of a learner in a process of its own: `python rl_rank.py MODEL OUT`.

It is told by a launcher's environment. Rank 0 leads, and writes what the steps gave.

The plans are made so that ranks have different numbers of passes, that one of them has no row at
all, and that a poisoned row is on the other rank only.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
from rl_doubles import make_ensemble, make_group, make_learner, make_plan
from safetensors.torch import load_file, save_file
from torch import nn

from ground.errors import DivergedError
from ground.ranks import Ranks, join_ranks
from ground.records import Group
from rl.buffer import Plan
from rl.ensemble import Ensemble

SPOILT = "spoilt"
SETTINGS: dict[str, Any] = {
    "micro_batch_tokens": 24,
    "advantages": {"kind": "batch_std"},
    "loss": {"kind": "aipo", "rho_max": 2, "icepop": {"low": 0.05}, "reference_kl": 0.1},
    "ess_floor": 0.9,
}


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


def train(learners: Ensemble, out: Path) -> dict[str, Any]:
    """The numbers of all steps, and how the poisoned one ended; leaves a cut before the last."""
    first, second, third = plans()
    numbers = [learners.step(first), learners.step(second)]
    save_file(learners.model_tensors(), out / "model.safetensors")
    save_file(learners.optimizer_tensors(), out / "optimizer.safetensors")
    numbers.append(learners.step(third))
    probes = learners.probes_of(first.groups)()
    with learners.live() as live:
        save_file({name: tensor.clone() for name, tensor in live.items()}, out / "last.safetensors")
    before, error = learners.model_tensors(), ""
    try:
        learners.step(poisoned())
    except DivergedError as refusal:
        error = refusal.what
    (out / SPOILT).touch()
    spoilt = ""
    try:
        learners.step(make_plan(*(make_group(n) for n in range(3)), step=4))
    except DivergedError as refusal:
        spoilt = refusal.what
    kept = all(bool((before[k] == v).all()) for k, v in learners.model_tensors().items())
    scored = [list(probe.logprobs) for probe in probes.rows]
    return {"numbers": numbers, "error": error, "spoilt": spoilt, "kept": kept, "probes": scored}


def go_on(learners: Ensemble, cut: Path, out: Path) -> dict[str, Any]:
    """The last step again, from a cut."""
    optimizer = load_file(cut / "optimizer.safetensors")
    learners.load(load_file(cut / "model.safetensors"), optimizer)
    numbers = [learners.step(plans()[2])]
    save_file(learners.model_tensors(), out / "last.safetensors")
    return {"numbers": numbers}


def spoil(learners: Ensemble, out: Path) -> None:
    """From the time that a file is there, this rank's gradients are infinite; its loss is not."""
    backbone = cast(nn.Module, learners._learner.model.base_model)
    weight = backbone.get_parameter("norm.weight")
    weight.register_hook(lambda grad: grad * math.inf if (out / SPOILT).exists() else grad)


def ensemble(model: Path, ranks: Ranks, **settings: Any) -> Ensemble:
    """The learners of all ranks over the tiny model, in fp32 as the stage has it."""
    learner = make_learner(model, ranks.accelerator, dtype=torch.float32, **settings)
    ranks.check(ranks.num_ranks, learner.update.module)
    return make_ensemble(learner, ranks)


def main() -> None:
    """Run as a rank; with a third argument, go on from the cut in that folder."""
    model, out, *cut = (Path(argument) for argument in sys.argv[1:])
    torch.set_num_threads(1)
    ranks = join_ranks("test", seconds=60)
    learners = ensemble(model, ranks, **SETTINGS)
    if not ranks.is_main:
        spoil(learners, out)
        return learners.follow()
    found = go_on(learners, cut[0], out) if cut else train(learners, out)
    learners.end()
    (out / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
