"""The loop as a job of a Ray cluster of several machines, which see different files."""

from __future__ import annotations

import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from ray_jobs import HIDDEN, Job, project
from ray_nodes import Nodes, two_nodes
from rl_runs import RL, wait_until

from ground.errors import SetupError
from ground.storage import verify_directory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

STEPS = 120
"""So many that the second node's worker is up long before the end."""
TWO = RL | {
    "steps": STEPS,
    "fleet": {"num_workers": 2, "spare": False, "backoff_seconds": 0.1},
}
ONE = RL | {
    "steps": 500,
    "fleet": {"num_workers": 1, "spare": False, "backoff_seconds": 0.1},
    "validation": {"prompts": 0},
}
"""Goes on for longer than any cluster of a test, and is never owed a look."""


@pytest.fixture
def job(tmp_path: Path, tiny_model: Path) -> Job:
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    return Job(project(tmp_path / "work", model, TWO), tmp_path / "runs" / "toy")


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    """Two nodes, of which the second sees nothing of the test's files and of our code."""
    with two_nodes(hidden=[tmp_path, *HIDDEN]) as nodes:
        yield nodes


def test_code_model_and_rewards_travel_to_a_node_that_sees_none_of_them(
    job: Job, nodes: Nodes
) -> None:
    process = job.submit(nodes)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output + nodes.logs()
    job.check_finished(STEPS)
    groups = job.groups()
    assert groups["worker 0"] and groups["worker 1"], groups


def test_a_node_that_is_killed_takes_its_worker_and_nothing_else(job: Job, nodes: Nodes) -> None:
    process = job.submit(nodes)
    wait_until(lambda: len(job.groups()) == 2, 240, "groups of both workers", process)
    assert nodes.other
    nodes.end(nodes.other)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output + nodes.logs()
    job.check_finished(STEPS)
    (lost,) = job.events("lost")[:1]
    assert lost["role"] in ("worker 0", "worker 1"), lost
    assert [e for e in job.events("restart") if e["role"] == "supervisor"] == []


def test_a_cluster_that_is_lost_is_gone_on_from_in_another(job: Job, nodes: Nodes) -> None:
    process = job.submit(nodes)
    wait_until(lambda: job.version >= 5, 240, "step 5", process)
    nodes.kill_gcs()
    process.communicate(timeout=120)
    assert process.returncode != 0 and job.version < STEPS
    nodes.close()
    told = f":{nodes.port} (RAY_ADDRESS) must answer"
    wait_until(lambda: told in job.log(), 120, "word of what is waited for")
    for left in job.processes():
        left.kill()
    wait_until(lambda: not job.processes(), 30, "end of what the job had started")
    with two_nodes(nodes.hidden) as others:
        process = job.submit(others, "--resume")
        output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    job.check_finished(STEPS)
    assert any(record.get("reason") == "resumed" for record in job.ledger())


@contextmanager
def beside_one_node(
    folder: Path, model: Path
) -> Iterator[tuple[Job, Nodes, subprocess.Popen[str]]]:
    """A run of many steps that has joined a node and made two of them."""
    job = Job(project(folder / "work", model, ONE), folder / "runs" / "toy")
    nodes = Nodes()
    try:
        nodes.wait_for_head()
        process = job.start_beside(nodes)
        wait_until(lambda: job.version >= 2, 240, "step 2", process)
        yield job, nodes, process
    finally:
        nodes.close()


def test_a_run_whose_own_machine_is_taken_away_saves_and_leaves(
    tmp_path: Path, tiny_model: Path
) -> None:
    """#41"""
    with beside_one_node(tmp_path, tiny_model) as (job, nodes, process):
        nodes.drain_head(120)
        output, _ = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "continue it with --resume" in output
    assert "machine that learner and controller are on is taken away" in job.log()
    newest = max((job.stage / "checkpoints").glob("step_*"))
    verify_directory(newest)
    assert int(newest.name.removeprefix("step_")) == job.version
    assert job.ledger()[-1].get("reason") == "interrupted"


def test_the_end_of_a_cluster_that_does_not_come_back_has_its_exit_code(
    tmp_path: Path, tiny_model: Path
) -> None:
    """#30: of a command that Ray does not end with the cluster, as it ends its jobs."""
    with beside_one_node(tmp_path, tiny_model) as (job, nodes, process):
        nodes.end(nodes.head)
        output, _ = process.communicate(timeout=300)
    assert process.returncode == SetupError.exit_code, output
    assert f"{nodes.address} (RAY_ADDRESS) must answer, it failed 5 times in a row" in output
    assert "continue with --resume" in output
    assert not job.processes()


def test_a_cluster_that_asks_for_no_token_is_refused(job: Job) -> None:
    nodes = Nodes(token=False)
    try:
        nodes.wait_for_head()
        nodes.wait_for_jobs()
        process = job.submit(nodes)
        output, _ = process.communicate(timeout=120)
    finally:
        nodes.close()
    assert process.returncode != 0
    assert "must ask for a token" in output and "RAY_AUTH_MODE=token" in output
