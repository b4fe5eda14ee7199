"""Kill a writer at each of its system calls in turn, and look at what a reader then sees.

The writer runs in a forked child under ptrace; the child is killed (SIGKILL) at the entry of the
k-th call that changes the file system: open for writing, write, fsync, rename, unlink, mkdir,
rmdir. So libraries in C are covered as well as Python, and nothing is mocked. Calls that only
read are no crash points: dying there is dying before the next one that writes.
"""

from __future__ import annotations

import ctypes
import os
import platform
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

T = TypeVar("T")

_CALLS = {
    "x86_64": {
        1: "write", 18: "write", 20: "write", 2: "open", 85: "open", 257: "open", 74: "fsync",
        75: "fsync", 76: "truncate", 77: "truncate", 82: "rename", 264: "rename", 316: "rename",
        83: "mkdir", 258: "mkdir", 84: "rmdir", 87: "unlink", 263: "unlink", 326: "write",
    },
    "aarch64": {
        64: "write", 68: "write", 66: "write", 56: "open", 82: "fsync", 83: "fsync",
        45: "truncate", 46: "truncate", 38: "rename", 276: "rename", 34: "mkdir", 35: "unlink",
        285: "write",
    },
}  # fmt: skip
_OPEN_AT = {"x86_64": (257,), "aarch64": (56,)}
_TRACE_ME, _SYSCALL, _SET_OPTIONS, _SYSCALL_INFO = 0, 24, 0x4200, 0x420E
_SYSGOOD, _EXIT_KILL, _ENTRY = 0x1, 0x100000, 1
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class _SyscallInfo(ctypes.Structure):
    _fields_ = (
        ("op", ctypes.c_uint8),
        ("pad", ctypes.c_uint8 * 3),
        ("arch", ctypes.c_uint32),
        ("instruction", ctypes.c_uint64),
        ("stack", ctypes.c_uint64),
        ("number", ctypes.c_uint64),
        ("arguments", ctypes.c_uint64 * 6),
    )


@dataclass(frozen=True)
class Death:
    """One crash: the calls that were made, and the one that was not made any more.

    Example:
        Death(done=("open", "write"), at="fsync"); at is "" when the writer ended by itself
    """

    done: tuple[str, ...]
    at: str


def crash_at_each_call(
    folder: Path,
    prepare: Callable[[Path], object],
    writer: Callable[[Path], object],
    reader: Callable[[Path], T],
) -> list[tuple[Death, T]]:
    """For k = 1, 2, …: prepare a fresh folder, run `writer` in it until its k-th call, then read.

    The last entry is the writer that ended by itself. After each crash the writer is run again
    undisturbed, and the reader must then see what it sees after the whole writer.
    """
    seen: list[tuple[Death, T]] = []
    again: list[T] = []
    while not seen or seen[-1][0].at:
        place = folder / f"k{len(seen) + 1:03d}"
        place.mkdir()
        prepare(place)
        death = run_until(lambda place=place: writer(place), len(seen) + 1)
        seen.append((death, reader(place)))
        writer(place)
        again.append(reader(place))
    assert again[:-1] == [seen[-1][1]] * (len(again) - 1), "a crash spoils the next writer"
    return seen


def old_then_new(seen: list[tuple[Death, T]], old: T, new: T) -> None:
    """Every reader saw `old` or `new`; first `old`, and from some call on `new`."""
    values = [value for _, value in seen]
    turn = values.index(new)
    assert values == [old] * turn + [new] * (len(values) - turn)
    assert turn > 0, "no crash point came before the commit"
    calls = seen[-1][0].done
    assert "fsync" in calls[: calls.index("rename")], "renamed before anything was synced"


def run_until(writer: Callable[[], object], count: int) -> Death:
    """Run `writer` in a child and kill it at its `count`-th call that writes."""
    machine = platform.machine()
    if platform.system() != "Linux" or machine not in _CALLS:
        pytest.skip(f"ptrace is used as on Linux x86_64 or aarch64, this is {machine}")
    libc = ctypes.CDLL(None, use_errno=True)
    child = os.fork()
    if child == 0:
        _be_the_child(libc, writer)
    _, status = os.waitpid(child, 0)
    if not os.WIFSTOPPED(status):
        pytest.skip("ptrace is not allowed here")
    options = ctypes.c_void_p(_SYSGOOD | _EXIT_KILL)
    libc.ptrace(_SET_OPTIONS, child, None, options)
    done: list[str] = []
    forward = 0
    while True:
        libc.ptrace(_SYSCALL, child, None, ctypes.c_void_p(forward))
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, "the writer failed"
            return Death(tuple(done), "")
        forward = os.WSTOPSIG(status)
        if forward != signal.SIGTRAP | 0x80:
            continue
        forward = 0
        call = _call_of(libc, child, machine)
        if call and len(done) == count - 1:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Death(tuple(done), call)
        if call:
            done.append(call)


def _be_the_child(libc: ctypes.CDLL, writer: Callable[[], object]) -> None:
    code = 1
    try:
        if libc.ptrace(_TRACE_ME, 0, None, None) == 0:
            os.kill(os.getpid(), signal.SIGSTOP)
            writer()
            code = 0
    finally:
        os._exit(code)


def _call_of(libc: ctypes.CDLL, child: int, machine: str) -> str:
    """The name of the call that the child is about to make, "" when it does not write."""
    info = _SyscallInfo()
    size = ctypes.c_void_p(ctypes.sizeof(info))
    if libc.ptrace(_SYSCALL_INFO, child, size, ctypes.byref(info)) <= 0:
        pytest.skip("this kernel has no PTRACE_GET_SYSCALL_INFO (Linux 5.3)")
    if info.op != _ENTRY:
        return ""
    number = int(info.number)
    name = _CALLS[machine].get(number, "")
    if name == "open":
        flags = info.arguments[2 if number in _OPEN_AT[machine] else 1]
        return name if number == 85 or flags & _WRITES else ""
    return name
