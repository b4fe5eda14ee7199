"""sft and dpo under `accelerate launch` on two ranks: the curve of one, and what survives."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from launching import (
    KINDS,
    RECIPES,
    environment,
    launch_file,
    launch_line,
    ranks_of,
    run_launch,
    started,
)
from safetensors.torch import load_file
from test_dpo_stage import finish_rl

from ground.checkpoints import Checkpoints
from ground.metrics import read_metrics
from ground.run import RunDir
from ground.storage import verify_directory

pytestmark = [pytest.mark.launch, pytest.mark.timeout(900)]

TRAINER = """
    learning_rate: 3e-3
    rows_per_step: 8
    rows_per_pass: 2
    max_steps: {steps}
    log_every: 1
    save_every: 3
"""
RECIPE = """
name: sums
seed: 3
model: {{path: {model}}}
data: {{sft: sft.jsonl}}
sft:
  max_length: 100
  trainer: {trainer}
dpo:
  max_length: 100
  pairs: {{min_pairs: 4, max_wrong_share: 1}}
  gate: {{max_kl: 50, max_chosen_fall: 50}}
  trainer: {trainer}
"""
STEPS = 24


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Path:
    """19 sums, so that no pass over them ends with a step."""
    with (tmp_path / "sft.jsonl").open("w") as file:
        for n in range(10, 29):
            question = {"role": "user", "content": f"{n}+{n}="}
            answer = {"role": "assistant", "content": str(2 * n)}
            file.write(json.dumps({"messages": [question, answer]}) + "\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny_model, trainer=TRAINER.format(steps=STEPS)))
    return path


def alone(stage: str, recipe: Path, run: Path) -> None:
    line = [sys.executable, "-m", f"{stage}.train", str(recipe), "--run", str(run)]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr


def losses(run: Path, stage: str) -> list[float]:
    records = read_metrics(run / stage / "metrics.jsonl")
    return [float(str(record["loss"])) for record in records if "loss" in record]


def check_same(one: Path, two: Path, stage: str) -> None:
    """The curve to 1e-4, and a whole model of safetensors that is no further away."""
    assert len(losses(one, stage)) == STEPS
    assert losses(two, stage) == pytest.approx(losses(one, stage), abs=1e-4)
    verify_directory(two / stage / "model")
    got, want = (load_file(run / stage / "model" / "model.safetensors") for run in (two, one))
    assert got.keys() == want.keys()
    assert max(float((got[name] - want[name]).abs().max()) for name in want) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_make_the_sft_of_one_process(recipe: Path, tmp_path: Path, kind: str) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone("sft", recipe, one)
    code, output = run_launch(
        launch_file(kind, tmp_path), "sft.train", str(recipe), "--run", str(two)
    )
    assert code == 0, output
    check_same(one, two, "sft")


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_make_the_dpo_of_one_process(
    recipe: Path, tmp_path: Path, tiny_model: Path, kind: str
) -> None:
    finish_rl(recipe, tiny_model, 19)
    one, two = tmp_path / "run", tmp_path / "two"
    subprocess.run(["cp", "-r", str(one), str(two)], check=True)
    alone("dpo", recipe, one)
    code, output = run_launch(
        launch_file(kind, tmp_path), "dpo.train", str(recipe), "--run", str(two)
    )
    assert code == 0, output
    check_same(one, two, "dpo")
    facts = [RunDir(run).manifest("dpo").facts["summary"] for run in (one, two)]
    gates = [fact["gate"] for fact in facts if isinstance(fact, dict)]
    assert gates[1] == pytest.approx(gates[0], abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("victims", [(0, 1), (1,)], ids=["all", "one"])
def test_a_launch_whose_ranks_were_killed_goes_on_to_the_same_end(
    recipe: Path, tmp_path: Path, kind: str, victims: Sequence[int]
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    alone("sft", recipe, one)
    kill_and_go_on("sft", recipe, two, launch_file(kind, tmp_path), victims)
    check_same(one, two, "sft")


@pytest.mark.parametrize("kind", KINDS)
def test_a_dpo_launch_with_a_killed_rank_goes_on_to_the_same_end(
    recipe: Path, tmp_path: Path, tiny_model: Path, kind: str
) -> None:
    finish_rl(recipe, tiny_model, 19)
    one, two = tmp_path / "run", tmp_path / "two"
    subprocess.run(["cp", "-r", str(one), str(two)], check=True)
    alone("dpo", recipe, one)
    kill_and_go_on("dpo", recipe, two, launch_file(kind, tmp_path), (1,))
    check_same(one, two, "dpo")


def kill_and_go_on(stage: str, recipe: Path, run: Path, file: Path, victims: Sequence[int]) -> None:
    """Launch a stage, kill ranks once a checkpoint is there, and launch it again."""
    with started(launch_line(file, f"{stage}.train", str(recipe), "--run", str(run))) as process:
        wait_for_checkpoint(run, process, stage)
        for rank, each in enumerate(ranks_of(process)):
            if rank in victims:
                os.kill(each.pid, signal.SIGKILL)
        process.wait(timeout=60)
    assert not RunDir(run).is_done(stage), "it was killed too late to prove anything"
    code, output = run_launch(file, f"{stage}.train", str(recipe), "--run", str(run), "--resume")
    assert code == 0, output


def test_a_terminated_launch_saves_once_and_goes_on(recipe: Path, tmp_path: Path) -> None:
    """The launcher tells every rank, each at its own time: they stop after the same step."""
    recipe.write_text(recipe.read_text().replace(f"max_steps: {STEPS}", "max_steps: 2000"))
    two = tmp_path / "two"
    with started(
        launch_line(RECIPES / "ddp.yaml", "sft.train", str(recipe), "--run", str(two))
    ) as p:
        wait_for_checkpoint(two, p, "sft")
        p.send_signal(signal.SIGTERM)
        output, _ = p.communicate(timeout=60)
    assert "sft was interrupted (SIGTERM); continue it with --resume" in output, output
    *_, latest = Checkpoints(two / "sft" / "checkpoints").steps()
    verify_directory(latest)
    assert int(latest.name.removeprefix("step_")) == len(losses(two, "sft"))


def test_a_signal_to_one_rank_alone_stops_all_and_finishes_nothing(
    recipe: Path, tmp_path: Path
) -> None:
    recipe.write_text(recipe.read_text().replace(f"max_steps: {STEPS}", "max_steps: 2000"))
    two = tmp_path / "two"
    with started(
        launch_line(RECIPES / "ddp.yaml", "sft.train", str(recipe), "--run", str(two))
    ) as p:
        wait_for_checkpoint(two, p, "sft")
        ranks_of(p)[1].send_signal(signal.SIGTERM)
        output, _ = p.communicate(timeout=60)
    assert "sft was interrupted (SIGTERM); continue it with --resume" in output, output
    assert not RunDir(two).is_done("sft") and not (two / "sft" / "model").exists()
    *_, latest = Checkpoints(two / "sft" / "checkpoints").steps()
    assert int(latest.name.removeprefix("step_")) == len(losses(two, "sft"))


def test_a_zero_checkpoint_is_not_taken_for_another_number_of_ranks(
    recipe: Path, tmp_path: Path
) -> None:
    pytest.importorskip("deepspeed")
    two = tmp_path / "two"
    file = launch_file("zero2", tmp_path)
    with started(launch_line(file, "sft.train", str(recipe), "--run", str(two))) as process:
        wait_for_checkpoint(two, process, "sft")
        for each in ranks_of(process):
            each.kill()
        process.wait(timeout=60)
    line = [sys.executable, "-m", "sft.train", str(recipe), "--run", str(two), "--resume"]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 3 and "layout zero2 on 2 ranks instead of whole" in done.stderr


def test_fsdp2_on_a_cpu_is_refused_by_name(recipe: Path, tmp_path: Path) -> None:
    arguments = [str(recipe), "--run", str(tmp_path / "two")]
    code, output = run_launch(RECIPES / "fsdp2.yaml", "sft.train", *arguments)
    assert code == 1 and "FSDP2 needs a GPU" in output and "exitcode  : 4" in output


def test_ranks_that_cannot_share_a_step_are_refused(recipe: Path, tmp_path: Path) -> None:
    recipe.write_text(recipe.read_text().replace("rows_per_step: 8", "rows_per_step: 7"))
    recipe.write_text(recipe.read_text().replace("rows_per_pass: 2", "rows_per_pass: 7"))
    arguments = [str(recipe), "--run", str(tmp_path / "two")]
    code, output = run_launch(RECIPES / "ddp.yaml", "sft.train", *arguments)
    assert code == 1 and "2 ranks cannot share the 7 rows of a step" in output


def wait_for_checkpoint(run: Path, process: subprocess.Popen[str], stage: str) -> None:
    """Until the first checkpoint lies there."""
    deadline = time.monotonic() + 180
    while not Checkpoints(run / stage / "checkpoints").steps():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, "no checkpoint"
        time.sleep(0.005)
