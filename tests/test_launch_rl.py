"""The rl stage under `accelerate launch` on two ranks: same numbers, and what survives what."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from launching import KINDS, launch_file, needs_deepspeed
from rl_runs import STEPS, Run, nothing_left

from ground.checkpoints import Checkpoints, step_of
from ground.metrics import read_metrics

pytestmark = [pytest.mark.launch, pytest.mark.timeout(900)]

SYNCHRONOUS = {"max_staleness": 0, "checkpoint_every": 2}
SHORT = SYNCHRONOUS | {"steps": 4}
NUMBERS = ("loss", "grad_norm", "reward", "entropy", "ess_applied", "staleness_mean")

Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path, tiny_model: Path) -> Iterator[Start]:
    """Starts a run of its own folder; at the end nothing of any may be left."""
    runs: list[Run] = []

    def begin(name: str, kind: str | None, rl: dict[str, object]) -> Run:
        (tmp_path / name).mkdir()
        file = launch_file(kind, tmp_path) if kind else None
        runs.append(Run(tmp_path / name, tiny_model, rl=rl, launcher=file))
        return runs[-1]

    yield begin
    for run in runs:
        with nothing_left(run):
            pass


def numbers(run: Run) -> list[list[float]]:
    records = [r for r in read_metrics(run.stage / "metrics.jsonl") if "loss" in r]
    return [[float(str(record[name])) for name in NUMBERS] for record in records]


def of_rank(run: Run, module: str, rank: int) -> psutil.Process:
    """A rank's process that runs a module."""
    (found,) = [
        each
        for each in psutil.Process(run.process.pid).children(recursive=True)
        if module in each.cmdline() and each.environ().get("RANK") == str(rank)
    ]
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_make_the_run_of_one_process(start: Start, kind: str) -> None:
    made = []
    for name, launched in (("one", None), ("two", kind)):
        run = start(name, launched, SHORT)
        output = run.finish()
        assert run.process.returncode == 0, output
        made.append(numbers(run))
    one, two = made
    assert len(one) == len(two) == 4
    for got, want in zip(two, one, strict=True):
        assert got == pytest.approx(want, abs=1e-4)


@pytest.mark.parametrize(
    ("kind", "rank"), [("ddp", 0), ("ddp", 1), pytest.param("zero3", 1, marks=needs_deepspeed)]
)
def test_a_killed_learner_of_any_rank_costs_a_life_and_no_more(
    start: Start, kind: str, rank: int
) -> None:
    run = start("run", kind, SYNCHRONOUS)
    run.wait_for_step(3)
    of_rank(run, "rl.learn", rank).kill()
    output = run.finish()
    assert run.process.returncode == 0, output
    run.check_finished()
    assert len(run.restarts()) == 1


def test_a_killed_host_ends_the_run_with_its_name_and_the_run_goes_on(start: Start) -> None:
    run = start("run", "ddp", SYNCHRONOUS)
    run.wait_for_step(3)
    of_rank(run, "rl.train", 1).kill()
    output = run.finish()
    assert run.process.returncode == 1 and "rank 1's rl.train must go on" in output, output
    run.start("--resume")
    output = run.finish()
    assert run.process.returncode == 0, output
    run.check_finished()


def test_a_killed_supervisor_leaves_nothing_and_the_run_goes_on(start: Start) -> None:
    run = start("run", "ddp", SYNCHRONOUS)
    run.wait_for_step(3)
    of_rank(run, "rl.train", 0).kill()
    run.finish()
    assert run.process.returncode == 1
    run.check_nothing_is_left()
    run.start("--resume")
    output = run.finish()
    assert run.process.returncode == 0, output
    run.check_finished()


def test_a_killed_launcher_leaves_nothing(start: Start) -> None:
    run = start("run", "ddp", SYNCHRONOUS)
    run.wait_for_step(2)
    os.kill(run.process.pid, signal.SIGKILL)
    ranks = run.left()
    run.process.communicate(timeout=60)
    assert ranks
    run.check_nothing_is_left()


def test_a_terminated_launch_saves_where_it_is_and_goes_on_in_one_process(start: Start) -> None:
    run = start("run", "ddp", SYNCHRONOUS)
    run.wait_for_step(3)
    run.process.send_signal(signal.SIGTERM)
    output = run.finish()
    assert "continue it with --resume" in output, output
    *_, latest = Checkpoints(run.stage / "checkpoints").steps()
    assert step_of(latest) == run.version
    run.launcher = None
    run.start("--resume")
    output = run.finish()
    assert run.process.returncode == 0, output
    run.check_finished()
    assert run.version == STEPS
