"""What a start of a run leaves behind when even its reaper is killed, and who ends it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from rl_runs import wait_until

from ground.exits import pid_space

START = """
import subprocess, sys, time
from psutil import Process
from pathlib import Path
from rollout.processes import reserved

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
with reserved(Path(sys.argv[1])) as ours:
    if sys.argv[2] == "work":
        marked = subprocess.Popen(SLEEP, start_new_session=True)
        with (ours.folder / "open").open("w") as file:  # as Ray's workers: the mark is overwritten
            titled = subprocess.Popen(SLEEP, start_new_session=True, env={}, stdout=file)
        (reaper,) = [p for p in Process().children() if "rollout.reaper" in p.cmdline()]
        print(reaper.pid, marked.pid, titled.pid, ours.folder, flush=True)
        time.sleep(600)
print("done")
"""


def start(record: Path, what: str) -> subprocess.Popen[str]:
    line = [sys.executable, "-c", START, str(record), what]
    return subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def left_behind(record: Path) -> tuple[list[psutil.Process], Path]:
    """A start that is killed together with its reaper, both at one moment."""
    process = start(record, "work")
    assert process.stdout
    *pids, folder = process.stdout.readline().split()
    reaper, *orphans = [psutil.Process(int(pid)) for pid in pids]
    reaper.send_signal(signal.SIGSTOP)
    for victim in (process.pid, reaper.pid):
        os.kill(victim, signal.SIGKILL)
    process.wait()  # its pipes live on with the orphans
    assert all(orphan.is_running() for orphan in orphans) and Path(folder, "token").exists()
    return orphans, Path(folder)


def test_the_next_start_of_the_same_run_ends_what_is_left_and_only_that(tmp_path: Path) -> None:
    """#39"""
    orphans, folder = left_behind(tmp_path / "mine.json")
    others, other_folder = left_behind(tmp_path / "theirs.json")
    output, error = start(tmp_path / "mine.json", "nothing").communicate(timeout=60)
    assert output == "done\n" and "an earlier start of this run had left" in error
    wait_until(lambda: not any(map(lives, orphans)), 10, "end of the orphans")
    assert not folder.exists() and not (tmp_path / "mine.json").exists()
    assert all(map(lives, others)) and other_folder.exists()
    start(tmp_path / "theirs.json", "nothing").communicate(timeout=60)
    assert not other_folder.exists()


@pytest.mark.parametrize(
    "changed", [{"host": "elsewhere"}, {"folder": "{folder}"}], ids=["host", "folder"]
)
def test_what_another_machine_has_left_is_not_ours_to_end(
    tmp_path: Path, changed: dict[str, str]
) -> None:
    """#39: nor is a folder that we have not made, whatever the record says."""
    (tmp_path / "precious").mkdir()
    record = {"mark": "0", "folder": str(tmp_path / "packtrain-x"), "host": pid_space()}
    (tmp_path / "packtrain-x").mkdir()
    changed = {key: text.format(folder=tmp_path / "precious") for key, text in changed.items()}
    (tmp_path / "record.json").write_text(json.dumps(record | changed))
    output, _ = start(tmp_path / "record.json", "nothing").communicate(timeout=60)
    assert output == "done\n"
    assert (tmp_path / "precious").exists() and (tmp_path / "packtrain-x").exists()


def lives(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
