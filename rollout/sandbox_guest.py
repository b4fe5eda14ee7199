"""What runs inside the sandbox: it limits itself, then serves one program. Standard library only.

    header ─▶ drop to an unprivileged user ─▶ limits ─▶ "ready" ─▶ run | serve | check

The text of this module is handed to `python -I -S -c`. Frames are JSON lines that carry the
header's nonce, on private copies of the descriptors that the guest was started with; what the
program prints goes nowhere, but in `run`, where it is the result. A program may find nonce and
descriptors (it shares our process) and forge frames: all that a frame can say is a return value,
which it may choose anyway. Whoever asks must therefore never send what it wants to hear.

    run    a script with its standard input; its standard output is the result
    serve  a module whose function is called with plain values and answers with plain values
    check  a test that calls a function which lives in another guest
"""

from __future__ import annotations

import json
import os
import resource
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:  # importing typing would cost every guest its milliseconds
    from collections.abc import Mapping
    from types import ModuleType
    from typing import Any, BinaryIO

MAX_FRAME = 1 << 20
"""Bytes of a frame, both ways."""
MAX_DEPTH = 64
"""Containers within containers of a plain value."""
NOBODY = 65534
_BIG = 1 << 63
_CONTAINERS: tuple[Any, ...] = (list, tuple, set, frozenset)


def encode(value: object, depth: int = 0) -> Any:
    """A plain value as JSON has it; containers and what JSON does not know are tagged.

    Subclasses become what they derive from, so that no behaviour travels with a value.

    Example:
        (1, [2.5]) → {"tuple": [1, {"list": [2.5]}]}

    Raises:
        TypeError: it is not made of None, bool, int, float, complex, str, bytes, list, tuple, set,
            frozenset and dict.
    """
    if depth > MAX_DEPTH:
        raise TypeError(f"values may be nested {MAX_DEPTH} deep at most")
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        number = int.__index__(value)
        return number if -_BIG <= number < _BIG else {"int": hex(number)}
    if isinstance(value, float):
        return float.__mul__(value, 1.0)
    if isinstance(value, complex):
        return {"complex": [float.hex(value.real), float.hex(value.imag)]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytes": bytes(value).hex()}
    for kind in _CONTAINERS:
        if isinstance(value, kind):
            return {kind.__name__: [encode(each, depth + 1) for each in kind.__iter__(value)]}
    if isinstance(value, dict):
        pairs = dict.items(value)
        return {"dict": [[encode(k, depth + 1), encode(v, depth + 1)] for k, v in pairs]}
    raise TypeError(f"not a plain value: {type(value).__name__}")


def decode(coded: Any) -> Any:
    """The value that `encode` wrote; exactly of built-in types whatever the text says.

    Raises:
        ValueError, TypeError, OverflowError: nobody's encoding.
    """
    if coded is None or type(coded) in (bool, int, float, str):
        return coded
    if type(coded) is not dict or len(coded) != 1:
        raise ValueError("not an encoded value")
    ((kind, inner),) = coded.items()
    if kind == "int":
        return int(inner, 16)
    if kind == "complex":
        return complex(*map(float.fromhex, inner))
    if kind == "bytes":
        return bytes.fromhex(inner)
    if type(inner) is not list:
        raise ValueError("not an encoded value")
    if kind == "dict":
        return {decode(key): decode(value) for key, value in inner}
    make = next((each for each in _CONTAINERS if each.__name__ == kind), None)
    if make is None:
        raise ValueError("not an encoded value")
    return make(decode(each) for each in inner)


def main() -> None:
    """Serve the header that stands on standard input."""
    asked, said = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    header = json.loads(asked.readline())
    _drop(header["uid"])
    _limit(header["limits"])
    if header["filter"] is not None:
        _refuse(bytes.fromhex(header["filter"]))
    _say(said, header["nonce"], {"ready": os.getuid()})
    mode = header["mode"]
    if mode == "run":
        said.close()
        _run(asked, header)
        return
    quiet = os.open("/dev/null", os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(quiet, descriptor)
    os.close(quiet)
    (_serve if mode == "serve" else _check)(asked, said, header)


def _drop(uid: int | None) -> None:
    """Become an unprivileged user for good, where we are not one yet.

    Args:
        uid: one that nobody else has, so that its processes are counted alone; None: stay.
    """
    if os.getuid() == 0 and uid is not None:
        os.setgroups([])
        try:
            os.setgid(uid)
            os.setuid(uid)
        except OSError:  # not mapped in this user namespace
            os.setgid(NOBODY)
            os.setuid(NOBODY)
        try:
            os.setuid(0)
        except PermissionError:
            return
        raise SystemExit("privileges could not be dropped")


def _limit(limits: Mapping[str, int]) -> None:
    for name, most in limits.items():
        number = getattr(resource, "RLIMIT_" + name)
        hard = resource.getrlimit(number)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(number, (most, most))


def _refuse(calls: bytes) -> None:
    """Put a BPF program in front of every system call from now on."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    program = ctypes.create_string_buffer(calls, len(calls))
    head = (ctypes.c_size_t * 2)(len(calls) // 8, ctypes.addressof(program))
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, ctypes.byref(head), 0, 0):
        raise SystemExit("the filter of system calls was refused")


def _say(said: BinaryIO, nonce: str, frame: Mapping[str, object]) -> None:
    line = json.dumps({"nonce": nonce, **frame})
    if len(line) > MAX_FRAME:
        line = json.dumps({"nonce": nonce, "raised": ["ValueError", "the value is too large"]})
    said.write(line.encode() + b"\n")
    said.flush()


def _run(asked: BinaryIO, header: Mapping[str, Any]) -> None:
    given = os.memfd_create("input")
    os.write(given, header["stdin"].encode())
    os.lseek(given, 0, os.SEEK_SET)
    os.dup2(given, 0)
    os.close(given)
    asked.close()
    os.dup2(os.open("/dev/null", os.O_WRONLY), 2)
    module = _module("__main__")
    exec(compile(header["source"], "<program>", "exec", dont_inherit=True), module)


def _serve(asked: BinaryIO, said: BinaryIO, header: Mapping[str, Any]) -> None:
    nonce, module = header["nonce"], _module("program")
    try:
        for source in header["sources"]:
            exec(compile(source, "<program>", "exec", dont_inherit=True), module)
        function = module[header["entry_point"]]
    except BaseException as error:
        _say(said, nonce, {"raised": _told(error)})
        return
    _say(said, nonce, {"loaded": True})
    for line in asked:
        call = json.loads(line)
        arguments, named = decode(call["args"]), decode(call["kwargs"])
        try:
            _say(said, nonce, {"value": encode(function(*arguments, **named))})
        except BaseException as error:
            _say(said, nonce, {"raised": _told(error)})


def _check(asked: BinaryIO, said: BinaryIO, header: Mapping[str, Any]) -> None:
    nonce, module = header["nonce"], _module("check")

    def candidate(*arguments: object, **named: object) -> object:
        _say(said, nonce, {"call": {"args": encode(arguments), "kwargs": encode(named)}})
        reply = json.loads(asked.readline())
        if "value" in reply:
            return decode(reply["value"])
        kind, message = reply["raised"]
        raise _known(kind)(message)

    try:
        exec(compile(header["preamble"], "<prompt>", "exec", dont_inherit=True), module)
        module["candidate"] = module[header["entry_point"]] = candidate
        exec(compile(header["test"], "<test>", "exec", dont_inherit=True), module)
        check = module.get("check")
        if check is not None:
            check(candidate)
    except BaseException as error:
        _say(said, nonce, {"failed": _told(error)})
    else:
        _say(said, nonce, {"passed": True})


def _module(name: str) -> dict[str, Any]:
    """A namespace to run source in; registered, because dataclasses look their module up.

    Programs call `exit` and `quit`, which are builtins only where `site` put them.
    """
    import builtins

    builtins.__dict__.update(exit=sys.exit, quit=sys.exit)
    module: ModuleType = type(sys)(name)
    sys.modules[name] = module
    return module.__dict__


def _told(error: BaseException) -> list[str]:
    try:
        return [type(error).__name__, str(error)[:200]]
    except BaseException:
        return ["Exception", "(its message cannot be read)"]


def _known(kind: str) -> type[Exception]:
    """The built-in exception of that name; what a program calls an AssertionError is none."""
    import builtins

    found = vars(builtins).get(kind)
    if isinstance(found, type) and issubclass(found, Exception) and found is not AssertionError:
        return found
    return RuntimeError


if __name__ == "__main__":
    main()
