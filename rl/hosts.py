"""The rl stage on several ranks: each `rl.train` process hosts its rank's learner, life by life.

    rank 0: supervisor ── life/<n>: the job ──▶ other ranks: host ─▶ learner of life n
                 ▲ ──────── over/<n> ─────────▶                 ─▶ gone, wait for life n + 1
                 └───────── lost/<n>/<rank>: its error            life/<n>: "" ─▶ leave

The words stand in the launcher's store (ground/roll.py), whose holder outlives any learner. Every
host counts its beats there: a learner that is lost costs a life, a host that is lost ends the run.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress

from ground import stacks
from ground.errors import InfraError, PacktrainError, WorkersLostError
from ground.roll import Roll
from ground.signals import Pending, held_signals
from rl.job import Job
from rl.learner_process import LearnerProcess, learner_process
from rl.speaker import error_of, facts_of
from rl.watchdog import dump_stacks, stacks_folder

_BEAT_SECONDS = 0.25
SILENT_SECONDS = 30.0
"""A host without a beat for so long is given up: its process hangs, or its node is gone."""
_FIRST_SECONDS = 300.0
"""The same before its first beat: Python and its libraries may take long to come up."""
_LATE_SECONDS = 3.0
"""How long rank 0, told to leave by the launcher, looks whether another host has died."""
_HURRIED_SECONDS = 10.0
"""How long another host, told so, waits for a beat of rank 0's, which may be busy with saving."""
_CAUSE_SECONDS = 3.0
"""How long after a life was lost another rank may say that it was for a reason of its own."""
_GRACE_SECONDS = 26.0
"""How long a host waits for rank 0 to save after a signal; launchers kill after 30 seconds."""


def _host_lost(rank: int, seconds: float) -> PacktrainError:
    """A process of a launcher is gone, which starts it no more."""
    return WorkersLostError(
        f"rank {rank}'s rl.train must go on, it gave no sign of life for {seconds:g} s",
        where="accelerate launch",
        why="the process was killed or hangs, or its node is gone",
        fix="continue with --resume",
    )


class Hosts:
    """The other ranks' hosts, as rank 0's supervisor sees them.

    Example:
        with Hosts(roll) as hosts, hosts.life(job, learner.give_up): …

    Args:
        lost: what it means that a rank's host was silent for so many seconds.
    """

    def __init__(
        self, roll: Roll, lost: Callable[[int, float], PacktrainError] = _host_lost
    ) -> None:
        self._roll, self._lost, self._next = roll, lost, 0
        self._others = [
            _Beats(roll, rank, SILENT_SECONDS, lost) for rank in range(1, roll.launch.num_ranks)
        ]
        self._is_left = threading.Event()
        self._beating = threading.Thread(target=self._beat, name="beats", daemon=True)

    def __enter__(self) -> Hosts:
        """From now on the other hosts hear that we are there, also between lives."""
        self._beating.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Let the other hosts leave."""
        with suppress(PacktrainError):
            self._roll.tell(f"life/{self._next}", "")
        self._is_left.set()
        self._beating.join()

    def _beat(self) -> None:
        with suppress(PacktrainError):
            while not self._is_left.wait(_BEAT_SECONDS):
                self._roll.beat()

    @contextmanager
    def life(self, job: Job, on_lost: Callable[[PacktrainError], None]) -> Iterator[None]:
        """The other ranks' learners live as long as this lasts.

        Args:
            on_lost: told, from another thread, that a learner or a host is gone.

        Raises:
            PacktrainError: what ended another rank's learner, where that was no lost attempt.
        """
        number, is_over = job.incarnation, threading.Event()
        self._next = number + 1
        self._roll.tell(f"life/{number}", job.model_dump_json())
        watch = threading.Thread(
            target=self._watch, args=(number, is_over, on_lost), name="hosts", daemon=True
        )
        watch.start()
        try:
            yield
        except InfraError:
            if cause := self._cause(number):
                raise cause from None
            raise
        finally:
            is_over.set()
            watch.join()
            with suppress(PacktrainError):
                self._roll.tell(f"over/{number}", "over")

    def require_all(self) -> None:
        """Once we were told to leave: was it because another host has died?

        Raises:
            WorkersLostError: naming the first that gives no sign of life.
        """
        beats = [_Beats(self._roll, each.rank, _LATE_SECONDS, self._lost) for each in self._others]
        deadline = time.monotonic() + _LATE_SECONDS
        while time.monotonic() < deadline and not all(each.has_moved for each in beats):
            for each in beats:
                each.look()
            time.sleep(_BEAT_SECONDS)
        for each in beats:
            if not each.has_moved:
                raise each.lost()

    def _watch(
        self, number: int, is_over: threading.Event, on_lost: Callable[[PacktrainError], None]
    ) -> None:
        try:
            while not is_over.wait(_BEAT_SECONDS):
                for each in self._others:
                    each.require()
                if told := self._told(number):
                    on_lost(told[0])
                    return
        except PacktrainError as error:
            on_lost(error)

    def _told(self, number: int) -> list[PacktrainError]:
        """What ended the other ranks' learners in a life, as far as their hosts have said."""
        names = [f"lost/{number}/{each.rank}" for each in self._others]
        return [error_of(json.loads(word)) for word in map(self._roll.heard, names) if word]

    def _cause(self, number: int) -> PacktrainError | None:
        """Why a life was lost, where trying again would not help.

        One rank's failure looks to all others like a rank that is gone, and they may be faster to
        say so than its host.
        """
        deadline = time.monotonic() + _CAUSE_SECONDS
        with suppress(InfraError):
            while len(told := self._told(number)) < len(self._others):
                if time.monotonic() > deadline or _own(told):
                    break
                time.sleep(_BEAT_SECONDS)
            return next(iter(_own(told)), None)
        return None


def _own(told: Sequence[PacktrainError]) -> list[PacktrainError]:
    """Errors that tell of more than a lost attempt."""
    return [error for error in told if not isinstance(error, InfraError)]


class _Beats:
    """The signs of life of another rank's host."""

    def __init__(
        self,
        roll: Roll,
        rank: int,
        seconds: float,
        lost: Callable[[int, float], PacktrainError] = _host_lost,
    ) -> None:
        self._roll, self.rank, self._seconds, self._lost = roll, rank, seconds, lost
        self._first = self._count = roll.beats(rank)
        self._since = time.monotonic()

    @property
    def has_moved(self) -> bool:
        """Whether there was one since we began to look."""
        return self._count != self._first

    def look(self) -> bool:
        """Whether the last one is recent enough."""
        count = self._roll.beats(self.rank)
        if count != self._count:
            self._count, self._since = count, time.monotonic()
        return time.monotonic() - self._since < self._patience

    @property
    def _patience(self) -> float:
        return self._seconds if self._count else max(self._seconds, _FIRST_SECONDS)

    def hurry(self, seconds: float) -> None:
        """Wait no longer than that from now on."""
        self._seconds = min(self._seconds, seconds)

    def require(self) -> None:
        """Raise where it is not."""
        if not self.look():
            raise self.lost()

    def lost(self) -> PacktrainError:
        """What to say then."""
        return self._lost(self.rank, self._patience)


def host(roll: Roll, environment: Mapping[str, str]) -> None:
    """Any rank but 0: bring a learner up for each life that rank 0 begins, until it says leave.

    Args:
        environment: the launcher's variables, for the learner.
    Raises:
        Interrupted: by a signal, once rank 0 has saved.
        WorkersLostError: rank 0's process is gone.
    """
    life, leader = 0, _Beats(roll, 0, SILENT_SECONDS)
    with held_signals() as pending:
        leave = _Leave(pending)
        while order := _next_word(roll, f"life/{life}", leader, leave):
            _host_life(roll, Job.model_validate_json(order), environment, leader, leave)
            life += 1


def host_life(
    roll: Roll, life: int, at_home: Callable[[Job], Job], environment: Mapping[str, str]
) -> None:
    """Any rank but 0, where nobody but rank 0 tells us to go: host its learner for one life.

    Args:
        at_home: the same job with the places of its files on this machine.
    Raises:
        WorkersLostError: rank 0's process is gone.
    """
    leader, leave = _Beats(roll, 0, SILENT_SECONDS), _Leave(Pending())
    if order := _next_word(roll, f"life/{life}", leader, leave):
        job = at_home(Job.model_validate_json(order))
        _host_life(roll, job, environment, leader, leave)


class _Leave:
    """Whether the launcher wants us to go, and whether rank 0 was given time enough to save."""

    def __init__(self, pending: Pending) -> None:
        self._pending, self._since = pending, 0.0

    @property
    def is_asked(self) -> bool:
        """A signal has come."""
        if self._pending.requested and not self._since:
            self._since = time.monotonic()
        return self._pending.requested

    @property
    def is_due(self) -> bool:
        """It came long ago."""
        return self.is_asked and time.monotonic() - self._since > _GRACE_SECONDS


def _next_word(roll: Roll, name: str, leader: _Beats, leave: _Leave) -> str:
    """Wait for a word of rank 0's; empty is the order to leave."""
    while (word := roll.heard(name)) is None:
        if leave.is_due:
            return ""
        _beat(roll, leader, leave)
    return word


def _beat(roll: Roll, leader: _Beats, leave: _Leave) -> None:
    roll.beat()
    if leave.is_asked:
        leader.hurry(_HURRIED_SECONDS)
    leader.require()
    time.sleep(_BEAT_SECONDS)


def _host_life(
    roll: Roll, job: Job, environment: Mapping[str, str], leader: _Beats, leave: _Leave
) -> None:
    number, rank, told = job.incarnation, roll.launch.rank, False
    # The learner offers its stacks where rank 0's supervisor collects them.
    os.environ[stacks.VARIABLE] = str(stacks_folder(job))
    with learner_process(job, lambda: dump_stacks(job), environment) as learner:
        ear = _Ear(learner, rank)
        while roll.heard(f"over/{number}") is None and not leave.is_due:
            if not told and (error := ear.error):
                roll.tell(f"lost/{number}/{rank}", json.dumps(facts_of(error)))
                told = True
            _beat(roll, leader, leave)


class _Ear:
    """Hears a rank's learner to its end, from a thread, so that what ended it can be told."""

    def __init__(self, learner: LearnerProcess, rank: int) -> None:
        self._learner, self._rank = learner, rank
        self._heard: PacktrainError | None = None
        self._thread = threading.Thread(target=self._listen, name="ear", daemon=True)
        self._thread.start()

    @property
    def error(self) -> PacktrainError | None:
        """What ended it, unless that was in order."""
        if not self._thread.is_alive() and not self._heard and (how := self._learner.ended_by()):
            return self._named(InfraError(f"the learner must go on, it {how}", where="rl"))
        return self._heard

    def _listen(self) -> None:
        try:
            while (report := self._learner.hear()).kind != "done":
                if report.kind == "failed":
                    raise error_of(report.facts)
        except PacktrainError as error:
            self._heard = self._named(error)

    def _named(self, error: PacktrainError) -> PacktrainError:
        error.where = ", ".join(filter(None, (f"rank {self._rank}", error.where)))
        return error
