"""A child process that ends with its parent, although a library starts it and not we."""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping

from ground.lease import ABANDONED

_PR_SET_PDEATHSIG = 1


class Leash:
    """Put into what a child process is sent, it ends that process when its parent ends.

    It works as soon as the child reads its orders, before it imports a model or opens a device. A
    parent that is gone by then is noticed too.
    """

    def __reduce__(self) -> tuple[object, ...]:
        return _hold_to, (os.getpid(),)

    def __deepcopy__(self, memo: Mapping[int, object]) -> Leash:
        return self

    def compute_hash(self) -> str:
        """vLLM hashes its settings to find compiled graphs again; this has no part in them."""
        return "leash"


def _hold_to(parent: int) -> Leash:
    if os.getpid() != parent:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))
        if os.getppid() != parent:
            os._exit(ABANDONED)
    return Leash()
