"""A process for model-written code that can reach nothing, and a conversation with it.

    open → header → ready ⇄ frames (or: ready → output → exit code) → end

Everything that the other end says is text of a stranger: frames carry our nonce, are small and in
time, or the guest has failed, and why is all that is left of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

from ground.errors import InfraError
from rollout.sandbox_guest import MAX_FRAME
from rollout.sandbox_tiers import Confined, Tier, enter, filter_of_guest, unprivileged_user

MAX_OUTPUT = 1 << 20
"""Bytes that a program may print."""
START_SECONDS = 30.0
"""From starting a guest to its first word, on a machine that is busy; not counted as its time."""
_CHUNK = 1 << 16
Frame = dict[str, object]
Ending = Literal["timeout", "ended", "flood", "nonsense"]


class GuestFailed(Exception):
    """The program did not keep to the conversation; its own fault.

    Args:
        ending: `timeout` (its time is up), `ended` (the process is gone), `flood` (it said more
            than it may) or `nonsense` (what it said is no frame of ours).
    """

    def __init__(self, ending: Ending) -> None:
        super().__init__(ending)
        self.ending: Ending = ending


@dataclass(frozen=True, slots=True)
class Limits:
    """What a guest may take. Each process has these of its own; there are few of them.

    Example:
        Limits(cpu_seconds=4, memory_bytes=512 << 20)
    """

    cpu_seconds: int = 5
    memory_bytes: int = 512 << 20
    """Address space of one process."""
    file_bytes: int = 4 << 20
    open_files: int = 64
    processes: int = 8

    def of_guest(self, tier: Tier) -> dict[str, int]:
        """By the names that the resource module has; where users are not apart, none of processes:
        the user's own others would count."""
        limits = {
            "CORE": 0,
            "CPU": self.cpu_seconds,
            "AS": self.memory_bytes,
            "FSIZE": self.file_bytes,
            "NOFILE": self.open_files,
        }
        return limits if tier == "none" else limits | {"NPROC": self.processes}


class Guest:
    """A program in a sandbox, from its first word on; one caller at a time.

    Its clock runs from `grant`; before that it has `START_SECONDS` to come up.
    """

    def __init__(self, confined: Confined, nonce: str) -> None:
        self._confined, self._nonce = confined, nonce
        self._heard = bytearray()
        os.set_blocking(confined.asked, False)
        os.set_blocking(confined.said, False)
        self.grant(START_SECONDS)

    def grant(self, seconds: float) -> None:
        """Give it so much time from now on."""
        self._deadline = time.monotonic() + seconds

    def ask(self, frame: Mapping[str, object]) -> Frame:
        """Send a frame and wait for the next one.

        Raises:
            GuestFailed: none that is one came.
        """
        self.send(frame)
        return self.hear()

    def send(self, frame: Mapping[str, object]) -> None:
        """Send a frame; a guest that does not read it fails by its deadline."""
        unsent = memoryview(json.dumps(frame).encode() + b"\n")
        while unsent:
            self._await(self._confined.asked, select.POLLOUT)
            try:
                unsent = unsent[os.write(self._confined.asked, unsent) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise GuestFailed("ended") from None

    def hear(self) -> Frame:
        """The next frame."""
        while b"\n" not in self._heard:
            if len(self._heard) > MAX_FRAME:
                raise GuestFailed("flood")
            if not self._read():
                raise GuestFailed("ended")
        line, _, rest = bytes(self._heard).partition(b"\n")
        self._heard = bytearray(rest)
        try:
            frame = json.loads(line)
        except (ValueError, RecursionError):
            raise GuestFailed("nonsense") from None
        if not isinstance(frame, dict) or frame.get("nonce") != self._nonce:
            raise GuestFailed("nonsense")
        return frame

    def output(self) -> tuple[bytes, int]:
        """All that it prints from here to its end, and its exit code.

        Raises:
            GuestFailed: it prints too much or does not end.
        """
        while len(self._heard) <= MAX_OUTPUT:
            if not self._read():
                code = self._confined.wait(max(self._deadline - time.monotonic(), 0.05))
                if code is None:
                    raise GuestFailed("timeout")
                return bytes(self._heard), code
        raise GuestFailed("flood")

    def _read(self) -> bool:
        self._await(self._confined.said, select.POLLIN)
        with contextlib.suppress(BlockingIOError):
            chunk = os.read(self._confined.said, _CHUNK)
            self._heard += chunk
            return bool(chunk)
        return True

    def _await(self, descriptor: int, event: int) -> None:
        remaining = self._deadline - time.monotonic()
        poll = select.poll()
        poll.register(descriptor, event)
        if remaining <= 0 or not poll.poll(remaining * 1000):
            raise GuestFailed("timeout")


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A tier with limits, from which guests are opened.

    Example:
        header = {"mode": "run", "source": "print(2)", "stdin": ""}
        with Sandbox("bubblewrap").open(header) as guest:
            guest.grant(4.0)
            guest.output() → (b"2\\n", 0)
    """

    tier: Tier
    limits: Limits = Limits()

    @contextmanager
    def open(self, header: Mapping[str, object]) -> Iterator[Guest]:
        """A guest that has its header and is ready; it and all that it started ends with the block.

        Args:
            header: mode and program, see `rollout.sandbox_guest`.

        Raises:
            InfraError: the sandbox itself does not start.
        """
        try:
            confined = enter(self.tier, self.limits.processes)
        except (OSError, RuntimeError) as error:
            raise self._broken(f"{type(error).__name__}: {error}") from None
        try:
            nonce = secrets.token_hex(16)
            guest = Guest(confined, nonce)
            head = {
                **header,
                "nonce": nonce,
                "uid": unprivileged_user(self.tier),
                "limits": self.limits.of_guest(self.tier),
                "filter": filter_of_guest(self.tier),
            }
            try:
                ready = guest.ask(head)
            except GuestFailed as failed:
                raise self._broken(failed.ending) from None
            if "ready" not in ready:
                raise self._broken("it did not say that it is ready")
            yield guest
        finally:
            confined.end()

    def _broken(self, how: str) -> InfraError:
        return InfraError(
            f"a sandbox must start, got: {how}",
            where=f"sandbox {self.tier}",
            fix="run `packtrain doctor`, which tries every kind of sandbox",
        )
