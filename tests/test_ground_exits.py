"""How processes that are nobody's child here have ended."""

from __future__ import annotations

import asyncio
import os
import platform
import re
import signal
import subprocess
import sys
import time

import pytest

from ground.exits import ExitWatch

GRANDCHILD = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], stdin=subprocess.PIPE)
print(child.pid, flush=True)
sys.stdin.readline()
child.stdin.close()
child.wait()
print("reaped", flush=True)
sys.stdin.readline()
"""


def tells_ends() -> bool:
    """Whether this kernel tells how a process ended that is not our child."""
    release = re.match(r"(\d+)\.(\d+)", platform.release())
    if platform.system() != "Linux" or release is None:
        return False
    return (int(release[1]), int(release[2])) >= (6, 15)


needs_kernel = pytest.mark.skipif(not tells_ends(), reason="Linux tells it since 6.15")


def cause_of(code: str) -> tuple[str, str]:
    """What is told of a grandchild that runs this code: while it lives, and after its end."""
    parent = subprocess.Popen(
        [sys.executable, "-c", GRANDCHILD, f"import os, sys; sys.stdin.read(); {code}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdin and parent.stdout
    watch = ExitWatch(int(parent.stdout.readline()))
    alive = asyncio.run(watch.cause(seconds=0.05))
    parent.stdin.write("go\n")
    parent.stdin.flush()
    ended = asyncio.run(watch.cause(seconds=20))
    parent.stdout.readline()
    assert asyncio.run(watch.cause(seconds=0)) == ended, "it stays known"
    parent.communicate()
    return alive, ended


@needs_kernel
@pytest.mark.parametrize(
    ("code", "cause"),
    [
        ("os.kill(os.getpid(), 9)", "SIGKILL"),
        ("import ctypes; ctypes.string_at(0)", "SIGSEGV"),
        ("os._exit(7)", "exit code 7"),
        ("pass", "exit code 0"),
        (f"os.kill(os.getpid(), {signal.SIGRTMIN + 1})", f"signal {signal.SIGRTMIN + 1}"),
    ],
)
def test_6_a_grandchilds_end_is_told_by_signal_or_exit_code(code: str, cause: str) -> None:
    assert cause_of(code) == ("", cause)


def test_of_a_process_that_is_gone_nothing_is_told_and_nobody_waits() -> None:
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    began = time.monotonic()
    assert asyncio.run(ExitWatch(child.pid).cause(seconds=60)) == ""
    assert time.monotonic() - began < 30


def test_a_watch_keeps_no_file_open_when_it_is_gone() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        ExitWatch(os.getpid())
    assert len(os.listdir("/proc/self/fd")) <= before + 1
