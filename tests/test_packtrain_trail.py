"""The whole tiny trail, cut short, through the command: real Ray, real TRL, real kills."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from packtrain.status import read_status

ROOT = Path(__file__).parents[1]
RECIPE = ROOT / "recipes" / "tiny" / "recipe.yaml"
SHORT = (
    *("herd.demonstrations_per_level=8", "herd.prompts_per_level=8", "herd.heldout_per_level=2"),
    *("mine.samples=4", "mine.k=[1,4]", "rl.steps=4", "rl.groups_per_step=8", "rl.group_size=4"),
    *("rl.checkpoint_every=1", "rl.validation.prompts=8", "dpo.pairs.min_pairs=1"),
    *("evaluate.samples=4", "evaluate.k=[1,4]", "evaluate.greedy=false", "evaluate.max_prompts=20"),
)
MAIN = "import sys; from packtrain.cli import main; sys.exit(main())"
SECONDS = 900

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


def line(folder: Path, *flags: str) -> list[str]:
    """`packtrain run` on the short trail."""
    run = ["run", str(RECIPE), *SHORT, "--run", str(folder / "run"), *flags]
    return [sys.executable, "-c", MAIN, *run]


def states(run: Path) -> dict[str, str]:
    """Stage → state, as another shell sees it."""
    command = [sys.executable, "-c", MAIN, "status", str(run), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    return {name: stage["state"] for name, stage in json.loads(done.stdout)["stages"].items()}


def wait_until(holds: Callable[[], bool], command: subprocess.Popen[bytes], what: str) -> None:
    """Poll until something holds; the command must not end before."""
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert command.poll() is None, f"the command ended before {what}"
        assert time.monotonic() < deadline, f"waited {SECONDS} s for {what}"
        time.sleep(0.1)


def processes_of(run: Path) -> list[psutil.Process]:
    """Everything alive that has this run on its command line."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if process.pid != os.getpid() and any(str(run) in word for word in words):
            found.append(process)
    return found


def test_the_trail_survives_a_kill_of_the_whole_command(tmp_path: Path) -> None:
    run = tmp_path / "run"
    log = (tmp_path / "log").open("wb")
    progress = run / "rl" / "progress.json"
    with subprocess.Popen(line(tmp_path), cwd=tmp_path, stdout=log, stderr=log) as command:
        wait_until(progress.exists, command, "the first step of RL")
        stages = {stage.name: stage.state for stage in read_status(run).stages}
        assert stages["rl"] == "running", "nobody may start a process to see it: RL would be done"
        command.send_signal(signal.SIGKILL)
    refused = subprocess.run(line(tmp_path), cwd=tmp_path, capture_output=True, text=True)
    assert refused.returncode == 4
    assert "half finished" in refused.stderr and "--resume" in refused.stderr
    launcher = ROOT / "recipes" / "accelerate" / "cpu.yaml"
    again = line(tmp_path, "--resume", "--accelerate", str(launcher))
    done = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "accelerate launch --config_file" in done.stdout
    assert set(states(run).values()) == {"done"}
    assert "pass@1 by capability" in (run / "report.html").read_text()
    third = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS)
    assert third.returncode == 0
    assert "nothing to do: all 13 steps" in third.stdout
    assert processes_of(run) == []


def test_following_each_printed_fix_leads_on(tmp_path: Path) -> None:
    """One's own model of 512 positions, with the default of sft.max_length, which is too long."""
    student = ROOT / "recipes" / "tiny" / "herd" / "student"
    rows = [{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(10, 18)]
    (tmp_path / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        f"name: mine\nmodel: {{path: {student}}}\ndata: {{sft: sft.jsonl}}\n"
        "sft: {trainer: {max_steps: 1, rows_per_step: 4, rows_per_pass: 4}}\n"
    )

    def packtrain(*words: str) -> tuple[int, str]:
        line = [sys.executable, "-c", MAIN, *words]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=SECONDS)
        return done.returncode, done.stderr

    code, said = packtrain("run", "mine.yaml")
    assert code == 2 and "fix: set sft.max_length to 512" in said
    assert "then packtrain run mine.yaml --resume" in said
    assert packtrain("run", "mine.yaml", "sft.max_length=512", "--resume")[0] == 0
    code, said = packtrain("run", "mine.yaml", "sft.max_length=512", "seed=1")
    assert code == 4 and "stage sft is finished, with other settings (changed: seed)" in said
    printed = next(line for line in said.splitlines() if "--from sft" in line)
    words = shlex.split(printed)
    assert words == [
        *("packtrain", "run", "mine.yaml", "sft.max_length=512", "seed=1"),
        *("--from", "sft"),
    ]
    assert packtrain(*words[1:])[0] == 0
    assert packtrain("run", "mine.yaml", "sft.max_length=512", "seed=1")[0] == 0
