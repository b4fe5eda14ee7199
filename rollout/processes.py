"""Our processes, found by two signs, so that none can outlive the stage, whatever ends it.

    reserved: folder, token, mark, reaper → processes come and go, `sweep` between → reaped
        └── reaper killed as well: the record in the run's folder tells its next start whom to end

Signs: a mark in the environment, and open files in the stage's own folder for Ray. The second is
needed because Ray's workers and agents overwrite their environment with their title.
"""

from __future__ import annotations

import json
import logging
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from ground.exits import pid_space
from ground.storage import write_file
from rollout.descendants import end_tree

ADDRESS = "RAY_ADDRESS"
"""Ray's own variable: where the cluster is that we belong to."""
MARK = "PACKTRAIN_LOOP"
"""Variable by which processes of one start of the loop know each other."""
_FOLDER = "packtrain-"
_REAP_SECONDS = 15.0
_LONGEST_PLACE = 30
"""Ray adds some 75 characters of its own to a socket's path."""

logger = logging.getLogger("packtrain")


@dataclass(frozen=True, slots=True)
class Reserved:
    """Where Ray may put its files, and how our processes are told from others.

    Example:
        with reserved(record) as ours: ray.init(_temp_dir=str(ours.folder)); …; ours.sweep()
    """

    folder: Path
    """Short, because Ray puts sockets into it (107 characters at most)."""
    mark: str

    def sweep(self) -> int:
        """Kill every process that was started since, and whatever those started."""
        return end_all(f"{MARK}={self.mark}", self.folder, spare=os.getpid())


@contextmanager
def reserved(record: Path) -> Iterator[Reserved]:
    """Mark all processes to come, and have a reaper end them even if this one is killed.

    Enter it before Ray is imported: Ray reads RAY_AUTH_MODE when it is loaded.

    Args:
        record: a file of the run, whose lock we hold: what an earlier start has written there,
            it has left behind.
    """
    _end_leftovers(record)
    usual = tempfile.gettempdir()
    place = usual if len(usual) <= _LONGEST_PLACE else "/tmp"
    folder = Path(tempfile.mkdtemp(prefix=_FOLDER, dir=place))
    mark, token = secrets.token_hex(8), folder / "token"
    token.touch(mode=0o600)
    token.write_text(secrets.token_hex(32))
    left = {"mark": mark, "folder": str(folder), "host": pid_space()}
    write_file(record, json.dumps(left) + "\n")
    reaper = subprocess.Popen(
        [sys.executable, "-m", "rollout.reaper", f"{MARK}={mark}", str(folder), str(os.getpid())],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    os.environ.update({MARK: mark, "RAY_USAGE_STATS_ENABLED": "0"})
    if not cluster_address():  # a cluster that we join has a token of its own
        os.environ.update({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)})
    try:
        yield Reserved(folder, mark)
    finally:
        if reaper.stdin:
            reaper.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            reaper.wait(_REAP_SECONDS)
        record.unlink(missing_ok=True)


def cluster_address() -> str:
    """Of the cluster that we were started in, as a Ray job is; empty if we start our own."""
    address = os.environ.get(ADDRESS, "")
    return "" if address == "local" else address


def end_all(mark: str, folder: Path, *, spare: int) -> int:
    """Kill what carries the mark or has a file open in the folder; returns how many there were.

    Args:
        spare: the process that all this belongs to; Ray leaves files of its own open in it.
    """
    ended = end_tree(None, mark)
    for pid in _with_files_in(folder) - {spare}:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
            ended += 1
    return ended


def _end_leftovers(record: Path) -> None:
    """End what carries the mark of an earlier start of this run on this machine, nothing else."""
    with suppress(FileNotFoundError):
        left = json.loads(record.read_text())
        folder = Path(left["folder"])
        if left["host"] != pid_space() or not folder.name.startswith(_FOLDER):
            return
        ended = end_all(f"{MARK}={left['mark']}", folder, spare=os.getpid())
        shutil.rmtree(folder, ignore_errors=True)
        if ended:
            logger.warning("processes that an earlier start of this run had left were ended")


def _with_files_in(folder: Path) -> set[int]:
    inside = f"{folder}{os.sep}"
    found: set[int] = set()
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(file.path.startswith(inside) for file in process.open_files()):
                found.add(process.pid)
    return found
