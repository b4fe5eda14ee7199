"""Whose business a failure is, decided in the process where it happened.

What crosses a process boundary must be picklable and must say what to do, so everything is turned
into one of our errors first: INFRA is tried again elsewhere, DATA is the sample's, OPERATOR is an
order, and CODE, which is also whatever is unknown, ends the run loudly.
"""

from __future__ import annotations

import asyncio
import errno
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ground.errors import InfraError, PacktrainError

_SCARCE = {
    errno.ENOSPC, errno.EDQUOT, errno.ENOMEM, errno.EMFILE, errno.ENFILE, errno.EIO,
    errno.EAGAIN, errno.ECONNRESET, errno.EPIPE,
}  # fmt: skip
"""What an OSError says of the machine; any other one is a defect."""
_MEMORY_TEXTS = ("out of memory", "can't allocate memory", "failed to allocate", "bad_alloc")
MEMORY_FIX = "lower rl.engine.num_slots or rl.fleet.num_workers"
_MAX_TEXT = 2000


@contextmanager
def sorted_failures(doing: str, *, memory_fix: str = MEMORY_FIX) -> Iterator[None]:
    """Whatever leaves the body is one of our errors; cancelling passes; see `sort_failure`.

    Example:
        with sorted_failures("group 9c1f.0"): …  # MemoryError → InfraError
    """
    try:
        yield
    except (PacktrainError, asyncio.CancelledError, GeneratorExit):
        raise
    except BaseException as error:
        raise sort_failure(error, doing, memory_fix=memory_fix) from None


def sort_failure(
    error: BaseException, doing: str, *, memory_fix: str = MEMORY_FIX
) -> PacktrainError:
    """Any exception as an error of ours: the machine's (`InfraError`), or a defect of ours.

    Args:
        memory_fix: what to do when it is memory that lacks.
    """
    if isinstance(error, PacktrainError):
        return error
    got = f"{type(error).__name__}: {_text(error)}".removesuffix(": ")
    if isinstance(error, MemoryError) or any(text in got.lower() for text in _MEMORY_TEXTS):
        return InfraError(
            f"{doing} must fit into memory, got {got}",
            fix=memory_fix,
        )
    if isinstance(error, OSError) and error.errno in _SCARCE:
        return InfraError(f"{doing} needs what the machine has too little of, got {got}")
    if isinstance(error, KeyboardInterrupt):
        return InfraError(f"{doing} was interrupted by a signal")
    trace = "".join(traceback.format_tb(error.__traceback__))[-_MAX_TEXT:]
    return PacktrainError(
        f"{doing} failed: {got}",
        why=trace.strip(),
        fix="this is a defect, please report it with the traceback above",
    )


def memory_kills() -> int:
    """Processes that the kernel has ended for want of memory so far, on this machine or in our
    container; -1 where it does not tell."""
    counts = [
        int(line.split()[1])
        for path in ("/sys/fs/cgroup/memory.events", "/proc/vmstat")
        for line in _lines(Path(path))
        if line.startswith("oom_kill ")
    ]
    return sum(counts) if counts else -1


def _lines(path: Path) -> list[str]:
    with suppress(OSError):
        return path.read_text().splitlines()
    return []


def _text(error: BaseException) -> str:
    try:
        return str(error)[:_MAX_TEXT]
    except BaseException:
        return "(its message cannot be read)"
