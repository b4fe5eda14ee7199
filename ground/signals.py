"""SIGTERM and Ctrl-C end a stage in order: the first interrupts, the second leaves at once.

    running → interrupted (Interrupted is raised, work is saved) → left

`ray.init` replaces the SIGTERM handler: call `install_signals()` again after it. Leaving at once is
safe at any moment because of the commit protocol (ground/storage.py).
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PR_SET_PDEATHSIG = 1


class Interrupted(KeyboardInterrupt):
    """Somebody asked the process to end; exit code 143 (SIGTERM) or 130 (Ctrl-C)."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number

    @property
    def exit_code(self) -> int:
        """What a shell expects of a process that ended by this signal."""
        return 128 + self.number


@dataclass(slots=True)
class Pending:
    """Whether somebody asked to end while signals were held."""

    number: int | None = None

    @property
    def requested(self) -> bool:
        """True once a signal has come."""
        return self.number is not None


def install_signals() -> None:
    """Raise Interrupted in the main thread on the first SIGTERM or SIGINT; leave on the second."""
    _install(_interrupt)


@contextmanager
def held_signals(at_once: Callable[[], None] = lambda: None) -> Iterator[Pending]:
    """Only note the first signal while the body runs, then raise Interrupted at its end.

    For work that should finish its step and save: `if pending.requested: save and return`.

    Args:
        at_once: called when it comes, between any two instructions of the body.
    """
    pending = Pending()

    def note(number: int, _: FrameType | None) -> None:
        pending.number = number
        _install(_leave)
        at_once()

    before = [(number, signal.getsignal(number)) for number in _SIGNALS]
    _install(note)
    try:
        yield pending
    finally:
        if not pending.requested:
            for number, handler in before:
                signal.signal(number, handler)
    if pending.number is not None:
        raise Interrupted(pending.number)


def end_with_parent() -> None:
    """Get SIGTERM when the process that started us dies (Linux; elsewhere nothing happens)."""
    try:
        prctl = ctypes.CDLL(None).prctl
    except AttributeError:
        return
    prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM))


def _install(handler: signal.Handlers | object) -> None:
    for number in _SIGNALS:
        signal.signal(number, handler)  # pyright: ignore[reportArgumentType]


def _interrupt(number: int, _: FrameType | None) -> None:
    _install(_leave)
    raise Interrupted(number)


def _leave(number: int, _: FrameType | None) -> None:
    os._exit(128 + number)
