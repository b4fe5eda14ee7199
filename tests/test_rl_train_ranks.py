"""The learner's ranks as workers of Ray Train: same numbers, and what is lost with one of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from launching import needs_deepspeed
from ray.train import ControllerError, WorkerGroupError
from ray_jobs import HIDDEN, Job, project
from ray_nodes import Nodes, two_nodes
from rl_runs import RL, Run, nothing_left, wait_until

from ground.errors import InfraError
from ground.faults import Faults
from ground.metrics import read_metrics
from ground.strikes import delay
from rl.preflight import ClusterStartError
from rl.train_ranks import interface_of, own_error

STEPS = 8
ONE: dict[str, object] = RL | {
    "steps": STEPS,
    "max_staleness": 0,
    "groups_per_step": 2,
    "micro_batch_tokens": 1,
    "loss": {"kind": "aipo", "reference_kl": 0.1},
    "fleet": {"spare": False, "cpus_per_worker": 0.25, "backoff_seconds": 0.1},
}
"""The reference is the stage's first model: a rank that read others' weights would show."""
NUMBERS = ("loss", "grad_norm", "reward", "entropy", "ess_applied", "staleness_mean")
SAME = 1e-6
BUSY = 600
"""Seconds until something is given up: a life begins with a dozen Python processes."""


def two(spread: str = "ddp", **more: object) -> dict[str, object]:
    """The same on two ranks, of which a node with one processor holds one."""
    return ONE | {"learner": {"num_ranks": 2, "cpus_per_rank": 0.6, "spread": spread, **more}}


def numbers(stage: Path) -> list[list[float]]:
    records = [r for r in read_metrics(stage / "metrics.jsonl") if "loss" in r]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return [[float(str(record[name])) for name in NUMBERS] for record in records]


def test_ranks_speak_over_the_network_that_ray_speaks_over() -> None:
    addresses = {"lo": ["127.0.0.1"], "eth0": ["172.17.0.2"], "ib0": ["fe80::1", "10.0.0.7"]}
    assert interface_of("10.0.0.7", addresses) == "ib0"
    assert interface_of("10.0.0.8", addresses) == ""


def test_what_ray_train_says_is_a_lost_attempt_and_a_start_that_failed_costs_no_life() -> None:
    lost = own_error(WorkerGroupError("the actor died", {1: RuntimeError("killed")}))
    assert type(lost) is InfraError and lost.what.startswith("rank 1 must go on")
    late = own_error(ControllerError(TimeoutError("no places within 30 s")))
    assert type(late) is ClusterStartError and "no places within 30 s" in late.why


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    """The numbers of one process."""
    folder = tmp_path_factory.mktemp("alone")
    with nothing_left(Run(folder, tiny_model, rl=ONE)) as run:
        output = run.finish()
        assert run.process.returncode == 0, output
    return numbers(run.stage)


@pytest.mark.slow
@pytest.mark.timeout(4 * BUSY)
@needs_deepspeed
def test_the_learner_s_share_changes_at_cuts_by_advice_and_by_hand_and_the_numbers_stay(
    tmp_path: Path, tiny_model: Path, alone: list[list[float]]
) -> None:
    """One rank → two of ZeRO, because its passes are slow → stopped → one process."""
    slow = Faults(tmp_path).at("learner*", "step.forward").do(delay(0.3), times=300)
    even = {"num_workers": 1, "max_workers": 2, "cpus_per_worker": 0.5, "spare": False}
    bounds = {"max_ranks": 2, "cpus_per_rank": 0.5, "spread": "zero2"}
    rl = ONE | {"fleet": even, "learner": bounds}
    with nothing_left(Run(tmp_path, tiny_model, rl=rl, faults=slow)) as run:
        wait_until(lambda: run.version >= 1, BUSY, "step 1", run.process)
        wait_until(lambda: bool(run.events("share")), BUSY, "another share", run.process)
        (event,) = run.events("share")
        before = run.version
        wait_until(lambda: run.version > before, BUSY, "a step of two ranks", run.process)
        assert event["cause"] == "from 1 to 2 learner ranks" and event["workers"] == 1
        assert not run.restarts(), "nothing was lost for it"
        run.process.terminate()
        output = run.finish()
        assert "continue it with --resume" in output, output
        assert run.version < STEPS
        recipe = run.directory / "recipe.yaml"
        recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {"rl": ONE}))
        run.start("--resume")
        output = run.finish()
        assert run.process.returncode == 0, output
    for got, want in zip(numbers(run.stage), alone, strict=True):
        assert got == pytest.approx(want, rel=SAME, abs=SAME)
    assert (tmp_path / "run" / "log" / "rl.learner.rank1.log").is_file(), "brought home"


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    """Two nodes, of which the second sees nothing of the test's files and of our code."""
    with two_nodes(hidden=[tmp_path, *HIDDEN]) as nodes:
        yield nodes


def titles(nodes: Nodes) -> str:
    """What runs on both nodes; Ray's actors have their class as their title."""
    found = list[str]()
    for node in (nodes.head, nodes.other):
        assert node
        for process in psutil.Process(node.pid).children(recursive=True):
            with suppress(psutil.Error):
                found += process.cmdline()[:1]
    return " ".join(found)


def second_rank(nodes: Nodes) -> psutil.Process:
    """Rank 1's learner, on the second node."""
    assert nodes.other
    (found,) = [
        each
        for each in psutil.Process(nodes.other.pid).children(recursive=True)
        if "rl.learn" in each.cmdline()
    ]
    assert found.environ()["RANK"] == "1"
    return found


@pytest.mark.slow
@pytest.mark.timeout(4 * BUSY)
def test_a_rank_on_another_node_is_lost_then_its_node_and_the_numbers_stay_those_of_one_process(
    tmp_path: Path, tiny_model: Path, nodes: Nodes, alone: list[list[float]]
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    work = project(tmp_path / "work", tmp_path / "model", two(room_seconds=120))
    job = Job(work, tmp_path / "runs" / "toy")
    process = job.submit(nodes)
    wait_until(lambda: job.version >= 2, BUSY, "step 2", process)
    running = titles(nodes)
    assert running.count("ray::RayTrainWorker") == 2
    for helper in ("Coordinator", "Cleaner", "DatasetManager", "Preemption"):
        assert helper not in running, "others share it, or it outlives us (rl/ray_train.py)"
    second_rank(nodes).kill()
    wait_until(lambda: len(job.events("restart")) == 1, BUSY, "the next life", process)
    wait_until(lambda: job.version >= 4, BUSY, "step 4", process)
    assert nodes.other
    nodes.end(nodes.other)
    nodes.join()
    nodes.wait_for_other()
    output, _ = process.communicate(timeout=BUSY)
    assert process.returncode == 0, output + nodes.logs()
    job.check_finished(STEPS)
    for got, want in zip(numbers(job.stage), alone, strict=True):
        assert got == pytest.approx(want, rel=SAME, abs=SAME)
