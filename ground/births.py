"""When a process was created, by which it is told from a later one with the same id."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import psutil

_START_FIELD = 22
"""Of /proc/PID/stat, from 1: clock ticks between the machine's start and the process's."""


def birth(pid: int) -> float:
    """Seconds, on Linux since the machine's start: the wall clock may be set meanwhile.

    Raises:
        psutil.Error: there is no such process, or it cannot be seen.
    """
    if sys.platform != "linux":
        return psutil.Process(pid).create_time()
    try:
        # The name in brackets may hold anything, brackets and spaces too.
        rest = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError as error:
        raise psutil.NoSuchProcess(pid) from error
    return int(rest[_START_FIELD - 3]) / os.sysconf("SC_CLK_TCK")
