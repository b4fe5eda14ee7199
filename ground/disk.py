"""What the disk can do to us, said clearly; and the fsyncs that the commit protocol is made of."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ground.errors import SetupError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_REASONS = {
    errno.EFBIG: "the file is larger than the limit of this user or file system allows",
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "this user may not write there",
    errno.EPERM: "this user may not write there",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a part of the path is a file, not a folder",
    errno.ENOENT: "its folder does not exist",
    errno.EIO: "the disk reports an input/output error",
}


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn an OSError about writing `path` into a SetupError that says what to do."""
    try:
        yield
    except OSError as error:
        number = error.errno or 0
        if number in _FULL:
            raise _full(path) from error
        if number in _REASONS and _is_ours(error, path):
            raise SetupError(
                "cannot be written",
                where=str(path),
                why=_REASONS[number],
                fix="choose another place (--run, or --output for a report)",
            ) from error
        raise
    except Exception as error:
        if "os error 28" in str(error):  # safetensors reports a full disk as text
            raise _full(path) from error
        raise


def free_bytes(path: Path) -> int:
    """Free space for this user at `path` or the nearest folder above it that exists."""
    while not path.exists() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free


def require_space(path: Path, needed: int, purpose: str) -> None:
    """Refuse before the work starts when `needed` bytes for `purpose` are not free at `path`."""
    free = free_bytes(path)
    if free < needed:
        raise SetupError(
            f"{purpose} needs {show_bytes(needed)}, {show_bytes(free)} are free",
            where=str(path),
            fix="free some space, keep fewer checkpoints, or choose another disk with --run",
        )


def show_bytes(count: int) -> str:
    """`1536` → `1.5 KB` (1024 bytes to the KB)."""
    size = float(count)
    for unit in ("bytes", "KB", "MB", "GB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TB"


def fsync_file(path: Path) -> None:
    """Bring a file's content to the disk."""
    _fsync(path, os.O_RDONLY | os.O_NOFOLLOW)


def fsync_directory(path: Path) -> None:
    """Bring a folder's entries to the disk, so that a rename in it survives a power cut."""
    _fsync(path, os.O_RDONLY | os.O_DIRECTORY)


def _fsync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _is_ours(error: OSError, path: Path) -> bool:
    """Whether the error speaks of `path` or its surroundings, not of a file that was being read."""
    if error.filename is None:
        return True
    place, named = path.absolute(), Path(os.fsdecode(error.filename)).absolute()
    if error.errno == errno.EEXIST and not named.is_file():
        return False
    if error.errno == errno.ENOENT and named.parent.is_dir():
        return False  # a file that should have been there: a defect, not a place to write to
    return named.is_relative_to(place.parent) or place.is_relative_to(named)


def _full(path: Path) -> SetupError:
    return SetupError(
        f"the disk is full ({show_bytes(free_bytes(path.parent))} free)",
        where=str(path),
        why="what was there before is untouched",
        fix="free some space and continue with --resume",
    )
