"""Status and panel: what a run's files say, also while they are being written."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from dataclasses import asdict
from pathlib import Path

import pytest
from fabricated import fabricate_run
from rich.console import Console

from ground.console import progress
from ground.lock import RunLock
from packtrain.cli import main
from packtrain.loop_view import loop_lines
from packtrain.observe import last_metrics, read_json, read_lines, read_rows
from packtrain.panel import LivePanel, PlainPanel, panel_numbers, shown_line
from packtrain.status import read_status
from packtrain.steps import Step

STEPS = (
    Step("prune", "prune", "curation.prune"),
    Step("evaluate sft", "sft/evaluation", "rollout.evaluate"),
    Step("rl", "rl", "rl.train"),
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole fabricated run; copy it before changing it."""
    return fabricate_run(tmp_path_factory.mktemp("runs") / "made", num_prompts=24)


@pytest.fixture
def half(made: Path, tmp_path: Path) -> Path:
    """A run that is in the middle of RL."""
    run = Path(shutil.copytree(made, tmp_path / "half"))
    shutil.rmtree(run / "dpo")
    shutil.rmtree(run / "rl" / "evaluation")
    (run / "rl" / "manifest.json").unlink()
    progress(run / "rl", 12, 40, reward=0.61)
    return run


def test_a_finished_run_as_json(made: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", str(made), "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert list(content["stages"]) == ["base", "herd", "prune", "sft", "mine", "rl", "dpo"]
    assert {stage["state"] for stage in content["stages"].values()} == {"done"}
    evaluation = json.loads((made / "sft" / "evaluation" / "evaluation.json").read_text())
    assert content["stages"]["sft"]["evaluation"]["pass@1"] == evaluation["pass@1"]
    assert content["lock"] is None


def test_a_run_at_work_shows_who_holds_it_and_how_far_it_is(
    half: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLock.acquire(half):
        assert main(["status", str(half), "--json"]) == 0
        content = json.loads(capsys.readouterr().out)
        assert content["lock"]["pid"] == os.getpid()
        assert content["lock"]["age_seconds"] < 60
        states = {name: stage["state"] for name, stage in content["stages"].items()}
        assert states["sft"] == "done" and states["rl"] == "running" and states["dpo"] == "waiting"
        assert content["stages"]["rl"]["progress"]["step"] == 12
        assert main(["status", str(half)]) == 0
        assert f"held by pid {os.getpid()}" in capsys.readouterr().out


def test_what_was_begun_before_waits_while_the_run_is_at_another_stage(half: Path) -> None:
    (half / "taught").mkdir()
    with RunLock.acquire(half) as lock:
        note = {"pid": lock.holder.pid, "state": "running", "folder": "rl"}
        (half / "runner.json").write_text(json.dumps(note))
        stages = {stage.name: stage.state for stage in read_status(half).stages}
        assert (stages["rl"], stages["taught"]) == ("running", "waiting")
        (half / "runner.json").write_text(json.dumps(note | {"pid": 1, "folder": "sft"}))
        assert {s.name: s.state for s in read_status(half).stages}["rl"] == "running", "by hand"
        (half / "runner.json").write_text(json.dumps(note | {"folder": "taught/evaluation"}))
        assert {s.name: s.state for s in read_status(half).stages}["taught"] == "running"


def test_an_arm_stands_behind_its_stage_as_soon_as_it_is_asked_for(half: Path) -> None:
    recipe = half / "recipe.resolved.yaml"
    recipe.write_text(recipe.read_text().replace("sft: {}", "sft: {distill: {as_arm: true}}"))
    stages = {stage.name: stage.state for stage in read_status(half).stages}
    assert list(stages) == ["base", "herd", "prune", "sft", "taught", "mine", "rl", "dpo"]
    assert stages["taught"] == "waiting"


def test_a_run_that_nobody_holds_has_failed_where_it_stands(half: Path) -> None:
    with RunLock.acquire(half) as lock:
        dead = {**asdict(lock.holder), "born": 0.0}
    (half / "lock.json").write_text(json.dumps(dead))
    stages = {stage.name: stage for stage in read_status(half).stages}
    assert stages["rl"].state == "failed"
    assert stages["rl"].problem == "was interrupted"
    assert stages["dpo"].state == "waiting"


def test_a_damaged_manifest_is_a_failure_that_names_the_file(made: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(made, tmp_path / "damaged"))
    (run / "sft" / "manifest.json").write_text('{"schema": 1, "fil')
    stages = {stage.name: stage for stage in read_status(run).stages}
    assert stages["sft"].state == "failed"
    assert "manifest.json" in stages["sft"].problem
    assert stages["rl"].state == "done"


def test_torn_files_give_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "m.jsonl").write_text('{"step": 1, "x": NaN}\n{"step": 2}\n[1]\n{"step": 3, "lo')
    assert list(read_lines(tmp_path / "m.jsonl")) == [{"step": 1, "x": None}, {"step": 2}]
    (tmp_path / "rl").mkdir()
    (tmp_path / "m.jsonl").rename(tmp_path / "rl" / "metrics.jsonl")
    assert last_metrics(tmp_path, "rl") == {"step": 2}
    (tmp_path / "j.json").write_text('{"a": ')
    (tmp_path / "p.parquet").write_bytes(b"PAR1")
    assert read_json(tmp_path / "j.json") == {} == read_json(tmp_path / "absent")
    assert read_rows(tmp_path / "p.parquet") == [] == read_rows(tmp_path / "absent")


def test_the_live_panel_shows_steps_numbers_and_a_sample(half: Path) -> None:
    console = Console(width=100, record=True, force_terminal=True, file=(half / "screen").open("w"))
    panel = LivePanel(half, STEPS, console)
    try:
        panel.begin(0, ["/x/python", "-m", "curation.prune"])
        panel.end(0, 12.3, 0)
        panel.begin(2, ["/x/python", "-m", "rl.train"])
        console.print(panel.render())
    finally:
        panel.close()
    shown = console.export_text()
    assert "[3/3] python -m rl.train" in shown
    assert "✓  prune" in shown and "12 s" in shown
    assert "pass@1" in shown
    assert "12/40" in shown
    assert "trainer idle 30%" in shown and "entropy 0.5" in shown
    assert "sample 57+68=?7+8=15" in shown


def test_the_plain_panel_writes_a_line_per_step(
    made: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    panel = PlainPanel(made, STEPS)
    panel.begin(1, ["python", "-m", "rollout.evaluate"])
    panel.refresh()
    panel.end(1, 3.21, 0)
    panel.end(2, 4.0, 5)
    score = json.loads((made / "sft" / "evaluation" / "evaluation.json").read_text())["pass@1"]
    assert capsys.readouterr().out.splitlines() == [
        "[2/3] python -m rollout.evaluate",
        f"[2/3] evaluate sft done seconds=3.2 pass@1={score['mean']:.4f}",
        "[3/3] rl failed code=5 seconds=4.0",
    ]


def test_panel_numbers_are_in_the_order_of_importance() -> None:
    metrics = {"flat_share": 0.25, "reward": 0.4567, "unknown": 1.0, "kept_share": None}
    assert panel_numbers(None, metrics) == [("reward", "0.457"), ("flat", "25%")]


def test_the_launcher_is_shown_by_its_own_name() -> None:
    line = [
        "/a/b/python",
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "c",
        "-m",
        "sft.train",
    ]
    assert shown_line(line) == "accelerate launch --config_file c -m sft.train"
    assert shown_line(["/p/python", "mine.k=[1, 4]"]) == "python 'mine.k=[1, 4]'"


def test_status_answers_at_once(made: Path) -> None:
    start = time.monotonic()
    read_status(made)
    assert time.monotonic() - start < 1.0


def test_the_loop_of_rl_is_seen_from_outside(
    half: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = time.time()
    seat = {"state": "healthy", "version": 12, "in_flight": 4, "lives": 1, "cause": ""}
    loop = {
        "time": now - 1, "version": 12, "step": 12, "waits_for": "slot 55 (group a.55)",
        "since": now - 4, "buffered": 3, "in_flight": 5, "learner": "train step 12",
        "controller_silent_seconds": 0.2, "unmoved_seconds": 35,
        "verdicts": {"texts": 90, "reward_timeout": 2, "reward_died": 0},
        "workers": [
            {**seat, "name": "worker 0"},
            {**seat, "name": "worker 1", "state": "suspect", "lives": 3, "cause": "\x1b[31mkilled"},
        ],
    }  # fmt: skip
    (half / "rl" / "loop.json").write_text(json.dumps(loop))
    with RunLock.acquire(half) as lock:
        dead = {**asdict(lock.holder), "born": 0.0}
        assert main(["status", str(half)]) == 0
        shown = capsys.readouterr().out
        assert re.search(
            r"rl: version 12; step 12 waits for slot 55 \(group a\.55\), \d+ s; 3 buffered, 5 in "
            r"flight; verdicts that failed: timeout 2; nothing has moved for 35 s",
            shown,
        )
        assert "  worker 0 healthy, version 12, 4 groups, life 1\n" in shown
        assert "  worker 1 suspect, version 12, 4 groups, life 3; lost before: killed" in shown
        assert main(["status", str(half), "--json"]) == 0
        told = json.loads(capsys.readouterr().out)["loop"]
        assert told["waits_for"] == "slot 55 (group a.55)" and len(told["workers"]) == 2
    (half / "lock.json").write_text(json.dumps(dead))
    assert main(["status", str(half), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loop"] is None
    assert "waits for slot 55 (group a.55), 4 s; 3 buffered" in loop_lines(loop, now)[0]
    assert "as of 61 s ago" in loop_lines({**loop, "time": now - 60}, now + 1)[0]
    assert "the learner is to train step 12" in loop_lines({**loop, "waits_for": ""}, now)[0]
