"""Find and end the processes that a child left behind, also those that tried to get away.

A daemon forks twice and starts its own session, so neither process group nor parent leads to it.
Two things still do: an environment that it was started with, and, while its ancestor is a
"subreaper", a parent that inherits it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

import psutil

_PR_SET_CHILD_SUBREAPER = 36
_ROUNDS = 50


def adopt_orphans() -> None:
    """Make this process inherit its orphaned descendants instead of init (Linux; else nothing)."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_children() -> int:
    """Kill and reap every descendant of this process; call it after `adopt_orphans`.

    Returns:
        how many there were; a fork bomb that outruns fifty rounds is left to whoever kills us.
    """
    ended = 0
    for _ in range(_ROUNDS):
        pids = _children()
        if not pids:
            break
        for pid in pids:
            ended += _signal(pid, signal.SIGKILL)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)
    return ended


def end_tree(pid: int | None, mark: str) -> int:
    """Kill the process `pid`, its descendants, and whatever carries `mark` in its environment.

    The process itself is stopped first and killed last, so that it can neither fork on nor let
    orphans slip away to init.

    Args:
        pid: None when it has been reaped: its number may be another's by now.
        mark: "NAME=value" that the process was started with, unique to it.
    """
    if pid is not None:
        _signal(pid, signal.SIGSTOP)
    ended = 0
    for _ in range(_ROUNDS):
        others = (_marked(mark) | (_below(pid) if pid is not None else set())) - {pid}
        if not others:
            break
        ended += sum(_signal(other, signal.SIGKILL) for other in others)
    return ended + (_signal(pid, signal.SIGKILL) if pid is not None else 0)


def _marked(mark: str) -> set[int]:
    name, _, value = mark.partition("=")
    found: set[int] = set()
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(name) == value and _lives(process):
                found.add(process.pid)
    return found


def _below(pid: int) -> set[int]:
    found: set[int] = set()
    with contextlib.suppress(psutil.Error):
        for process in psutil.Process(pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if _lives(process):
                    found.add(process.pid)
    return found


def _lives(process: psutil.Process) -> bool:
    return process.status() != psutil.STATUS_ZOMBIE


def _children() -> list[int]:
    """Direct children of this process, dead ones too; the kernel's own list where it has one."""
    try:
        lists = [path.read_text() for path in Path("/proc/self/task").glob("*/children")]
    except OSError:
        lists = []
    if lists:
        return [int(pid) for text in lists for pid in text.split()]
    return [process.pid for process in psutil.Process().children()]


def _signal(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        return False
    return True
