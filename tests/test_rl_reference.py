"""`max_staleness: 0` is synchronous training: the loop equals a plain one, bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rl_local import Killer, LocalRun, rollouts_of
from rl_reference import reference_loop
from rl_runs import Run, nothing_left
from torch import Tensor

from ground import faults
from ground.chat import ChatTemplate
from ground.checkpoints import Checkpoints
from ground.config import Data
from ground.faults import Faults
from ground.model import load_model, load_tokenizer
from ground.records import Group, Prompt
from ground.strikes import delay
from ground.tables import read_prompts
from rl.buffer import Plan
from rl.config import RlSection
from rl.consumed import Consumed
from rl.learner import Learner
from rl.pool import split_pool
from rl.snapshot import read_snapshot
from rollout.engine import Completion
from rollout.reward_pool import RewardPool
from rollout.scoring import rollouts_of as rollouts_with_verdicts
from rollout.scoring import texts_of

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


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_in_processes_equal_the_reference_loop_bit_for_bit(
    tiny_model: Path, tmp_path: Path
) -> None:
    """The stage as it is launched: Ray, two workers that are held up, verifiers."""
    held_up = Faults(tmp_path).at("rollout/*", "gen.scored").do(delay(0.3), times=4)
    settings = {
        "steps": 5, "max_staleness": 0, "max_refills": 2, "validation": {"prompts": 0},
        "fleet": {"num_workers": 2, "cpus_per_worker": 0.5, "spare": False},
        "optimizer": {"learning_rate": 1e-2},
    }  # fmt: skip
    with nothing_left(Run(tmp_path, tiny_model, "first", faults=held_up, rl=settings)) as run:
        output = run.finish()
        assert run.process.returncode == 0, output
    assert len(held_up.fired()) == 4
    plans = list(Consumed(run.stage / "groups").after(0))
    cut = Checkpoints(run.stage / "checkpoints").latest()
    assert cut is not None
    weights = read_snapshot(cut, 5).model
    template = ChatTemplate(load_tokenizer(tiny_model))
    pool = split_pool(read_prompts(tmp_path / "prompts.jsonl", Data()), 0, 0).training
    section = RlSection.model_validate({**run.rl, **settings})
    verifiers = RewardPool(1, 10.0, (tmp_path / "rewards.py",))

    def scored(prompt: Prompt, number: int, ids: tuple[int, ...], found: list[Completion]) -> Group:
        texts = texts_of(found, template)
        rollouts = rollouts_with_verdicts(found, texts, verifiers.score(prompt, texts))
        return Group(f"{prompt.id}.{number}", prompt, ids, rollouts)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        wanted = list(reference_loop(tiny_model, pool, section, 0, scored))
    finally:
        torch.set_num_threads(threads)
        verifiers.close()
    for plan, (groups, _) in zip(plans, wanted, strict=True):
        seen, expected = ([_tokens_of(group) for group in each] for each in (plan.groups, groups))
        assert seen == expected
    assert sum(sum(plan.filtered.values()) for plan in plans) > 0
    assert all(torch.equal(tensor, wanted[-1][1][name]) for name, tensor in weights.items())


def _tokens_of(group: Group) -> tuple[object, ...]:
    """All but the version, which the reference does not count."""
    sampled = [(r.segments[0].token_ids, r.segments[0].logprobs, r.reward) for r in group.rollouts]
    return group.id, group.prompt, sampled
