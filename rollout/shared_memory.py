"""Shared memory without a name: pages of one process that others on its machine map and lock.

    free → filling (one writer, exclusive lock) → read (any number of readers, shared locks) → free

A buffer is a memfd: no file that could be left behind, the kernel takes its pages back with the
last process that has them. A lock goes with the process that took it, however that ends; so a
buffer is never refilled under a reader, and a dead reader never blocks a writer.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import weakref
from collections.abc import Iterable

from ground.errors import InfraError, SetupError
from ground.memory import available_bytes


class SharedBuffer:
    """Pages that belong to this process; lives until `close` or the process's end.

    Raises:
        SetupError: the machine has not that much memory left.
    """

    def __init__(self, size: int) -> None:
        self.size = max(size, 1)
        available = available_bytes()
        if self.size > available:  # asked for nevertheless, the kernel would kill somebody for it
            raise _too_little(self.size, f"{available:,} bytes are available")
        self._fd = os.memfd_create("packtrain-weights", os.MFD_CLOEXEC)
        try:
            # Pages that cannot be had are an error here and now, not a SIGBUS while writing.
            os.posix_fallocate(self._fd, 0, self.size)
        except OSError as error:
            os.close(self._fd)
            raise _too_little(self.size, str(error)) from error

    @property
    def path(self) -> str:
        """Where other processes of this machine and user open it."""
        return f"/proc/{os.getpid()}/fd/{self._fd}"

    def hold(self) -> None:
        """Let nobody fill it, until `release`."""
        fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)

    def release(self) -> None:
        """It may be filled again once no reader is left."""
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def map(self) -> mmap.mmap:
        """Its bytes, for reading and writing."""
        return mmap.mmap(self._fd, self.size)

    def close(self) -> None:
        """Give the pages back as soon as nobody else has them."""
        os.close(self._fd)


def _too_little(size: int, why: str) -> SetupError:
    return SetupError(
        f"{size:,} bytes of shared memory are needed for a version of the weights",
        where="weight keeper",
        why=why,
        fix="free memory, or use a smaller model",
    )


class Lock:
    """A hold on somebody's buffer, until `release` or until nobody refers to it any more.

    Example:
        lock = Lock.take(path, exclusive=True)  → None while somebody reads
        …fill…;  lock.share()  → others may read, nobody may fill;  lock.release()
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self.release = weakref.finalize(self, os.close, fd)

    @classmethod
    def take(cls, path: str, *, exclusive: bool) -> Lock | None:
        """Lock it if that is possible now."""
        fd = _open_theirs(path, os.O_RDONLY)
        try:
            fcntl.flock(fd, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return None
        return cls(fd)

    def share(self) -> None:
        """Turn an exclusive lock into a shared one."""
        fcntl.flock(self._fd, fcntl.LOCK_SH | fcntl.LOCK_NB)


def first_free(paths: Iterable[str]) -> tuple[str, Lock] | None:
    """The first buffer that nobody reads or fills, locked for filling."""
    for path in paths:
        lock = Lock.take(path, exclusive=True)
        if lock:
            return path, lock
    return None


def map_buffer(path: str, size: int, *, writable: bool) -> mmap.mmap:
    """Map somebody's buffer.

    What a reader writes stays with itself (pages are copied on writing): nobody can damage the
    weights of others.
    """
    fd = _open_theirs(path, os.O_RDWR)
    try:
        kind = mmap.MAP_SHARED if writable else mmap.MAP_PRIVATE
        return mmap.mmap(fd, max(size, 1), flags=kind, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    finally:
        os.close(fd)


def _open_theirs(path: str, flags: int) -> int:
    try:
        return os.open(path, flags)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise InfraError(
            "the memory of the weight keeper must be there, its process is gone", where="hand-over"
        ) from error
