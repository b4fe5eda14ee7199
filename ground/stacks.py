"""Where every process of a run stands, also of one that hangs with the interpreter's lock held.

    offer(role) in each process ─▶ a file of its own ◀─ its stacks, at SIGUSR1 ◀─ collect() in one

The signal is answered by C code (faulthandler), so a native deadlock answers too; a stopped process
answers once it is continued. A process that dies of a fatal error, such as a segmentation fault,
writes its stacks there unasked.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil

from ground.births import birth

VARIABLE = "PACKTRAIN_STACKS"
"""Folder of the files; inherited by all processes of a run."""

_SIGNAL = signal.SIGUSR1
_POLL_SECONDS = 0.1
"""A file that has not grown for so long is whole."""


def offer(role: str) -> None:
    """Write this process's stacks into a file whenever somebody collects.

    Nothing without a folder, or where the run cannot be seen.

    The file's first line tells the process: `learner 4711 90384.1` (role, pid, born).
    """
    folder = os.environ.get(VARIABLE)
    if not folder or not Path(folder).parent.is_dir():
        return
    Path(folder).mkdir(exist_ok=True)
    path = Path(folder) / f"{role.replace('/', '-')}.{os.getpid()}.txt"
    file = path.open("w")
    file.write(f"{role} {os.getpid()} {birth(os.getpid())}\n")
    file.flush()
    # The handlers keep the file open for good.
    faulthandler.enable(file=file)
    faulthandler.register(_SIGNAL, file=file, all_threads=True, chain=False)


def collect(folder: Path, seconds: float) -> tuple[list[str], list[str]]:
    """Ask every living process with a file in the folder, and wait until all have written.

    Returns:
        The roles of those who have, and of those who have not in so many seconds: stopped ones.
    """
    files = {path: path.stat().st_size for path in sorted(folder.glob("*.txt"))}
    asked = {path: size for path, size in files.items() if _ask(path)}
    sizes, deadline = dict(asked), time.monotonic() + seconds
    while time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        before, sizes = sizes, {path: path.stat().st_size for path in asked}
        if sizes == before and all(sizes[path] > asked[path] for path in asked):
            break
    silent = [path for path in asked if sizes[path] == asked[path]]
    return [_role(path) for path in asked if path not in silent], list(map(_role, silent))


def _ask(path: Path) -> bool:
    """Signal the process of a file; False when it is no more."""
    with suppress(OSError, ValueError, psutil.Error):
        _, pid, born = path.open().readline().split()
        if birth(int(pid)) == float(born):
            os.kill(int(pid), _SIGNAL)
            return True
    return False


def _role(path: Path) -> str:
    return path.open().readline().split()[0]
