"""The loop as a job of a Ray cluster of several machines, which see different files."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest
from ray_nodes import Nodes, two_nodes
from rl_runs import RL, STEPS, write_project

from ground.metrics import read_metrics
from ground.storage import verify_directory
from rl.journal import read_journal
from rl.ledger import audit_ledger

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[1]
PACKAGES = ("ground", "rollout", "curation", "sft", "dpo", "rl", "packtrain", "recipes")
TWO = RL | {"fleet": {"num_workers": 2, "spare": False, "backoff_seconds": 0.1}}


def project(folder: Path, model: Path) -> Path:
    """A working directory with all that the job needs, packtrain's own code included."""
    folder.mkdir()
    for name in PACKAGES:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    write_project(folder, model, rl=TWO)
    return folder


def check_finished(stage: Path) -> Counter[str]:
    """All that a finished stage promises; returns how many groups each worker made."""
    summary = verify_directory(stage).facts["summary"]
    verify_directory(stage / "model")
    totals = audit_ledger(read_journal(stage / "ledger.jsonl"))
    assert isinstance(summary, dict) and totals == summary["audited"]
    steps = [r["step"] for r in read_metrics(stage / "metrics.jsonl") if "loss" in r]
    assert steps == list(range(1, STEPS + 1))
    events = read_journal(stage / "events.jsonl")
    return Counter(str(event["role"]) for event in events if event["kind"] == "rollout")


def test_code_model_and_rewards_travel_to_a_node_that_sees_none_of_them(
    tmp_path: Path, tiny_model: Path
) -> None:
    run, model = tmp_path / "runs", tmp_path / "model"
    shutil.copytree(tiny_model, model)
    work = project(tmp_path / "work", model)
    run.mkdir()
    with two_nodes(hidden=[tmp_path, *(ROOT / name for name in PACKAGES)]) as nodes:
        line = ["python", "-m", "rl.train", "recipe.yaml", "--run", str(run / "toy")]
        job = nodes.submit(work, line)
        output, _ = job.communicate(timeout=300)
        assert job.returncode == 0, output + nodes.logs()
    groups = check_finished(run / "toy" / "rl")
    assert min(groups["worker 0"], groups["worker 1"]) > STEPS, groups


def test_a_cluster_that_asks_for_no_token_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    work = project(tmp_path / "work", tiny_model)
    nodes = Nodes(token=False)
    try:
        nodes.wait_for_head()
        nodes.wait_for_jobs()
        line = ["python", "-m", "rl.train", "recipe.yaml", "--run", str(tmp_path / "toy")]
        job = nodes.submit(work, line)
        output, _ = job.communicate(timeout=120)
    finally:
        nodes.close()
    assert job.returncode != 0
    assert "must ask for a token" in output and "RAY_AUTH_MODE=token" in output
