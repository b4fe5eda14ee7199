"""Real processes that are killed at named points; `benchmarks/chaos.py` does it fifty times."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_rl_resume import POINTS_HERE

from benchmarks.chaos import soak
from ground.faults import POINTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_nothing_is_lost_and_nothing_trained_twice(tmp_path: Path, tiny_model: Path) -> None:
    found = soak(tmp_path, tiny_model, kills=8, steps=8)
    assert sum(found.kills.values()) >= 6
    assert (found.consumed["lost"], found.consumed["trained_twice"]) == (0, 0)
    assert (found.consumed["steps"], found.differing) == (8, 0)


def test_synchronous_training_ends_as_if_nobody_had_been_killed(
    tmp_path: Path, tiny_model: Path
) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    """At every named point of a process whose end no test without processes can play:
    workers, verifiers, keeper, supervisor, and the learner's side of the hand-over. The others are
    killed at, one by one, in test_rl_resume.py."""
    points = [point for point in POINTS if point[1] not in POINTS_HERE or point[0] == "supervisor"]
    others = ("judge", "engine", "courier")  # test_rollout_(judge_fleet|replicas|courier).py
    points = [point for point in points if point[0] not in others]
    assert {kind for kind, _ in points} == {"rollout", "reward", "keeper", "supervisor", "learner"}
    whole = soak(tmp_path / "whole", tiny_model, kills=0, steps=6, staleness=0)
    killed = soak(
        tmp_path / "killed", tiny_model, kills=len(points), steps=6, staleness=0, points=points
    )
    struck = [tuple(where.split()) for where in killed.kills]
    assert {(role.partition("/")[0], name) for role, name in struck} == set(points)
    assert killed.differing == 0
    assert len(whole.digests) == 3
    assert killed.digests == whole.digests
    assert killed.ledger == whole.ledger
