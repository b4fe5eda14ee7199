"""`max_staleness: 0` is synchronous training: the loop equals a plain one, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rl_local import Killer, LocalRun, rollouts_of
from rl_reference import reference_loop
from torch import Tensor

from ground import faults
from ground.model import load_model
from ground.records import Group, Prompt
from rl.books import Plan
from rl.learner import Learner
from rollout.engine import Completion

LINES = Path(__file__).with_name("rl_reference.py").read_text().split("\n")


def score(prompt: Prompt, number: int, ids: tuple[int, ...], found: list[Completion]) -> Group:
    return Group(f"{prompt.id}.{number}", prompt, ids, rollouts_of(found))


def test_two_jittering_workers_with_refills_equal_the_reference_loop_bit_for_bit(
    tiny_model: Path, ram_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(faults, "point", lambda name: None)
    trained: list[tuple[Plan, dict[str, Tensor]]] = []
    step = Learner.step

    def noted(learner: Learner, plan: Plan) -> dict[str, float]:
        numbers = step(learner, plan)
        trained.append((plan, learner.model_tensors()))
        return numbers

    monkeypatch.setattr(Learner, "step", noted)
    settings = {"max_staleness": 0, "steps": 5, "groups_per_step": 4, "max_refills": 2}
    run = LocalRun(ram_path, tiny_model, Killer(), jitter=0.02, **settings)
    assert run.live()
    wanted = list(reference_loop(tiny_model, run.pool.training, run.section, 3, score))
    assert len(trained) == len(wanted) == 5
    filtered = 0
    for (plan, weights), (groups, expected) in zip(trained, wanted, strict=True):
        filtered += sum(plan.filtered.values())
        assert plan.groups == tuple(groups)
        assert all(torch.equal(weights[name], expected[name]) for name in weights)
    assert filtered > 2
    first = dict(load_model(tiny_model).state_dict())
    assert any(not torch.equal(wanted[0][1][name], first[name]) for name in first)
    assert sum(bool(line.strip()) for line in LINES) < 100
