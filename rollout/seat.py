"""A worker's place in the fleet: its state, its current life, and what a worker is to it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import chain
from typing import Generic, Protocol, TypeVar

from ground.errors import InfraError
from rollout.task import GroupResult, GroupTask, Loaded, Pong

Value = TypeVar("Value")


class WorkerDiedError(InfraError):
    """The process behind a worker is gone; whatever else was asked of it is lost too."""


class OutOfMemoryError(WorkerDiedError):
    """The process was ended because memory ran out."""


class State(StrEnum):
    """Where a worker is in its life."""

    STARTING = "starting"
    WAITING = "waiting"
    STALE = "stale"
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    DEAD = "dead"
    RESTARTING = "restarting"
    RETIRED = "retired"


class Member(Protocol):
    """One life of whoever has a seat; calls raise `PacktrainError` only and are bounded by the
    caller."""

    @property
    def node(self) -> str:
        """Name of its machine, empty until that is known."""
        ...

    @property
    def is_placed(self) -> bool:
        """Whether a machine has taken it in; until then there may be no room for it."""
        ...

    async def prepare(self) -> None:
        """Return when its process is there and has its libraries."""
        ...

    async def open(self, index: int, slots_share: float = 1.0) -> None:
        """Return when it can take weights and tasks, as the worker of that seat.

        Args:
            slots_share: how many of the engine's slots it opens with, to need less memory.
        """
        ...

    async def ping(self) -> Pong:
        """Return if it lives and its event loop turns."""
        ...

    async def load(self, version: int, weights: object) -> Loaded:
        """Swap weights; returns what it has now."""
        ...

    def kill(self) -> None:
        """End it at once, whatever state it is in."""
        ...

    async def close(self) -> None:
        """End it in order if it still can, and return when its process is gone."""
        ...


class Worker(Member, Protocol):
    """A member that samples."""

    async def rollout(self, task: GroupTask, attempt: int) -> GroupResult:
        """Sample and score one group; cancelling the call cancels the work."""
        ...


Kind = TypeVar("Kind", bound=Member)


@dataclass(frozen=True, slots=True)
class Crew:
    """What messages call those who have seats, and the keys by which they need less.

    Example:
        Crew("teacher", "teachers", "rl.distill.pass_tokens", "rl.distill.num_teachers")
    """

    title: str = "worker"
    all: str = "rollout workers"
    memory_key: str = "rl.engine.num_slots"
    number_key: str = "rl.fleet.num_workers"


WORKERS = Crew()


@dataclass(eq=False, slots=True)
class Seat(Generic[Kind]):
    """A member's place: its current life and its record over all lives."""

    index: int
    title: str = "worker"
    state: State = State.STARTING
    since: float = 0.0
    """Unix seconds at which it came into this state."""
    worker: Kind | None = None
    lost: asyncio.Future[str] = field(default_factory=asyncio.Future)
    """Completed with the cause as soon as somebody finds this life to be over."""
    loading: asyncio.Lock = field(default_factory=asyncio.Lock)
    version: int = -1
    in_flight: int = 0
    lives: int = 0
    failures: int = 0
    """Lives lost since the last finished group."""
    failed_tasks: int = 0
    """Tasks in a row that failed in this life, while it answered pings."""
    causes: list[str] = field(default_factory=list)
    lacked_memory: bool = False
    """Whether this life was ended because memory ran out."""
    memory_losses: int = 0
    """Lives that were."""
    is_leaving: bool = False
    """Whether it ends its groups, gets no others, and then goes."""
    kept_from: frozenset[str] = frozenset()
    """Machines on which this life must not begin."""
    is_void: bool = False
    """Whether this life was ended before any machine had taken it in, to begin it elsewhere."""
    is_drained: bool = False
    """Whether it leaves because its machine is taken away."""
    leave_by: float = math.inf
    """On the loop's clock: groups that it then still has go to others."""
    pong: Pong = field(default_factory=Pong)
    """Its newest answer to a ping."""

    @property
    def name(self) -> str:
        """How messages and events call it."""
        return f"{self.title} {self.index}"

    @property
    def slots_share(self) -> float:
        """Of the engine's slots, with which a life begins: the same would end the same."""
        return 0.5 if self.memory_losses else 1.0

    @property
    def is_serving(self) -> bool:
        """Whether it may be given work."""
        return self.state is State.HEALTHY and not self.lost.done() and not self.is_leaving

    @property
    def is_up(self) -> bool:
        """Whether its present life has come as far as to take weights."""
        return self.state in (State.STALE, State.HEALTHY, State.SUSPECT)

    @property
    def is_retired(self) -> bool:
        """Whether it has gone for good."""
        return self.state is State.RETIRED

    def begin_anew(self) -> None:
        """End a life that no machine has taken in, for it may now be born on more of them."""
        self.is_void = True
        self.lose("a machine that it was kept from is back")

    @property
    def may_go(self) -> bool:
        """Whether it is leaving, and has ended its last group or has no time for that."""
        is_due = asyncio.get_running_loop().time() >= self.leave_by
        return self.is_leaving and (not self.in_flight or is_due)

    def lose(self, cause: str) -> None:
        """Declare the present life over; the first cause counts."""
        _complete(self.lost, cause)

    async def within(
        self,
        seconds: float,
        doing: str,
        call: Awaitable[Value],
        more: Iterable[float] = (),
    ) -> Value:
        """Wait for a call to this life, but no longer than its deadline, nor than it lives.

        Args:
            more: asked each time when the deadline passes; seconds by which it is put off.

        Raises:
            InfraError: the deadline passed (which ends this life) or the life was lost.
        """
        life = self.lost  # by the time we wake up there may be a new one, which is not to blame
        task = asyncio.ensure_future(call)
        try:
            spent, spans = 0.0, chain([seconds], more)
            while not (task.done() or life.done()) and (span := next(spans, None)) is not None:
                await asyncio.wait({task, life}, timeout=span, return_when="FIRST_COMPLETED")
                spent += span
            if task.done():
                return task.result()
            _complete(life, f"{doing} must be done within {round(spent, 2):g} s")
            raise InfraError(life.result(), where=self.name)
        except WorkerDiedError as error:
            if life is self.lost and not life.done():
                self.lacked_memory = isinstance(error, OutOfMemoryError)
            _complete(life, error.what)
            raise
        finally:
            task.cancel()


def _complete(life: asyncio.Future[str], cause: str) -> None:
    if not life.done():
        life.set_result(cause)
