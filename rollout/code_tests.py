"""What a `code` prompt's `answer` asks of a program: scripts, calls, or a test that calls it.

The answer is JSON, in one of these layouts:

    {"inputs": ["3 4\\n"], "outputs": ["7\\n"]}                        scripts
    {"inputs": [[3, 4]], "outputs": [7], "fn_name": "add"}            calls
    {"entry_point": "add", "test": "def check(candidate): …"}         a test (HumanEval, MBPP)

An output of a call is the value itself; where a data set wraps it in a list, it must be unwrapped.
The last may have `prompt`, code that stands before the program: imports, helpers, the signature.
"""

from __future__ import annotations

import ast
import functools
import json
import math
import re
from dataclasses import dataclass
from typing import Any

from ground.errors import DataError

MAX_INPUT = 1 << 20
"""Characters of a script's input."""
MAX_PAIRS = 32
"""Scripts or calls of an answer that are run, its first ones. Each starts a sandbox within the
deadline of the verdict, so that more would cost right programs theirs."""
TOLERANCE = 1e-9
"""Relative and absolute difference that two floats may have, unless the answer has `tolerance`."""
_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+-]*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)
_PYTHON = ("", "python", "python3", "py")
_LAYOUTS = (
    '{"inputs": ["3 4\\n"], "outputs": ["7\\n"]}, '
    '{"inputs": [[3, 4]], "outputs": [7], "fn_name": "add"} or '
    '{"entry_point": "add", "test": "assert add(3, 4) == 7"}'
)


@dataclass(frozen=True, slots=True)
class Scripts:
    """Standard input and what must be printed, once per pair.

    Example:
        Scripts((("3 4\\n", "7\\n"),))
    """

    pairs: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Calls:
    """Arguments of a function and what it must return, once per pair.

    Example:
        Calls("add", (((3, 4), 7),), tolerance=1e-9)
    """

    entry_point: str
    pairs: tuple[tuple[tuple[Any, ...], Any], ...]
    tolerance: float


@dataclass(frozen=True, slots=True)
class Check:
    """A test that calls the function and asserts, or defines `check(candidate)` that does.

    Example:
        Check("add", preamble="", test="assert add(3, 4) == 7")
    """

    entry_point: str
    preamble: str
    """Code in front of program and test, if it stands alone; else empty."""
    test: str
    opening: str = ""
    """Code that a completion without the function's head continues."""


Tests = Scripts | Calls | Check


@functools.lru_cache(maxsize=4096)
def read_tests(answer: str) -> Tests:
    """The tests of a prompt's `answer`.

    Raises:
        DataError: it has none of the layouts, or tests nothing.
    """
    try:
        asked = json.loads(answer)
        tests = _check(asked) if "test" in asked else _pairs(asked)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"answer must be JSON like {_LAYOUTS}, got {answer[:80]!r} "
            f"({type(error).__name__}: {error})",
            where="reward code",
        ) from None
    return tests


def program_of(text: str, entry_point: str = "") -> str:
    """The program in a completion: its last fenced block of Python, or all of it.

    Of several blocks the last that defines the entry point counts: examples of use follow it.
    """
    blocks = [code for language, code in _FENCE.findall(text) if language.lower() in _PYTHON]
    defining = [code for code in blocks if entry_point and defines(code, entry_point)]
    return (defining or blocks or [text])[-1]


def defines(source: str, name: str) -> bool:
    """Whether a source has a function, class or value of that name at its top level."""
    pattern = rf"^(?:(?:async[ \t]+)?def|class)[ \t]+{name}\b|^{name}[ \t]*="
    return re.search(pattern, source, re.MULTILINE) is not None


def same_output(printed: str, wanted: str) -> bool:
    """Equal but for blanks at the ends of lines and empty lines at the end."""
    return _lines(printed) == _lines(wanted)


def same_value(value: object, wanted: object, tolerance: float) -> bool:
    """Whether a returned value is the wanted JSON value; tuples pass for lists, 1 not for true.

    Example:
        (1, 2.0000000001) against [1, 2.0] → True;  True against 1, "1" against 1 → False
    """
    if isinstance(wanted, bool) or isinstance(value, bool):
        return value is wanted
    if isinstance(wanted, int) and isinstance(value, int):
        return value == wanted
    if isinstance(wanted, int | float) and isinstance(value, int | float):
        return _close(value, wanted, tolerance)
    if isinstance(wanted, list):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(wanted)
            and all(same_value(v, w, tolerance) for v, w in zip(value, wanted, strict=True))
        )
    if isinstance(wanted, dict):
        return (
            isinstance(value, dict)
            and value.keys() == wanted.keys()
            and all(same_value(value[key], wanted[key], tolerance) for key in wanted)
        )
    return type(value) is type(wanted) and value == wanted


def _close(value: float, wanted: float, tolerance: float) -> bool:
    try:
        return math.isclose(value, wanted, rel_tol=tolerance, abs_tol=tolerance)
    except OverflowError:  # an integer beyond all floats
        return False


def _check(asked: dict[str, Any]) -> Check:
    entry_point, test = _name(asked["entry_point"]), _text(asked["test"])
    prompt = _text(asked.get("prompt", ""))
    if not test.strip():
        raise ValueError("the test is empty")
    if not _parses(test):
        raise ValueError("the test is no Python")
    return Check(entry_point, prompt if _parses(prompt) else "", test, prompt)


def _pairs(asked: dict[str, Any]) -> Scripts | Calls:
    inputs, outputs = list(asked["inputs"]), list(asked["outputs"])
    if not inputs or len(inputs) != len(outputs):
        raise ValueError(f"{len(inputs)} inputs and {len(outputs)} outputs")
    if "fn_name" in asked:
        arguments = [tuple(each) for each in inputs if isinstance(each, list)]
        if len(arguments) != len(inputs):
            raise TypeError("the inputs of a function are lists of arguments")
        pairs = tuple(zip(arguments, outputs, strict=True))[:MAX_PAIRS]
        return Calls(_name(asked["fn_name"]), pairs, float(asked.get("tolerance", TOLERANCE)))
    texts = tuple(zip(map(_text, inputs), map(_text, outputs), strict=True))
    if any(len(given) > MAX_INPUT for given, _ in texts):
        raise ValueError(f"an input exceeds {MAX_INPUT} characters")
    return Scripts(texts[:MAX_PAIRS])


def _name(value: object) -> str:
    if not isinstance(value, str) or not value.isidentifier():
        raise TypeError(f"a function's name is an identifier, got {value!r}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"expected text, got {type(value).__name__}")
    return value


def _parses(source: str) -> bool:
    try:
        ast.parse(source)
    except SyntaxError:
        return False
    return True


def _lines(text: str) -> list[str]:
    lines = [line.rstrip() for line in text.split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines
