"""A stage's process: its code comes back, signals reach it, nothing of it outlives us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from packtrain.child import Child, exit_name

HANDLER = """\
import signal, sys, time
def save(number, frame):
    open({mark!r}, "w").write(str(number))
    sys.exit(128 + number)
signal.signal(signal.SIGTERM, save); signal.signal(signal.SIGINT, save)
print("ready", flush=True)
time.sleep(60)
"""


def python(code: str) -> list[str]:
    """A command that runs this code."""
    return [sys.executable, "-c", code]


def wait_until(holds: Callable[[], bool], what: str, seconds: float = 15.0) -> None:
    """Poll with a deadline."""
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    """Whether a process has ended (a zombie has)."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize(
    ("code", "wanted"),
    [
        ("pass", 0),
        ("raise SystemExit(5)", 5),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", 139),
    ],
)
def test_the_exit_code_comes_back(code: str, wanted: int) -> None:
    with Child(python(code), {}) as child:
        assert child.wait(lambda: None) == wanted


def test_codes_have_names() -> None:
    assert [exit_name(code) for code in (3, 137, 143)] == ["exit code 3", "SIGKILL", "SIGTERM"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_passed_on_and_the_child_may_save(tmp_path: Path, number: int) -> None:
    mark, output = tmp_path / "mark", tmp_path / "out"
    before = signal.getsignal(number)

    def interrupt() -> None:
        wait_until(lambda: output.exists() and b"ready" in output.read_bytes(), "the child")
        os.kill(os.getpid(), number)

    with Child(python(HANDLER.format(mark=str(mark))), {}, output=output) as child:
        threading.Thread(target=interrupt).start()
        assert child.wait(lambda: None) == 128 + number
        assert child.stopped_by == number
    assert mark.read_text() == str(int(number))
    assert signal.getsignal(number) is before


def test_a_child_that_ignores_the_signal_is_killed_after_the_grace(tmp_path: Path) -> None:
    deaf = HANDLER.replace("signal.SIGTERM, save", "signal.SIGTERM, signal.SIG_IGN")
    output = tmp_path / "out"

    def interrupt() -> None:
        wait_until(lambda: output.exists() and b"ready" in output.read_bytes(), "the child")
        os.kill(os.getpid(), signal.SIGTERM)

    start = time.monotonic()
    with Child(python(deaf.format(mark="")), {}, output=output, grace_seconds=0.3) as child:
        threading.Thread(target=interrupt).start()
        assert child.wait(lambda: None) == 137
    assert time.monotonic() - start < 15


def test_what_the_stage_leaves_behind_is_swept(tmp_path: Path) -> None:
    note = tmp_path / "pid"
    code = (
        "import subprocess, sys\n"
        "left = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        f"open({str(note)!r}, 'w').write(str(left.pid))"
    )
    with Child(python(code), {}) as child:
        assert child.wait(lambda: None) == 0
    wait_until(lambda: is_gone(int(note.read_text())), "the grandchild's end")


def test_the_child_gets_sigterm_when_we_are_killed(tmp_path: Path) -> None:
    mark, note = tmp_path / "mark", tmp_path / "pid"
    parent = (
        "from packtrain.child import Child\n"
        f"with Child({python(HANDLER.format(mark=str(mark)))!r}, {{}}) as child:\n"
        f"    open({str(note)!r}, 'w').write(str(child.process.pid))\n"
        "    child.wait(lambda: None)\n"
    )
    runner = subprocess.Popen(python(parent), stdout=subprocess.PIPE)
    try:
        assert runner.stdout is not None
        assert runner.stdout.readline() == b"ready\n"
        wait_until(lambda: note.exists() and note.read_text() != "", "the child's pid")
        runner.kill()
        wait_until(lambda: is_gone(int(note.read_text())), "the child's end")
        assert mark.read_text() == str(int(signal.SIGTERM))
    finally:
        runner.kill()
        runner.communicate()
