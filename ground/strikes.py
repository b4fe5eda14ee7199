"""What an armed fault does: to its process, or to the value that passes its point.

strike(kill9)      strike(raise_("InfraError"))      damage(corrupt("scale"), tensors)
"""

from __future__ import annotations

import builtins
import copy
import ctypes
import errno
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ground import errors


@dataclass(frozen=True, slots=True)
class Action:
    """What a fault does to the process that passes its point.

    Example:
        Action("delay", "0.5")
    """

    name: str
    argument: str = ""


kill9 = Action("kill9")
"""SIGKILL."""
stop = Action("stop")
"""SIGSTOP of the whole process; SIGCONT lets it go on."""
segv = Action("segv")
"""A read of address 0."""
hang_gil = Action("hang_gil")
"""A deadlock in native code with the interpreter's lock held: no Python thread runs on."""
enospc = Action("enospc")
"""OSError: no space left on device."""


def raise_(error: str) -> Action:
    """Raise an error of ours or of Python's by name, or `Unpicklable`."""
    _error(error)
    return Action("raise", error)


def delay(seconds: float) -> Action:
    """Hold the thread up; where that is an event loop, everything on it."""
    return Action("delay", str(seconds))


def corrupt(how: str = "flip", only: str = "") -> Action:
    """Damage the value that passes a `corrupted` point.

    Args:
        how: `flip` a bit of bytes; `scale` (by 1.01), `nan` (one element) or `zero` a tensor, in a
            mapping the first one; `swap` two tensors of a mapping; `add` 1 to a number.
        only: part of the tensor's name.
    """
    if how not in _DAMAGES:
        raise ValueError(f"damage must be one of {sorted(_DAMAGES)}, got {how!r}")
    return Action("corrupt", f"{how} {only}")


def strike(action: Action) -> None:
    """Do it to this process."""
    _ACTIONS[action.name](action.argument)


def damage(action: Action, value: Any) -> Any:
    """The value, or a damaged copy of it where the action is to corrupt."""
    if action.name != "corrupt":
        strike(action)
        return value
    how, _, only = action.argument.partition(" ")
    return _DAMAGES[how](value, only)


class Unpicklable(Exception):
    """An error that no other process can be told of."""

    def __reduce__(self) -> NoReturn:
        raise TypeError("this error cannot be pickled")


def _error(name: str) -> type[BaseException]:
    kind = Unpicklable if name == "Unpicklable" else None
    kind = kind or getattr(errors, name, None) or getattr(builtins, name, None)
    if not (isinstance(kind, type) and issubclass(kind, BaseException)):
        raise ValueError(f"there must be an error of this name, got {name!r}")
    return kind


def _kill(number: signal.Signals) -> Callable[[str], None]:
    return lambda _: os.kill(os.getpid(), number)


def _hang(_: str) -> None:
    """Lock a mutex twice; a sleep would end at the next signal."""
    mutex, library = ctypes.create_string_buffer(128), ctypes.PyDLL(None)
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)


def _raise(name: str) -> NoReturn:
    raise _error(name)(f"{name} by an armed fault")


def _no_space(_: str) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


_ACTIONS: dict[str, Callable[[str], object]] = {
    "kill9": _kill(signal.SIGKILL),
    "stop": _kill(signal.SIGSTOP),
    "segv": lambda _: ctypes.string_at(0),
    "hang_gil": _hang,
    "enospc": _no_space,
    "raise": _raise,
    "delay": lambda seconds: time.sleep(float(seconds)),
    "corrupt": lambda _: None,
}


def _flip(value: Any, _: str) -> Any:
    middle = len(value) // 2
    return value[:middle] + bytes([value[middle] ^ 1]) + value[middle + 1 :]


def _in_tensor(change: Callable[[Any], None]) -> Callable[[Any, str], Any]:
    """Damage a copy of a tensor, or of the first one of a mapping whose name holds `only`."""

    def apply(value: Any, only: str) -> Any:
        if not isinstance(value, Mapping):
            return _changed(value)
        name = next(name for name in sorted(value) if only in name)
        return {**value, name: _changed(value[name])}

    def _changed(tensor: Any) -> Any:
        changed = copy.deepcopy(tensor)
        change(changed)
        return changed

    return apply


def _scale(tensor: Any) -> None:
    tensor *= 1.01


def _fill(value: float, where: slice) -> Callable[[Any], None]:
    def fill(tensor: Any) -> None:
        tensor.reshape(-1)[where] = value

    return fill


def _swap(value: Any, only: str) -> Any:
    names = [name for name in sorted(value) if only in name]
    first, second = next(
        (a, b)
        for n, a in enumerate(names)
        for b in names[n + 1 :]
        if value[a].shape == value[b].shape
    )
    return {**value, first: value[second], second: value[first]}


_DAMAGES: dict[str, Callable[[Any, str], Any]] = {
    "flip": _flip,
    "scale": _in_tensor(_scale),
    "nan": _in_tensor(_fill(float("nan"), slice(0, 1))),
    "zero": _in_tensor(_fill(0.0, slice(None))),
    "swap": _swap,
    "add": lambda value, _: value + 1,
}
