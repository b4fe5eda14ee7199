"""Children that end with us, although a library starts them and not we.

A library that spawns through multiprocessing runs an interpreter; within `leashed` it runs one that
first asks the kernel to be killed when the thread that started it ends. That holds from its first
moment on, before it imports anything, and whatever ends us.
"""

from __future__ import annotations

import multiprocessing
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker, spawn

_SCRIPT = """#!/bin/sh
exec {python} -I -S -c 'import ctypes, os, sys
ctypes.CDLL(None).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
os.getppid() == int(sys.argv[1]) or os._exit(3)
os.execv(sys.argv[2], sys.argv[2:])' {parent} {python} "$@"
"""


@contextmanager
def leashed() -> Iterator[None]:
    """What this thread has multiprocessing spawn inside ends with this thread.

    multiprocessing's own tracker is left out: it puts away what killed processes leave.
    """
    resource_tracker.ensure_running()
    python = os.fsdecode(spawn.get_executable() or b"")
    script = _SCRIPT.format(python=shlex.quote(python), parent=os.getpid())
    descriptor = _executable(script.encode())
    multiprocessing.set_executable(f"/proc/{os.getpid()}/fd/{descriptor}")
    try:
        yield
    finally:
        multiprocessing.set_executable(python)
        os.close(descriptor)


def _executable(content: bytes) -> int:
    """A file without a name; nobody has it open for writing, which would keep it from being run."""
    written = os.memfd_create("packtrain-leash")
    os.write(written, content)
    descriptor = os.open(f"/proc/self/fd/{written}", os.O_RDONLY)
    os.close(written)
    return descriptor
