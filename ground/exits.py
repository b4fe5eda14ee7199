"""How a process of this machine ended, also one that is nobody's child here.

    watch = ExitWatch(pid) while it lives … it dies, its parent reaps it … await watch.cause()

Only a parent may wait for a process, and Ray's workers are children of Ray. But a file descriptor
of a process outlives it, and Linux tells its exit status there since 6.15 (`PIDFD_GET_INFO` of
linux/pidfd.h). Where the kernel is older or another one, nothing is told and nothing is guessed.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import platform
import signal
import struct
import sys
import weakref
from contextlib import suppress
from pathlib import Path

_INFO_BYTES = 64
"""sizeof(struct pidfd_info) in its first version; a later kernel takes the short one as it is."""
_GET_INFO = 3 << 30 | _INFO_BYTES << 16 | 0xFF << 8 | 11
"""_IOWR(0xFF, 11, struct pidfd_info)"""
_WANTS_EXIT = 1 << 3
_STATUS_OFFSET = 60
_POLL_SECONDS = 0.01


def pid_space() -> str:
    """Where this process's ids count: machine, boot and namespace, for names alone may be alike."""
    parts = [platform.node()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(str(os.stat("/proc/self/ns/pid").st_ino))
    return " ".join(parts)


class ExitWatch:
    """Looks on from the time that a process lives until its status is known.

    Example:
        ExitWatch(4711).cause() → "SIGSEGV", later "" for one that still lives
    """

    def __init__(self, pid: int) -> None:
        self._descriptor = -1
        if sys.platform == "linux":
            with suppress(OSError):
                self._descriptor = os.pidfd_open(pid)
                weakref.finalize(self, os.close, self._descriptor)

    async def cause(self, seconds: float) -> str:
        """The signal's name or the exit code, in words; empty when it is not known in time.

        A connection breaks a little before the kernel has the status, so it may have to be waited
        for.
        """
        deadline = asyncio.get_running_loop().time() + seconds
        try:
            while (status := self._status()) is None:
                if asyncio.get_running_loop().time() >= deadline:
                    return ""
                await asyncio.sleep(_POLL_SECONDS)
        except OSError:  # a kernel that has no such call
            return ""
        return _in_words(os.waitstatus_to_exitcode(status))

    def _status(self) -> int | None:
        """The wait status; None while it lives or is not reaped."""
        info = bytearray(_INFO_BYTES)
        struct.pack_into("Q", info, 0, _WANTS_EXIT)
        try:
            fcntl.ioctl(self._descriptor, _GET_INFO, info)
        except ValueError as error:
            raise OSError("no descriptor could be had") from error
        (mask,) = struct.unpack_from("Q", info, 0)
        return struct.unpack_from("i", info, _STATUS_OFFSET)[0] if mask & _WANTS_EXIT else None


def _in_words(code: int) -> str:
    if code >= 0:
        return f"exit code {code}"
    with suppress(ValueError):
        return signal.Signals(-code).name
    return f"signal {-code}"
