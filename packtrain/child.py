"""One stage as a child process that cannot outlive us.

    started → running → ended          (stop: SIGTERM to the group; once more: SIGKILL)

The child leads its own process group, so that a Ctrl-C reaches it once, through us, and so that
whatever it leaves behind is swept when it ends. When we die without a chance to act (SIGKILL), the
kernel sends it SIGTERM: it saves and goes, and keeps the run lock until then because it has
inherited the lock's file descriptor.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType

POLL_SECONDS = 0.1
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None, use_errno=True)


class Child:
    """A running stage and the signals that we pass on to it.

    Args:
        line: the command.
        environment: added to our own.
        keep_open: file descriptors that the child inherits (the run lock's).
        output: file for its stdout and stderr; None lets it write to ours.
        grace_seconds: from the first signal to SIGKILL.

    Example:
        with Child(line, {}, keep_open=(), output=None) as child:
            code = child.wait(panel.refresh)
    """

    def __init__(
        self,
        line: Sequence[str],
        environment: Mapping[str, str],
        *,
        keep_open: Sequence[int] = (),
        output: Path | None = None,
        grace_seconds: float = 300.0,
    ) -> None:
        self._line, self._environment = list(line), {**os.environ, **environment}
        self._keep_open, self._output = tuple(keep_open), output
        self._grace_seconds = grace_seconds
        self._kill_at: float | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._handlers: dict[int, Callable[[int, FrameType | None], object] | int | None] = {}
        self.stopped_by: int | None = None
        """The signal that we were asked to stop by, if any."""

    def __enter__(self) -> Child:
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._handlers[number] = signal.signal(number, self._pass_on)
        sink = self._output.open("ab") if self._output else None
        try:
            self._process = subprocess.Popen(
                self._line,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=subprocess.STDOUT if sink else None,
                pass_fds=self._keep_open,
                process_group=0,
                preexec_fn=_DieWithParent(os.getpid()),
            )
        except BaseException:
            self._restore_handlers()
            raise
        finally:
            if sink:
                sink.close()
        if self.stopped_by is not None:
            self._signal_leader()
        return self

    def __exit__(self, *_: object) -> None:
        self._signal_group(signal.SIGKILL)
        self.process.wait()
        self._restore_handlers()

    @property
    def process(self) -> subprocess.Popen[bytes]:
        """The leader of the stage's process group."""
        assert self._process is not None, "the child runs within `with Child(…)`"
        return self._process

    def wait(self, refresh: Callable[[], None], *, every_seconds: float = 1.0) -> int:
        """Wait for the end, calling `refresh` meanwhile; return the exit code.

        An end by signal n counts as 128 + n. There is no deadline on training itself; after a
        signal the child has `grace_seconds`.
        """
        next_refresh = 0.0
        while (code := self.process.poll()) is None:
            if time.monotonic() >= next_refresh:
                refresh()
                next_refresh = time.monotonic() + every_seconds
            if self._kill_at is not None and time.monotonic() >= self._kill_at:
                self._signal_group(signal.SIGKILL)
            time.sleep(POLL_SECONDS)
        refresh()
        return code if code >= 0 else 128 - code

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        """First signal: let the stage save and stop. Second one: end it now."""
        del frame
        if self.stopped_by is not None:
            self._signal_group(signal.SIGKILL)
            return
        self.stopped_by = number
        self._kill_at = time.monotonic() + self._grace_seconds
        self._signal_leader()

    def _signal_leader(self) -> None:
        number = signal.SIGINT if self.stopped_by == signal.SIGINT else signal.SIGTERM
        if self._process is not None and self._process.poll() is None:
            with suppress(ProcessLookupError):  # `wait` is just taking its exit code
                os.kill(self._process.pid, number)

    def _signal_group(self, number: int) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, number)

    def _restore_handlers(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)


class _DieWithParent:
    """Runs between fork and exec: asks the kernel for SIGTERM when the parent is gone.

    Everything it needs is resolved before the fork; it must not import or allocate locks.
    """

    def __init__(self, parent: int) -> None:
        self._parent = parent

    def __call__(self) -> None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
        if os.getppid() != self._parent:
            os._exit(143)


def exit_name(code: int) -> str:
    """`exit code 3`, or the name of the signal that ended the process."""
    if code > 128:
        with suppress(ValueError):
            return signal.Signals(code - 128).name
    return f"exit code {code}"
