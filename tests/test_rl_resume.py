"""A run that is killed, wherever, ends exactly as one that is not."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import cast

import pytest
import rl_local
from conftest import make_tiny_model
from rl_local import Killer, LocalRun
from torch import Tensor

from ground import faults
from ground.faults import POINTS
from rl.audit import audit_run
from rl.buffer import Plan
from rl.learner import Learner

ELSEWHERE = {"publish.kept", "publish.copy"}
"""Points of the hand-over through Ray, which the real processes' test covers."""
POINTS_HERE = {n for kind, n in POINTS if kind in ("learner", "controller")} - ELSEWHERE

ONCE = {"best.staged", "best.kept", "export"}
"""A life may pass these only once, late."""


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Killer:
    killer = Killer()
    monkeypatch.setattr(faults, "point", killer.point)
    monkeypatch.setattr(faults, "corrupted", killer.corrupted)
    return killer


def lives_with_kills(run: LocalRun, killer: Killer, aims: Iterator[tuple[str, int]]) -> set[str]:
    """Live until the end, each life killed at the next aim; returns the points that killed."""
    hit: set[str] = set()
    for name, nth in aims:
        killer.aim(name, nth)
        if run.live():
            return hit
        hit.add(name)
    killer.rest()
    assert run.live()
    return hit


def aims_at(names: set[str]) -> Iterator[tuple[str, int]]:
    """Each point at its first or second passage of a life; the end of the run comes last."""
    order = sorted(names, key=lambda name: (name in ONCE, name))
    return ((n, 1 if n in ONCE else 1 + place % 2) for place, n in enumerate(order))


@pytest.mark.slow
def test_synchronous_training_resumes_bit_for_bit_whatever_it_was_killed_at(
    tiny_model: Path, ram_path: Path, killer: Killer
) -> None:
    settings = {"max_staleness": 0, "steps": 6, "curriculum": {"survey_groups": 2}}
    unbroken = LocalRun(ram_path / "unbroken", tiny_model, killer, **settings)
    assert unbroken.live()
    assert set(killer.passed) >= POINTS_HERE
    wanted, missing = unbroken.facts(), set(POINTS_HERE)
    for number in range(6):
        run = LocalRun(ram_path / f"run{number}", tiny_model, killer, jitter=0.01, **settings)
        missing -= lives_with_kills(run, killer, aims_at(missing))
        assert run.lives > 1
        assert run.facts() == wanted, f"{run.lives} lives"
        assert audit_run(run.directory, run.section)["lost"] == 0
        if not missing:
            return
    pytest.fail(f"never killed at {missing}")


DISTILL = {"k": 6, "weighting": {"peak": 0.5}}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teacher") / "model"
    return make_tiny_model(folder, seed=5, initializer_range=0.3)


def test_with_a_teacher_synchronous_training_resumes_bit_for_bit(
    tiny_model: Path, teacher: Path, ram_path: Path, killer: Killer
) -> None:
    """Killed in the middle of a step, before one was cut and after: weights of the soft term, what
    the teacher said, and all else are those of a run that nobody has killed."""
    settings = {"max_staleness": 0, "steps": 4, "distill": DISTILL, "teacher": teacher}
    unbroken = LocalRun(ram_path / "unbroken", tiny_model, killer, 0.0, **settings)
    assert unbroken.live()
    run = LocalRun(ram_path / "run", tiny_model, killer, 0.01, **settings)
    aims = [("step.applied", 2), ("journal.written", 1), ("publish.begin", 2)]
    lives_with_kills(run, killer, iter(aims))
    assert run.lives == 4
    wanted = unbroken.facts()
    assert run.facts() == wanted
    guards = cast(Mapping[str, Mapping[str, object]], wanted["guards"])
    assert set(guards["lesson"]) == {"one", "two"}


def test_with_a_teacher_the_journal_alone_gives_the_weights_again(
    tiny_model: Path,
    teacher: Path,
    ram_path: Path,
    killer: Killer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Asynchronous, killed in the last step: the second life has nothing to ask anybody."""
    settings = {"max_staleness": 2, "steps": 6, "checkpoint_every": 4, "distill": DISTILL}
    settings |= {"validation": {"prompts": 2, "samples": 2, "evaluate_every": 6}}
    run = LocalRun(ram_path, tiny_model, killer, 0.02, teacher=teacher, **settings)
    lives = [digests_of_steps(monkeypatch, run, killer, ("step.applied", 6))]
    monkeypatch.setattr(rl_local, "word_on", lambda *_: pytest.fail("the teacher was asked again"))
    lives.append(digests_of_steps(monkeypatch, run, killer, None))
    assert [sorted(life) for life in lives] == [[1, 2, 3, 4, 5, 6], [5, 6]]
    assert [lives[1][version] for version in (5, 6)] == [lives[0][version] for version in (5, 6)]
    replayed = [r.numbers for r in run.ear.reports if "replayed" in r.numbers]
    assert len(replayed) == 2
    # A step of which all groups are flat trains nothing, and has no teacher either.
    assert all(("trained_tokens" in each) == (each.get("teacher_kl", 0) > 0) for each in replayed)
    assert audit_run(ram_path, run.section)["lost"] == 0


@pytest.mark.parametrize("late", ["wait", "drop"])
def test_asynchronous_training_is_reproduced_from_cut_and_journal(
    tiny_model: Path,
    ram_path: Path,
    killer: Killer,
    monkeypatch: pytest.MonkeyPatch,
    late: str,
) -> None:
    settings = {"max_staleness": 2, "steps": 7, "checkpoint_every": 4, "late": late}
    settings |= {"validation": {"prompts": 2, "samples": 2, "evaluate_every": 3}, "late_floor": 0.5}
    settings |= {"curriculum": {"survey_groups": 2}}
    run = LocalRun(ram_path, tiny_model, killer, jitter=0.02, **settings)
    lives = [digests_of_steps(monkeypatch, run, killer, aim) for aim in (("step.applied", 6), None)]
    assert [sorted(life) for life in lives] == [[1, 2, 3, 4, 5, 6], [5, 6, 7]]
    replayed = [r.numbers for r in run.ear.reports if "replayed" in r.numbers]
    assert [numbers["replay_differs"] for numbers in replayed] == [0.0, 0.0]
    assert [lives[1][version] for version in (5, 6)] == [lives[0][version] for version in (5, 6)]
    facts = audit_run(ram_path, run.section)
    assert (facts["steps"], facts["lost"], facts["trained_twice"]) == (7, 0, 0)


def digests_of_steps(
    monkeypatch: pytest.MonkeyPatch, run: LocalRun, killer: Killer, aim: tuple[str, int] | None
) -> dict[int, str]:
    """One life; the weights, moments and RNG that each step of it led to."""
    seen: dict[int, str] = {}
    step = Learner.step

    def noted(learner: Learner, plan: Plan) -> dict[str, float]:
        numbers = step(learner, plan)
        seen[plan.step + 1] = digest_of(learner.model_tensors() | learner.optimizer_tensors())
        return numbers

    with monkeypatch.context() as patch:
        patch.setattr(Learner, "step", noted)
        if aim is not None:
            killer.aim(*aim)
        else:
            killer.rest()
        assert run.live() == (aim is None)
    return seen


def digest_of(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()
