"""A program against its tests: each in a sandbox of its own, and never with what it should say.

    Scripts   program ─ stdout ─▶ compared here
    Calls     program ─ value ──▶ compared here
    Check     program ◀─ arguments ─ relay ◀─ test     two sandboxes; the asserts stand in the
                      ── values ────────────▶          other one, and only plain values cross

A program may end early, lie about equality, replace what runs it, or forge what it sends: all that
it can bring about is a value, and that is what is tested.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from ground.errors import DataError
from rollout.code_tests import (
    Calls,
    Check,
    Scripts,
    Tests,
    defines,
    program_of,
    same_output,
    same_value,
)
from rollout.sandbox import Frame, Guest, GuestFailed, Sandbox
from rollout.sandbox_guest import decode, encode

Outcome = Literal["passed", "wrong", "raised", "timeout", "ended", "flood", "nonsense"]


@dataclass(frozen=True, slots=True)
class Ran:
    """How a program did: it stops at its first failure.

    Example:
        Ran(num_passed=2, num_tests=5, outcome="timeout") for an endless loop in the third test
    """

    num_passed: int
    num_tests: int
    outcome: Outcome
    """Of the last test that ran."""

    @property
    def passed(self) -> bool:
        """All tests."""
        return self.num_passed == self.num_tests


def run_tests(sandbox: Sandbox, text: str, tests: Tests, seconds: float) -> Ran:
    """Run the program in a completion against its tests.

    Args:
        seconds: wall-clock time for all of them together, the sandboxes' starts left out.

    Raises:
        DataError: the test itself tests nothing.
        InfraError: a sandbox does not start.
    """
    clock = _Clock(seconds)
    limits = replace(sandbox.limits, cpu_seconds=math.ceil(seconds) + 1)
    runs = _runs(replace(sandbox, limits=limits), text, tests, clock)
    num_tests = 1 if isinstance(tests, Check) else len(tests.pairs)
    for number, outcome in enumerate(runs):
        if outcome != "passed":
            return Ran(number, num_tests, outcome)
    return Ran(num_tests, num_tests, "passed")


class _Clock:
    """Time that runs only while a program does."""

    def __init__(self, seconds: float) -> None:
        self._left = seconds

    def grant(self, *guests: Guest) -> None:
        self._since = time.monotonic()
        for guest in guests:
            guest.grant(self._left)

    def stop(self) -> None:
        self._left -= time.monotonic() - self._since


def _runs(sandbox: Sandbox, text: str, tests: Tests, clock: _Clock) -> Iterator[Outcome]:
    match tests:
        case Scripts(pairs):
            program = program_of(text)
            for given, wanted in pairs:
                yield _script(sandbox, program, given, wanted, clock)
        case Calls(entry_point, pairs, tolerance):
            program = program_of(text, entry_point)
            for arguments, wanted in pairs:
                yield _call(sandbox, program, entry_point, arguments, (wanted, tolerance), clock)
        case Check():
            yield _check(sandbox, _sources(text, tests), tests, clock)


def _script(sandbox: Sandbox, program: str, given: str, wanted: str, clock: _Clock) -> Outcome:
    header = {"mode": "run", "source": program, "stdin": given}
    with sandbox.open(header) as guest:
        clock.grant(guest)
        try:
            printed, code = guest.output()
        except GuestFailed as failed:
            return failed.ending
        clock.stop()
    if code:
        return "raised"
    return "passed" if same_output(printed.decode(errors="replace"), wanted) else "wrong"


def _call(
    sandbox: Sandbox,
    program: str,
    entry_point: str,
    arguments: tuple[object, ...],
    wanted: tuple[object, float],
    clock: _Clock,
) -> Outcome:
    with sandbox.open(_serving([program], entry_point)) as guest:
        clock.grant(guest)
        try:
            said = guest.hear()
            if "loaded" in said:
                said = guest.ask({"args": encode(arguments), "kwargs": encode({})})
        except GuestFailed as failed:
            return failed.ending
        clock.stop()
    if "value" not in said:
        return "raised"
    try:
        value = decode(said["value"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return "nonsense"
    return "passed" if same_value(value, *wanted) else "wrong"


def _check(sandbox: Sandbox, sources: list[str], check: Check, clock: _Clock) -> Outcome:
    testing = {
        "mode": "check",
        "preamble": check.preamble,
        "test": check.test,
        "entry_point": check.entry_point,
    }
    serving = _serving(sources, check.entry_point)
    with sandbox.open(testing) as tester, sandbox.open(serving) as candidate:
        clock.grant(tester, candidate)
        try:
            return _relay(tester, candidate)
        except GuestFailed as failed:
            return failed.ending


def _relay(tester: Guest, candidate: Guest) -> Outcome:
    """Carry arguments and values between a test and what it tests.

    A test that passes without having asked anything would pass for every program.
    """
    if "loaded" not in candidate.hear():
        return "raised"
    said, asked = tester.hear(), False
    while isinstance(call := said.get("call"), dict):
        asked = True
        said = tester.ask(_reply(candidate.ask(call)))
    if "passed" in said and not asked:
        raise DataError("a test must call what it tests, this one does not", where="reward code")
    return "passed" if said.get("passed") is True else "wrong"


def _reply(said: Frame) -> Frame:
    """What a candidate's answer is to the test: a value, or that it raised."""
    if "value" in said:
        return {"value": said["value"]}
    match said.get("raised"):
        case [str(kind), str(message)]:
            return {"raised": [kind, message]}
    return {"raised": ["RuntimeError", "no value"]}


def _serving(sources: list[str], entry_point: str) -> Frame:
    return {"mode": "serve", "sources": sources, "entry_point": entry_point}


def _sources(text: str, check: Check) -> list[str]:
    """What a module is made of: the preamble and the program, or the opening that it continues."""
    program = program_of(text, check.entry_point)
    if check.opening and not defines(program, check.entry_point):
        return [check.opening + program]
    return [check.preamble, program]
