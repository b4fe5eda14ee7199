"""Runs of the `rl` stage as processes of their own, for tests that break them, and what is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from benchmarks.processes import EARLY
from ground.faults import Faults
from ground.metrics import read_metrics
from ground.storage import verify_directory
from rl.journal import read_journal
from rl.ledger import audit_ledger

MORE = '''
@reward("first")
def first(prompts, completions, **columns):
    """Whether the first letter is in the first half of the alphabet: many groups are flat."""
    return [float(completion[-1]["content"][:1] < "n") for completion in completions]

@reward("same")
def same(prompts, completions, **columns):
    """Whatever is said is right."""
    return [1.0] * len(completions)
'''
STEPS = 12
RL: dict[str, object] = {
    "steps": STEPS,
    "groups_per_step": 4,
    "group_size": 4,
    "max_refills": 1,
    "sampling": {"max_new_tokens": 40},
    "engine": {"num_slots": 8, "max_length": 128},
    "optimizer": {"learning_rate": 1e-3},
    "validation": {"prompts": 4, "samples": 1, "evaluate_every": 6},
    "checkpoint_every": 2,
    "fleet": {"backoff_seconds": 0.1, "spare": False},
    "silent_seconds": 20,
}


class Run:
    """A run of the `rl` stage on the tiny model, as a process of its own."""

    def __init__(
        self,
        directory: Path,
        model: Path,
        reward: str = "early",
        *,
        faults: Faults | None = None,
        rl: Mapping[str, object] | None = None,
        launcher: Path | None = None,
        teacher: Path | None = None,
    ) -> None:
        self.faults, self.launcher = faults, launcher
        self.directory, self.stage = directory, directory / "run" / "rl"
        self.place = Path(tempfile.mkdtemp(prefix="rl-", dir="/tmp"))
        self.rl = RL | dict(rl or {})
        write_project(directory, model, reward, self.rl, teacher)
        self.shared, self.own = _shared_memory(), set[str]()
        self._is_over = threading.Event()
        threading.Thread(target=self._watch_shared_memory, name="shm watch", daemon=True).start()
        self.process = self.start()

    def start(self, *flags: str) -> subprocess.Popen[str]:
        arguments = [str(self.directory / "recipe.yaml"), "--run", str(self.directory / "run")]
        launcher = (
            ["-m", "accelerate.commands.launch", "--config_file", str(self.launcher)]
            if self.launcher
            else []
        )
        self.process = subprocess.Popen(
            [sys.executable, *launcher, "-m", "rl.train", *arguments, *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            env=os.environ
            | {"OMP_NUM_THREADS": "1", "TMPDIR": str(self.place)}
            | (self.faults.environment() if self.faults else {}),
        )
        return self.process

    def wait_for_step(self, step: int) -> None:
        wait_until(lambda: self.version >= step, 240, f"step {step}", self.process)

    def finish(self) -> str:
        output, _ = self.process.communicate(timeout=300)
        return output

    @property
    def version(self) -> int:
        records = read_metrics(self.stage / "metrics.jsonl")
        return max((int(str(record["step"])) for record in records), default=0)

    def below(self, title: str) -> list[psutil.Process]:
        """Living processes of the run whose command line holds a title."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with suppress(psutil.Error):
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def check_finished(self) -> dict[str, object]:
        """Everything that a finished stage promises."""
        facts = verify_directory(self.stage).facts
        verify_directory(self.stage / "model")
        summary = facts["summary"]
        assert isinstance(summary, dict)
        totals = audit_ledger(read_journal(self.stage / "ledger.jsonl"))
        assert totals == summary["audited"]
        paths = sorted((self.stage / "groups").glob("step_*.parquet"))
        assert len(paths) == STEPS
        rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
        trained = [row["id"] for row in rows if row["state"] == "trained"]
        assert len(trained) == len(set(trained)) == totals["trained"]
        steps = [r["step"] for r in read_metrics(self.stage / "metrics.jsonl") if "loss" in r]
        assert steps == list(range(1, STEPS + 1))
        return summary

    def left(self) -> list[str]:
        """Processes (and with them their ports), folders and shared memory that are still there."""
        found = [str(path) for path in self.place.glob("packtrain-*")]
        self._look_at_shared_memory()
        found += sorted(self.own & _shared_memory())
        for process in self._processes():
            with suppress(psutil.Error):  # it ended while we looked
                found.append(f"{process.pid} {process.cmdline()}")
        return found

    def _processes(self) -> list[psutil.Process]:
        """Those of this run, by their temporary folder."""
        found = list[psutil.Process]()
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                files = [file.path for file in process.open_files()]
                is_ours = process.environ().get("TMPDIR") == str(self.place)
                if is_ours or any(path.startswith(str(self.place)) for path in files):
                    found.append(process)
        return found

    def _watch_shared_memory(self) -> None:
        """Tests that run beside us have files there too, and of one that is left behind nobody can
        tell any more whose it was."""
        while not self._is_over.wait(0.5):
            self._look_at_shared_memory()

    def _look_at_shared_memory(self) -> None:
        if _shared_memory() - self.shared - self.own:
            self.own |= in_use(self._processes()) - self.shared

    def check_nothing_is_left(self) -> None:
        wait_until(lambda: not self.left(), 10, f"end of what is left: {self.left()}")

    def end_watch(self) -> None:
        """The run is over; nobody looks at shared memory any more."""
        self._is_over.set()

    def restarts(self) -> list[str]:
        """Why whole lives of the loop were lost."""
        return [str(e["cause"]) for e in self.events("restart") if e["role"] == "supervisor"]

    def log(self) -> str:
        """What all processes have logged."""
        return "".join(path.read_text() for path in (self.directory / "run" / "log").glob("*.log"))

    def events(self, kind: str) -> list[dict[str, object]]:
        return [r for r in read_journal(self.stage / "events.jsonl") if r["kind"] == kind]


def write_project(
    directory: Path,
    model: Path,
    reward: str = "early",
    rl: Mapping[str, object] = RL,
    teacher: Path | None = None,
) -> None:
    """What a user has in a folder: recipe, prompts, reward functions."""
    rows = [
        {
            "messages": [{"role": "user", "content": f"letters {number}"}],
            "capability": ("one", "two")[number % 2],
            "reward": reward,
            "answer": "",
        }
        for number in range(64)
    ]
    (directory / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (directory / "rewards.py").write_text(EARLY + MORE)
    recipe = {
        "name": "toy",
        "model": {"path": str(model)},
        "data": {"prompts": "prompts.jsonl"},
        "rewards": ["rewards.py"],
        "rl": dict(rl),
    }
    if teacher:
        recipe["teacher"] = {"path": str(teacher)}
    (directory / "recipe.yaml").write_text(json.dumps(recipe))


def wait_until(
    is_true: Callable[[], bool],
    seconds: float,
    what: str,
    process: subprocess.Popen[Any] | None = None,
) -> None:
    deadline = time.monotonic() + seconds
    while not is_true():
        if process and process.poll() is not None:
            pytest.fail(f"ended before {what}: {process.communicate()[0]}")
        if time.monotonic() > deadline:
            pytest.fail(f"no {what} within {seconds} s")
        time.sleep(0.05)


@contextmanager
def nothing_left(run: Run) -> Iterator[Run]:
    """At the end of the body, however it went, nothing of the run may be left after ten seconds."""
    try:
        yield run
    finally:
        with suppress(ProcessLookupError):
            os.killpg(run.process.pid, signal.SIGKILL)
        run.process.communicate()
        run.check_nothing_is_left()
        run.end_watch()
        for folder in run.place.glob("torch*"):  # what torch's launcher leaves
            shutil.rmtree(folder)
        run.place.rmdir()


def _shared_memory() -> set[str]:
    """Files in shared memory."""
    return {str(path) for path in Path("/dev/shm").glob("*") if path.is_file()}


def in_use(processes: list[psutil.Process]) -> set[str]:
    """Files in shared memory that these processes have open or mapped."""
    found = set[str]()
    for process in processes:
        with suppress(OSError):
            lines = Path(f"/proc/{process.pid}/maps").read_text().splitlines()
            found |= {line[line.index("/dev/shm/") :] for line in lines if "/dev/shm/" in line}
            found |= {os.readlink(file) for file in Path(f"/proc/{process.pid}/fd").iterdir()}
    return {path for path in found if path.startswith("/dev/shm/")}
