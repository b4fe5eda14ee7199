"""Ending a process without taking it apart."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
from typing import NoReturn


def leave(code: int) -> NoReturn:
    """End the process with this exit code, after all that is registered with `atexit`.

    The interpreter would take thousands of modules apart, one after the other: with torch and
    transformers among them two seconds, at the end of every stage.
    """
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
