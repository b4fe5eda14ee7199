"""Optional trackers of metrics: trackio, W&B, TensorBoard.

    put → queue (bounded) → thread "sink-<name>": open, write, write, …, close

A tracker is opened, fed and closed in a thread of its own, so that one that hangs holds nobody up.
Only numbers leave the process, never texts or configuration.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from ground.errors import SetupError
from ground.logs import redact

MAX_WAITING = 1000
"""Records that wait for a slow tracker; more are dropped and counted."""
CLOSE_SECONDS = 5.0
"""How long a run's end waits for a tracker."""

_PACKAGES = {"trackio": "trackio", "wandb": "wandb", "tensorboard": "tensorboard"}

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """What a tracker does once it is open."""

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Record the numbers of one step."""
        ...

    def close(self) -> None:
        """Flush and let go."""
        ...


class Sink:
    """A tracker behind a bounded queue and a thread: `open → put … put → close`.

    Args:
        opener: opens the tracker; called in the thread.
    """

    def __init__(self, name: str, opener: Callable[[], Tracker]) -> None:
        self.name = name
        self.num_dropped = 0
        self._queue: queue.Queue[tuple[int, Mapping[str, float]] | None] = queue.Queue(MAX_WAITING)
        self._failed = threading.Event()
        self._thread = threading.Thread(
            target=self._run, args=(opener,), name=f"sink-{name}", daemon=True
        )
        self._thread.start()

    def put(self, step: int, numbers: Mapping[str, float]) -> None:
        """Hand numbers over; returns at once, whatever state the tracker is in."""
        if self._failed.is_set():
            self.num_dropped += 1
            return
        try:
            self._queue.put_nowait((step, numbers))
        except queue.Full:
            self.num_dropped += 1
            if self.num_dropped == 1:
                logger.warning("%s is slow: metrics for it are being dropped", self.name)

    def close(self, timeout_seconds: float = CLOSE_SECONDS) -> None:
        """Let the tracker finish, but no longer than the timeout."""
        with contextlib.suppress(queue.Full):
            self._queue.put(None, timeout=timeout_seconds)
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            logger.warning("%s did not finish within %.0f s", self.name, timeout_seconds)
        if self.num_dropped:
            logger.warning(
                "%s missed %d records; metrics.jsonl is complete", self.name, self.num_dropped
            )

    def _run(self, opener: Callable[[], Tracker]) -> None:
        """The thread: any failure of the tracker ends it with one warning."""
        try:
            tracker = opener()
            while (item := self._queue.get()) is not None:
                tracker.write(*item)
            tracker.close()
        except Exception as error:  # a tracker may fail in any way; training goes on
            self._failed.set()
            logger.warning("%s failed and gets no more metrics: %s", self.name, redact(str(error)))


def open_sinks(names: Sequence[str], directory: Path, run_name: str) -> list[Sink]:
    """Start the trackers that a recipe names.

    Args:
        directory: where TensorBoard files go.
        run_name: name of the run in the tracker, e.g. `tiny/sft`.
    Raises:
        SetupError: a tracker's package is not installed.
    """
    for name in names:
        if importlib.util.find_spec(_PACKAGES[name]) is None:
            raise SetupError(
                f"sinks names {name}, which is not installed",
                fix=f"pip install {_PACKAGES[name]}, or take it out of the recipe's sinks",
            )
    openers: dict[str, Callable[[], Tracker]] = {
        "trackio": lambda: _Trackio(run_name),
        "wandb": lambda: _Wandb(run_name),
        "tensorboard": lambda: _TensorBoard(directory / "tensorboard"),
    }
    return [Sink(name, openers[name]) for name in names]


class _Trackio:
    def __init__(self, run_name: str) -> None:
        import trackio  # pyright: ignore[reportMissingImports]

        self._trackio = trackio
        trackio.init(project="packtrain", name=run_name)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._trackio.log(dict(numbers), step=step)

    def close(self) -> None:
        self._trackio.finish()


class _Wandb:
    def __init__(self, run_name: str) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        self._run = wandb.init(project="packtrain", name=run_name, settings={"console": "off"})

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self._run.log(dict(numbers), step=step)

    def close(self) -> None:
        self._run.finish()


class _TensorBoard:
    def __init__(self, directory: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory))

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        for name, value in numbers.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()
