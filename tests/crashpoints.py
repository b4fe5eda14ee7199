"""Kill a writer at each of its system calls in turn, and look at what a reader then sees.

The writer runs in a forked child under ptrace; the child is killed (SIGKILL) at the entry of the
k-th call that changes the file system: open for writing, write, fsync, rename, unlink, mkdir,
rmdir. So libraries in C are covered as well as Python, and nothing is mocked. Calls that only
read are no crash points: dying there is dying before the next one that writes. A seccomp filter
in the child reports the calls of interest alone, which keeps a crash point at a few milliseconds.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
_TRACE_ME, _CONTINUE, _SET_OPTIONS, _SYSCALL_INFO = 0, 7, 0x4200, 0x420E
_TRACE_SECCOMP, _EXIT_KILL, _SECCOMP_STOP = 0x80, 0x100000, signal.SIGTRAP | 7 << 8
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2
_LOAD, _JUMP_IF_EQUAL, _RETURN, _ALLOW, _TRACE = 0x20, 0x15, 0x06, 0x7FFF0000, 0x7FF00000
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


class _Instruction(ctypes.Structure):
    """One step of the filter program that the kernel runs at each call."""

    _fields_ = (
        ("code", ctypes.c_uint16),
        ("if_true", ctypes.c_uint8),
        ("if_false", ctypes.c_uint8),
        ("value", ctypes.c_uint32),
    )


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_uint16), ("steps", ctypes.POINTER(_Instruction)))


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
    *,
    rerun: bool = True,
) -> list[tuple[Death, T]]:
    """For k = 1, 2, …: prepare a fresh folder, run `writer` in it until its k-th call, then read.

    The last entry is the writer that ended by itself. With `rerun`, the writer is run again after
    each crash, undisturbed, and the reader must then see what it sees after the whole writer.
    """
    seen: list[tuple[Death, T]] = []
    again: list[T] = []
    while not seen or seen[-1][0].at:
        place = folder / f"k{len(seen) + 1:03d}"
        place.mkdir()
        prepare(place)
        death = run_until(lambda place=place: writer(place), len(seen) + 1)
        seen.append((death, reader(place)))
        if rerun:
            writer(place)
            again.append(reader(place))
    assert set(again) <= {seen[-1][1]}, "a crash spoils the next writer"
    return seen


def old_then_new(seen: list[tuple[Death, T]], old: T, new: T, *, synced: bool = True) -> None:
    """Every reader saw `old` or `new`; first `old`, and from some call on `new`.

    With `synced`, the writer's first rename is its commit, and something was fsynced before it.
    """
    values = [value for _, value in seen]
    turn = values.index(new)
    assert values == [old] * turn + [new] * (len(values) - turn)
    assert turn > 0, "no crash point came before the commit"
    calls = seen[-1][0].done
    if synced:
        assert "fsync" in calls[: calls.index("rename")], "renamed before anything was synced"


@contextmanager
def limited_file_size(num_bytes: int) -> Iterator[None]:
    """No file of this process may grow beyond this, as on a disk that is full.

    Put it around the writer alone, never into a fixture: pytest's own output may go to a file, and
    what it prints between a test and its teardown would meet the limit too.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


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
    options = ctypes.c_void_p(_TRACE_SECCOMP | _EXIT_KILL)
    libc.ptrace(_SET_OPTIONS, child, None, options)
    done: list[str] = []
    forward = 0
    while True:
        libc.ptrace(_CONTINUE, child, None, ctypes.c_void_p(forward))
        _, status = os.waitpid(child, 0)
        if os.WIFEXITED(status) or os.WIFSIGNALED(status):
            assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, "the writer failed"
            return Death(tuple(done), "")
        forward = 0 if status >> 8 == _SECCOMP_STOP else os.WSTOPSIG(status)
        call = "" if forward else _call_of(libc, child, machine)
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
            _report_calls(libc, sorted(_CALLS[platform.machine()]))
            writer()
            code = 0
    finally:
        os._exit(code)


def _report_calls(libc: ctypes.CDLL, numbers: list[int]) -> None:
    """Have the kernel stop this process for its tracer at the calls with these numbers."""
    steps = [_Instruction(_LOAD, 0, 0, 0)]
    for index, number in enumerate(numbers):
        steps.append(_Instruction(_JUMP_IF_EQUAL, len(numbers) - index, 0, number))
    steps += [_Instruction(_RETURN, 0, 0, _ALLOW), _Instruction(_RETURN, 0, 0, _TRACE)]
    program = _Program(len(steps), (_Instruction * len(steps))(*steps))
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if libc.prctl(_SET_SECCOMP, _FILTER, ctypes.byref(program), 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "this kernel lets no seccomp filter be set")


def _call_of(libc: ctypes.CDLL, child: int, machine: str) -> str:
    """The name of the call that the child is about to make, "" when it does not write."""
    info = _SyscallInfo()
    size = ctypes.c_void_p(ctypes.sizeof(info))
    if libc.ptrace(_SYSCALL_INFO, child, size, ctypes.byref(info)) <= 0:
        pytest.skip("this kernel has no PTRACE_GET_SYSCALL_INFO (Linux 5.3)")
    number = int(info.number)
    name = _CALLS[machine].get(number, "")
    if name == "open":
        flags = info.arguments[2 if number in _OPEN_AT[machine] else 1]
        return name if flags & _WRITES else ""
    return name
