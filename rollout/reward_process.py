"""One killable reward process, seen from the side that may kill it.

(none) → started → asked ⇄ idle → killed → (none), and started anew by the next question
"""

from __future__ import annotations

import json
import os
import secrets
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ground.errors import InfraError, RecipeError
from rollout.descendants import end_tree

START_SECONDS = 120.0
"""For starting Python and for importing a verifier's libraries, on a machine that is busy."""
_MAX_REPLY = 64 << 20
_MAX_OUTPUT = 4096
_CHUNK = 1 << 16
_TICK_SECONDS = 0.1
_MARK = "PACKTRAIN_REWARD_PROCESS"
Reply = dict[str, Any]
_ROOT = Path(__file__).resolve().parents[1]


class Silent(Exception):
    """No reply within the deadline; the process has been killed."""


class Died(Exception):
    """The process ended, or replied nonsense, in the middle of a question; it is gone."""


class RewardProcess:
    """A child that answers JSON questions; one caller at a time.

    Args:
        files: Python files with the user's rewards, loaded at each start.
        max_memory_bytes: address space that the child may use.
        environment: variables that it gets besides ours.
    """

    def __init__(
        self,
        files: Sequence[Path],
        max_memory_bytes: int,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._environment = dict(environment or {})
        self._arguments = [str(max_memory_bytes), *map(str, files)]
        self._child: subprocess.Popen[bytes] | None = None
        self._closed = False
        self.names: list[str] = []
        """Rewards that the child knows; filled by its first start."""
        self.loaded: dict[str, bool] = {}
        """Rewards whose libraries it has imported, and whether they want completions one by one;
        its user keeps the list, a restart clears it."""
        self.num_starts = 0
        self.num_asked = 0
        """Questions since the last start."""

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return self._child.pid if self._child is not None else None

    def start(self) -> None:
        """Make sure that it runs.

        Raises:
            RecipeError: one of the files fails; says which line.
            InfraError: it does not come up, or the pool was closed.
        """
        if self._child is not None:
            return
        if self._closed:
            raise InfraError("the reward pool was closed while it was scoring", where="reward pool")
        self._spawn()
        try:
            reply = self._exchange({"do": "start"}, START_SECONDS)
        except (Silent, Died) as error:
            raise InfraError(
                f"a reward process must start within {START_SECONDS:g} s, got: {error}",
                where="reward pool",
                fix=f"run `{sys.executable} -m rollout.reward_child` and look at what it says",
            ) from None
        if "raised" in reply:
            self.kill()
            raise RecipeError(str(reply["raised"]["message"]), where="rewards")
        self.names = list(reply["names"])

    def ask(self, question: Mapping[str, object], deadline_seconds: float) -> Reply:
        """Send a question and wait for its reply.

        Raises:
            Silent: none within the deadline.
            Died: the process ended instead.
            RecipeError, InfraError: it could not be started.
        """
        self.start()
        self.num_asked += 1
        return self._exchange(question, deadline_seconds)

    def kill(self) -> None:
        """End the process and everything that it started."""
        child, self._child = self._child, None
        if child is None:
            return
        self._end_tree(child)
        child.wait()
        self._channel.close()
        os.close(self._output)

    def close(self) -> None:
        """End it for good; only its present user may call this."""
        self._closed = True
        self.kill()

    def interrupt(self) -> None:
        """End it for good from another thread; its user sees it die and clears up."""
        self._closed = True
        child = self._child
        if child is not None:
            self._end_tree(child)

    def _end_tree(self, child: subprocess.Popen[bytes]) -> None:
        end_tree(child.pid if child.returncode is None else None, f"{_MARK}={self._mark}")

    def _spawn(self) -> None:
        self._channel, theirs = socket.socketpair()
        self._output, their_output = os.pipe()
        os.set_blocking(self._output, False)
        self._mark = secrets.token_hex(8)
        self._printed = b""
        path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
        environment = {
            **os.environ,
            **self._environment,
            _MARK: self._mark,
            "PYTHONPATH": path,
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",
        }
        module = [sys.executable, "-m", "rollout.reward_child", str(theirs.fileno())]
        try:
            self._child = subprocess.Popen(
                [*module, *self._arguments],
                stdin=subprocess.DEVNULL,
                stdout=their_output,
                stderr=their_output,
                pass_fds=(theirs.fileno(),),
                env=environment,
                start_new_session=True,
            )
        finally:
            theirs.close()
            os.close(their_output)
        self._channel.setblocking(False)
        self.loaded = {}
        self.num_starts += 1
        self.num_asked = 0

    def _exchange(self, question: Mapping[str, object], deadline_seconds: float) -> Reply:
        nonce = secrets.token_hex(8)
        unsent = memoryview(json.dumps({**question, "nonce": nonce}).encode() + b"\n")
        try:
            line = self._converse(unsent, time.monotonic() + deadline_seconds)
            reply = json.loads(line)
            if not isinstance(reply, dict) or reply.get("nonce") != nonce:
                raise Died("it replied to another question")
        except TimeoutError:
            self.kill()
            raise Silent(f"no reply within {deadline_seconds:g} s{self._said()}") from None
        except (OSError, ValueError) as error:
            raise Died(f"it replied nonsense ({error}){self._end()}") from None
        except Died as died:
            raise Died(f"{died}{self._end()}") from None
        return reply

    def _converse(self, unsent: memoryview, deadline: float) -> bytes:
        """Write, read and drain what the reward prints, all at once, so that none can block."""
        received = bytearray()
        while not received.endswith(b"\n"):
            poll = select.poll()
            poll.register(self._channel, select.POLLIN | (select.POLLOUT if unsent else 0))
            poll.register(self._output, select.POLLIN)
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            events = dict(poll.poll(min(remaining, _TICK_SECONDS) * 1000))
            if events.get(self._output, 0) & select.POLLIN:
                self._printed = (self._printed + os.read(self._output, _CHUNK))[-_MAX_OUTPUT:]
            ready = events.get(self._channel.fileno(), 0)
            if ready & select.POLLOUT:
                unsent = unsent[self._channel.send(unsent) :]
            if ready & (select.POLLIN | select.POLLHUP | select.POLLERR):
                chunk = self._channel.recv(_CHUNK)
                received += chunk
                if not chunk:
                    raise Died("it ended without a reply")
            if not ready and self._child is not None and self._child.poll() is not None:
                raise Died("it ended without a reply")  # a daemon of its may hold the socket open
            if len(received) > _MAX_REPLY:
                raise Died(f"its reply exceeds {_MAX_REPLY} bytes")
        return bytes(received)

    def _end(self) -> str:
        """Kill what is left and say how the process had ended."""
        child = self._child
        if child is None:
            return ""
        try:
            code = child.wait(timeout=0.5)
        except subprocess.TimeoutExpired:
            code = None
        self.kill()
        if code is None:
            return self._said()
        cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return f" ({cause}){self._said()}"

    def _said(self) -> str:
        text = self._printed.decode(errors="replace").strip()
        return f"; it printed: …{text[-200:]}" if text else ""
