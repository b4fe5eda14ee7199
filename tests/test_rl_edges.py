"""What the stage refuses before it starts, and what its processes must not load."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from ground.errors import DataError, FailureKind, InfraError, PacktrainError
from ground.records import Message, Prompt
from rl import speaker
from rl.cluster import cluster
from rl.config import RlSection
from rl.journal import Journal, read_journal
from rl.pool import split_pool
from rl.snapshot import restore
from rollout.config import EngineSection, FleetSection
from rollout.places import PlacementError


def make_prompts(count: int) -> list[Prompt]:
    return [
        Prompt.make((Message("user", str(n)),), capability="sums", reward="exact", answer="1")
        for n in range(count)
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampling": {"temperature": 0}}, "temperature must be positive in RL"),
        ({"group_size": 1}, "greater than or equal to 2"),
        ({"loss": {"rho_max": 0.5}}, "greater than or equal to 1"),
        ({"max_staleness": -1}, "greater than or equal to 0"),
        ({"group_szie": 8}, "Extra inputs"),
    ],
)
def test_settings_that_can_never_work_are_refused(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        RlSection.model_validate({"steps": 1, **settings})


def test_the_validation_slice_is_the_same_whatever_the_order_and_never_trained_on() -> None:
    prompts = make_prompts(20)
    pool = split_pool(prompts, 5, seed=0)
    assert pool.validation == split_pool(prompts[::-1], 5, seed=0).validation
    assert (len(pool.validation), len(pool.training)) == (5, 15)
    assert not set(pool.validation) & set(pool.training)
    assert split_pool(prompts, 5, seed=1).validation != pool.validation


def test_a_pool_that_is_all_validation_is_refused() -> None:
    with pytest.raises(DataError, match=r"must be more prompts than .* \(5\), got 5"):
        split_pool(make_prompts(5), 5, seed=0)


def test_a_fleet_larger_than_the_machine_is_refused_before_ray_starts(tmp_path: Path) -> None:
    """#40: Ray itself would wait for ever."""
    with (
        pytest.raises(PlacementError, match="they want 4096 processors, there are"),
        cluster(tmp_path, FleetSection(num_workers=4096), EngineSection(), tmp_path),
    ):
        pass


class Tied(nn.Module):
    """Two names for one weight, and one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(2, 2, bias=False)
        self.second = nn.Linear(2, 2, bias=False)
        self.second.weight = self.first.weight
        self.own = nn.Parameter(torch.zeros(1))


def test_restoring_needs_each_weight_once_and_nothing_else() -> None:
    model, weight = Tied(), torch.full((2, 2), 3.0)
    restore(model, {"first.weight": weight, "own": torch.ones(1)})
    assert torch.equal(model.second.weight, weight)
    with pytest.raises(DataError, match=r"\['own'\] are missing"):
        restore(model, {"first.weight": weight})
    with pytest.raises(DataError, match=r"\['third'\] are unknown"):
        restore(model, {"first.weight": weight, "own": torch.ones(1), "third": weight})


def test_the_learners_error_keeps_its_words_and_its_exit_code() -> None:
    facts: dict[str, object] = {"what": "w", "where": "here", "why": "y", "fix": "f"}
    own = speaker.error_of({**facts, "type": "RewardError", "kind": "code", "exit_code": 2})
    assert (own.exit_code, own.kind, str(own)) == (
        2,
        FailureKind.CODE,
        "here: w\n  why: y\n  fix: f",
    )
    assert not isinstance(own, InfraError)
    lost = speaker.error_of({**facts, "type": "InfraError", "kind": "infra", "exit_code": 6})
    assert isinstance(lost, InfraError)
    assert isinstance(own, PacktrainError)


def test_a_journal_forgets_what_is_behind_its_position(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "ledger.jsonl")
    journal.append({"draw": 1})
    position = journal.sync()
    journal.append({"draw": 2})
    journal.rewind(position)
    journal.append({"draw": 3})
    journal.close()
    with (tmp_path / "ledger.jsonl").open("a") as file:
        file.write('{"draw": 4')
    assert [record["draw"] for record in read_journal(tmp_path / "ledger.jsonl")] == [1, 3]


@pytest.mark.parametrize("module", ["rl.supervisor", "rl.actors"])
def test_supervisor_and_controller_start_without_torch(module: str) -> None:
    code = (
        f"import sys, {module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
