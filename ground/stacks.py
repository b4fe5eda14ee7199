"""Where every process of a run stands, also of one that hangs with the interpreter's lock held.

    offer(role) in each process ─▶ a file of its own ◀─ its stacks, at SIGUSR1 ◀─ collect() in one

The signal is answered by C code (faulthandler), so a native deadlock answers too; a stopped process
answers once it is continued.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from contextlib import suppress
from pathlib import Path

import psutil

VARIABLE = "PACKTRAIN_STACKS"
"""Folder of the files; inherited by all processes of a run."""

_SIGNAL = signal.SIGUSR1


def offer(role: str) -> None:
    """Write this process's stacks into a file whenever somebody collects.

    Nothing without a folder, or where the run cannot be seen.

    The file's first line tells the process: `learner 4711 1763730384.1` (role, pid, born).
    """
    folder = os.environ.get(VARIABLE)
    if not folder or not Path(folder).parent.is_dir():
        return
    Path(folder).mkdir(exist_ok=True)
    path = Path(folder) / f"{role.replace('/', '-')}.{os.getpid()}.txt"
    file = path.open("w")
    file.write(f"{role} {os.getpid()} {psutil.Process().create_time()}\n")
    file.flush()
    # The handler keeps the file open for good.
    faulthandler.register(_SIGNAL, file=file, all_threads=True, chain=False)


def collect(folder: Path) -> list[str]:
    """Ask every living process with a file in the folder; returns their roles."""
    asked: list[str] = []
    for path in sorted(folder.glob("*.txt")):
        with suppress(OSError, ValueError, psutil.Error):
            role, pid, born = path.open().readline().split()
            if psutil.pid_exists(int(pid)) and psutil.Process(int(pid)).create_time() == float(
                born
            ):
                os.kill(int(pid), _SIGNAL)
                asked.append(role)
    return asked
