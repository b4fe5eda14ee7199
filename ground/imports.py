"""Importing libraries quickly: all that they make stays, so nobody need look for garbage meanwhile.

torch and transformers are 3,000 modules; looking through them again and again is a fifth of the
seconds until they are there, in each process that needs them.

    python -m ground.imports MODULE        imports it so, and ends with what its `main()` returns
"""

from __future__ import annotations

import atexit
import gc
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Collect nothing in the body; what there is at its end is not looked at again until the
    process ends, when libraries want their things back.

    Example:
        with without_collection(): import torch
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        atexit.unregister(gc.unfreeze)  # once is enough
        atexit.register(gc.unfreeze)
        if was_enabled:
            gc.enable()


def main() -> int:
    """Be the process of a module that has a `main`."""
    with without_collection():
        module = importlib.import_module(sys.argv[1])
    return int(module.main())


if __name__ == "__main__":
    sys.exit(main())
