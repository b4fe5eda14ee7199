"""The boundaries that a machine may offer around model-written code, and how each is entered.

    bubblewrap   namespaces: no network, no other process, a file tree of our making, read-only
    sandlock     Landlock and seccomp: files, network, signals and processes are refused
    none         limits alone, which is no boundary; only where the recipe allows it by name

In each the interpreter gets an empty environment, and limits that it lowers for good before it
sees the program (`rollout.sandbox_guest`).
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, Protocol, cast

from rollout import sandbox_guest
from rollout.sandbox_filter import system_call_filter

Tier = Literal["bubblewrap", "sandlock", "none"]
TIERS: tuple[Tier, ...] = ("bubblewrap", "sandlock")
"""Boundaries from the stronger to the weaker."""
TIER_FIX = (
    "install bubblewrap (apt-get install bubblewrap) or sandlock (pip install sandlock; "
    "needs Linux 6.12 or newer)"
)
_GUEST = Path(sandbox_guest.__file__).read_text()
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
_DEVICES = ("/dev/null", "/dev/urandom")
_PRIVATE_USERS = range(2_000_000_000, 2_100_000_000)
_END_SECONDS = 10.0


class Confined(Protocol):
    """A process in a sandbox, reachable by two pipes and nothing else."""

    asked: int
    """Descriptor that we write to."""
    said: int
    """Descriptor that we read from."""

    def end(self) -> None:
        """Kill it and all that it started, and close the pipes."""
        ...

    def wait(self, seconds: float) -> int | None:
        """Its exit code, 0 for a good end; None when it runs on."""
        ...


def tier_version(tier: Tier) -> str | None:
    """What is installed of a tier; None when it is not there."""
    if tier == "bubblewrap":
        program = shutil.which("bwrap")
        said = program and subprocess.run([program, "--version"], capture_output=True, text=True)
        return said.stdout.strip().removeprefix("bubblewrap ") if said else None
    if tier == "sandlock":
        return metadata.version("sandlock") if find_spec("sandlock") else None
    return "limits only"


def enter(tier: Tier, max_processes: int) -> Confined:
    """Start an interpreter within the tier that reads its header from `asked`.

    Raises:
        OSError, RuntimeError: it cannot be started.
    """
    return _ENTER[tier](max_processes)


def unprivileged_user(tier: Tier) -> int | None:
    """The user that a guest of root becomes: one that nobody else has, so that none can lend it
    processes or take its own; None where the tier sees to it."""
    return secrets.choice(_PRIVATE_USERS) if tier == "bubblewrap" else None


def filter_of_guest(tier: Tier) -> str | None:
    """The filter of system calls that the guest has to put on itself, in hex; bubblewrap does it
    for its guests."""
    calls = system_call_filter() if tier == "sandlock" else None
    return calls.hex() if calls is not None else None


@dataclass(slots=True)
class _Child:
    process: subprocess.Popen[bytes]
    asked: int
    said: int

    def end(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        _close(self.asked, self.said)

    def wait(self, seconds: float) -> int | None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.process.wait(timeout=seconds)
        return None


@dataclass(slots=True)
class _Locked:
    process: _Process
    asked: int
    said: int

    def end(self) -> None:
        self.process.kill()
        self.process.wait(_END_SECONDS)
        _close(self.asked, self.said)

    def wait(self, seconds: float) -> int | None:
        return self.process.wait(seconds).exit_code


class _Result(Protocol):
    exit_code: int


class _Process(Protocol):
    def kill(self) -> None: ...
    def wait(self, timeout: float | None = None) -> _Result: ...


def _bubblewrap(max_processes: int) -> Confined:
    program = shutil.which("bwrap")
    if program is None:
        raise FileNotFoundError("bwrap is not installed")
    parents = dict.fromkeys(_parents(*_readable(), *_DEVICES))
    folders = [part for path in parents for part in ("--perms", "0755", "--dir", path)]
    binds = [part for path in _readable() for part in ("--ro-bind", path, path)]
    devices = [part for path in _DEVICES for part in ("--dev-bind", path, path)]
    line = [
        program,
        *("--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts"),
        *("--unshare-cgroup-try", "--die-with-parent", "--new-session", "--clearenv"),
        *(_as_root() if os.getuid() == 0 else _as_user()),
        *folders,  # bwrap would make them for its own user alone
        *binds,
        *devices,
        *("--remount-ro", "/", "--chdir", "/"),
    ]
    calls = system_call_filter()
    if calls is None:
        return _start([*line, *_interpreter()])
    descriptor = os.memfd_create("filter", 0)
    try:
        os.write(descriptor, calls)
        os.lseek(descriptor, 0, os.SEEK_SET)
        return _start([*line, "--seccomp", str(descriptor), *_interpreter()], descriptor)
    finally:
        os.close(descriptor)


def _as_root() -> tuple[str, ...]:
    """Root needs no user namespace, and a user of another number outside is a user for real."""
    return "--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"


def _as_user() -> tuple[str, ...]:
    nobody = str(sandbox_guest.NOBODY)
    return "--unshare-user", "--uid", nobody, "--gid", nobody


def _sandlock(max_processes: int) -> Confined:
    from sandlock import Sandbox
    from sandlock.sandbox import StdioMode

    nobody = sandbox_guest.NOBODY
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # says of gid that it is not passed on; it is
        box = Sandbox(
            fs_readable=[*_readable(), *_DEVICES],
            fs_writable=["/dev/null"],
            clean_env=True,
            max_processes=max_processes,
            no_coredump=True,
            uid=nobody,
            gid=nobody,
        )
        process = box.popen(_interpreter(), StdioMode.PIPED, StdioMode.PIPED, StdioMode.NULL)
    assert process.stdin is not None and process.stdout is not None
    asked, said = os.dup(process.stdin.fileno()), os.dup(process.stdout.fileno())
    process.stdin.close()
    process.stdout.close()
    return _Locked(cast(_Process, process), asked, said)


def _bare(max_processes: int) -> Confined:
    return _start(_interpreter())


_ENTER: dict[Tier, Callable[[int], Confined]] = {
    "bubblewrap": _bubblewrap,
    "sandlock": _sandlock,
    "none": _bare,
}


def _start(line: Sequence[str], *descriptors: int) -> Confined:
    asked, our_asked = os.pipe()
    our_said, said = os.pipe()
    try:
        process = subprocess.Popen(
            line,
            stdin=asked,
            stdout=said,
            stderr=None,
            env={},
            cwd="/",
            pass_fds=descriptors,
            start_new_session=True,
        )
    except BaseException:
        _close(our_asked, our_said)
        raise
    finally:
        _close(asked, said)
    return _Child(process, our_asked, our_said)


def _interpreter() -> list[str]:
    """The real Python, not the one of a virtual environment, whose libraries stay outside."""
    real = os.path.realpath(sys.executable)
    return [real, "-I", "-S", "-B", "-c", _GUEST]


def _readable() -> list[str]:
    """What a guest may read: the system's libraries and the Python installation."""
    paths = [path for path in (*_LIBRARIES, sys.base_prefix) if os.path.isdir(path)]
    prefix = os.path.realpath(sys.base_prefix)
    return list(dict.fromkeys([*paths, prefix]))


def _parents(*paths: str) -> Iterator[str]:
    for path in paths:
        yield from map(str, list(Path(path).parents)[-2::-1])


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        with contextlib.suppress(OSError):
            os.close(descriptor)
