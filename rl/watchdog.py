"""Watches a life of the loop from the supervisor: what moves, what is waited for, who is silent.

    every second: pulse ─ answered ─▶ rl/loop.json
                    └ none for `silent_seconds` (at first 180) ─▶ stacks, the life is given up
    nothing moves for `watchdog_seconds` ─▶ the log names what is waited for, stacks of all roles
    our own machine is taken away ─▶ the run is asked to save and leave, as by SIGTERM

The pulse is a call to the controller, which renews its lease; a thread named `watchdog` makes it.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol, cast

from ground.console import replace_text
from ground.errors import InfraError
from ground.stacks import collect
from rl.job import Job, Report

LOOP_FILE = "loop.json"
_TICK_SECONDS = 1.0
_ANSWER_SECONDS = 2.0
_FIRST_ANSWER_SECONDS = 180.0
"""A process of its own has to start and to import what it needs."""
_DUMP_SECONDS = 5.0
"""Longest wait for stacks; only a stopped process takes so long."""

logger = logging.getLogger("packtrain")

Pulse = Callable[[float], Mapping[str, object]]
"""Asks the controller how it is and waits for so long; raises TimeoutError, or InfraError once it
is gone."""


class Learner(Protocol):
    """What the watchdog knows of the learner."""

    heard_at: float
    last_report: Report

    @property
    def doing(self) -> str:
        """What its main thread does, in words."""
        ...

    def give_up(self, error: InfraError) -> None:
        """The life is over."""
        ...


class Watchdog:
    """One life's watchdog: `watch` until `stop`.

    Args:
        now: a clock that never jumps.
        leave: asks the run to save and end; called once, if ever.
    """

    def __init__(
        self,
        job: Job,
        pulse: Pulse,
        learner: Learner,
        now: Callable[[], float] = time.monotonic,
        leave: Callable[[], None] = lambda: os.kill(os.getpid(), signal.SIGTERM),
    ) -> None:
        self._job, self._pulse, self._learner, self._now = job, pulse, learner, now
        self._leave, self._is_leaving = leave, False
        self._stopped = threading.Event()
        self._status: Mapping[str, object] = {}
        self._heard = self._moved = now()
        self._mark: object = None
        self._alarm_after = job.section.watchdog_seconds

    def watch(self) -> None:
        """Look every second until the life is over."""
        while not self._stopped.wait(_TICK_SECONDS) and self.look():
            pass

    def stop(self) -> None:
        """The life has ended."""
        self._stopped.set()

    def look(self) -> bool:
        """One look; False when the life is given up."""
        try:
            self._status = self._pulse(_ANSWER_SECONDS)
            self._heard = self._now()
        except TimeoutError:
            silent = self._now() - self._heard
            if silent > self._patience:
                return self._give_up(
                    InfraError(f"the controller must answer, it was silent for {silent:.0f} s")
                )
        except InfraError as error:
            return self._give_up(error)
        self._check_machine()
        self._check_motion()
        self._write()
        return True

    @property
    def _patience(self) -> float:
        """How long the controller may be silent, in seconds."""
        silent_seconds = self._job.section.silent_seconds
        return silent_seconds if self._status else max(silent_seconds, _FIRST_ANSWER_SECONDS)

    def _check_machine(self) -> None:
        if self._status.get("is_taken_away") and not self._is_leaving:
            logger.warning(
                "the machine that learner and controller are on is taken away: the run saves and "
                "ends; go on with --resume where the run's folder is"
            )
            self._is_leaving = True
            self._leave()

    def _check_motion(self) -> None:
        numbers = {key: value for key, value in self._status.items() if key != "since"}
        mark = json.dumps([numbers, self._learner.last_report.step], default=str, sort_keys=True)
        if mark != self._mark:
            self._mark, self._moved = mark, self._now()
            self._alarm_after = self._job.section.watchdog_seconds
        elif self._now() - self._moved > self._alarm_after:
            self._alarm_after *= 2
            logger.warning(
                "nothing has moved for %.0f s: %s", self._now() - self._moved, self._waiting()
            )
            dump_stacks(self._job)

    def _waiting(self) -> str:
        waits_for = self._status.get("waits_for") or f"the learner to {self._learner.doing}"
        workers = cast(list[Mapping[str, object]], self._status.get("workers", []))
        shown = ", ".join(f"{w['name']} is {w['state']} with {w['in_flight']}" for w in workers)
        return f"step {self._status.get('step')} waits for {waits_for}; {shown}"

    def _give_up(self, error: InfraError) -> bool:
        if not self._stopped.is_set():
            dump_stacks(self._job)
            self._learner.give_up(error)
        return False

    def _write(self) -> None:
        silent = self._now() - self._heard
        state = {
            "time": time.time(),
            "life": self._job.incarnation,
            "pid": os.getpid(),
            "controller_silent_seconds": round(silent, 1),
            "learner_heard": self._learner.heard_at,
            "learner": self._learner.doing,
            "learner_step": self._learner.last_report.step,
            "unmoved_seconds": round(self._now() - self._moved, 1),
            **self._status,
        }
        with suppress(OSError):
            replace_text(self._job.directory / LOOP_FILE, json.dumps(state))


def dump_stacks(job: Job) -> None:
    """Have every process of the run write where it stands into log/stacks."""
    folder = stacks_folder(job)
    roles, silent = collect(folder, _DUMP_SECONDS)
    mute = f"; {', '.join(silent)} did not answer" if silent else ""
    logger.warning("stacks of %s are in %s%s", ", ".join(roles) or "nobody", folder, mute)


def stacks_folder(job: Job) -> Path:
    """Where they are written."""
    return job.log_directory / "stacks"


@contextmanager
def watched(job: Job, pulse: Pulse, learner: Learner) -> Iterator[None]:
    """Have a life watched while the body runs."""
    watchdog = Watchdog(job, pulse, learner)
    thread = threading.Thread(target=watchdog.watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        watchdog.stop()
        thread.join(_TICK_SECONDS + _ANSWER_SECONDS)
