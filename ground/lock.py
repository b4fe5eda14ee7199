"""One run, one writer: a second run into the same directory is refused, with pid, host and age.

    free → held(incarnation n) → released, or freed by the kernel when its last process is gone

The lock is an flock, so `kill -9` of the holder frees it. `packtrain run` hands its token (in the
environment) and the lock's descriptor to the stages it starts: they are let in, and the lock lives
as long as any of them. The incarnation counts acquisitions, so that one can be told from the next.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import socket
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from ground.births import birth
from ground.disk import disk_errors
from ground.errors import SetupError
from ground.storage import write_file

TOKEN = "PACKTRAIN_RUN_TOKEN"
"""Environment variable by which a stage proves that the lock's holder started it."""
GRACE_SECONDS = 60.0
"""How long the processes of a killed holder may take to end before we refuse: an RL stage that is
told to go has its learner, its publication, Ray and what they leave to put away."""
_POLL_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds, or last held, the lock of a run.

    Example:
        Holder(pid=4711, host="node7", started=1763718000.0, incarnation=3, token="9f…", born=…)
    """

    pid: int
    host: str
    started: float
    """Unix seconds; a label, never a deadline."""
    incarnation: int
    token: str
    born: float
    """See `ground.births`; tells the process from a later one with the same pid."""

    @property
    def is_alive(self) -> bool:
        """Whether that very process still runs here; False for another host's, which is unknown."""
        if self.host != socket.gethostname():
            return False
        try:
            return birth(self.pid) == self.born
        except psutil.Error:
            return False


class RunLock:
    """The held lock of a run directory; a context manager.

    Example:
        with RunLock.acquire(Path("runs/tiny")) as lock:
            subprocess.run(command, env=os.environ | lock.environment, pass_fds=[lock.fileno()])
    """

    def __init__(self, holder: Holder, handle: int | None) -> None:
        self.holder = holder
        self._handle = handle

    @classmethod
    def acquire(cls, directory: Path, environment: Mapping[str, str] = os.environ) -> RunLock:
        """Take the lock of `directory`, or be let in by the holder's token.

        Raises:
            SetupError: another run holds it, or the directory cannot be written.
        """
        with disk_errors(directory / "lock"):
            handle = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        try:
            host = _wait_for(handle, directory, environment.get(TOKEN, ""))
            if host is not None:
                os.close(handle)
                return cls(host, None)
            holder = _next_holder(read_holder(directory))
            write_file(directory / "lock.json", json.dumps(asdict(holder)) + "\n")
            return cls(holder, handle)
        except BaseException:
            os.close(handle)
            raise

    @property
    def incarnation(self) -> int:
        """Which acquisition of this run this is, from 1."""
        return self.holder.incarnation

    @property
    def is_guest(self) -> bool:
        """True for a stage that was let in by the token of the process that holds the lock."""
        return self._handle is None

    @property
    def environment(self) -> dict[str, str]:
        """What a child needs in its environment to be let in."""
        return {TOKEN: self.holder.token}

    def fileno(self) -> int:
        """The descriptor, to pass on to a child so that the lock lives as long as it does."""
        if self._handle is None:
            raise ValueError("a guest does not hold the lock")
        return self._handle

    def release(self) -> None:
        """Let the next run in; calling it twice is harmless."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def __enter__(self) -> RunLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


def read_holder(directory: Path) -> Holder | None:
    """Who holds or last held the lock; None when nobody ever did or the note is unreadable."""
    try:
        content = json.loads((directory / "lock.json").read_bytes())
        return Holder(**content)
    except (OSError, ValueError, TypeError):
        return None


def is_held(directory: Path) -> bool:
    """Whether the process that took the lock is still at work (for viewers; takes no lock)."""
    holder = read_holder(directory)
    return holder is not None and holder.is_alive


def _next_holder(before: Holder | None) -> Holder:
    incarnation = before.incarnation + 1 if before else 1
    born = birth(os.getpid())
    token = secrets.token_hex(16)
    return Holder(os.getpid(), socket.gethostname(), time.time(), incarnation, token, born)


def _wait_for(handle: int, directory: Path, token: str) -> Holder | None:
    """None when we hold the lock now; its holder when that one's token lets us in; else SetupError.

    When the holder itself is gone, its children get GRACE_SECONDS to end. The note is read anew
    each time, since another process may win the lock meanwhile.
    """
    deadline = time.monotonic() + GRACE_SECONDS
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return None
        except BlockingIOError:
            holder = read_holder(directory)
        if holder is not None and token and secrets.compare_digest(token, holder.token):
            return holder
        gone = holder is not None and holder.host == socket.gethostname() and not holder.is_alive
        if not gone or time.monotonic() > deadline:
            raise _refusal(directory, holder, gone)
        time.sleep(_POLL_SECONDS)


def _refusal(directory: Path, holder: Holder | None, gone: bool) -> SetupError:
    who = "another process"
    if holder is not None:
        age = _age(time.time() - holder.started)
        who = f"pid {holder.pid} on {holder.host}, started {age} ago"
    if gone:
        left = ", ".join(str(pid) for pid in _users_of(directory / "lock")) or "unknown"
        return SetupError(
            f"the run was held by {who}; that process is gone, its children still run: pid {left}",
            where=str(directory),
            fix=f"end them (kill {left.replace(',', '')}) and try again",
        )
    return SetupError(
        f"the run is held by {who}",
        where=str(directory),
        fix="wait for it, stop it, or choose another directory with --run",
    )


def _users_of(path: Path) -> list[int]:
    """Processes of ours that have `path` open (empty where /proc is not readable)."""
    wanted = str(path.resolve())
    users: list[int] = []
    for process in psutil.process_iter():
        try:
            files = [file.path for file in process.open_files()]
        except psutil.Error:
            continue
        if wanted in files and process.pid != os.getpid():
            users.append(process.pid)
    return users


def _age(seconds: float) -> str:
    """`75` → `1 min`."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{max(int(seconds), 0)} s"
