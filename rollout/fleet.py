"""The rollout workers of a run as one: gives groups to whoever is well, and again if he is lost.

    rollout(task) → attempt on a healthy worker → Group
                        └─ lost, late, or failed for no fault of the task ─▶ next attempt elsewhere

Who is well is the roster's business (rollout/roster.py), who gets a group the dealer's
(rollout/dealer.py); here are a group's deadlines and what the fleet has done.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from ground.errors import InfraError
from ground.records import Group
from rollout.config import FleetSection
from rollout.dealer import Dealer
from rollout.machines import Machines, StillMachines
from rollout.roster import Event, Roster
from rollout.seat import WORKERS, Crew, Seat, Worker
from rollout.task import GroupResult, GroupTask

_FIX = "look at the workers' logs for what this prompt does to them"


@dataclass(frozen=True, slots=True)
class WorkerStats:
    """One seat of the fleet.

    Example:
        WorkerStats("worker 0", "healthy", since=1763730384.1, version=7, in_flight=3, lives=1,
                    failed_tasks=0, cause="")
    """

    name: str
    state: str
    since: float
    """Unix seconds at which it came into this state."""
    version: int
    """Of its weights; -1 before it has acknowledged any."""
    in_flight: int
    lives: int
    failed_tasks: int
    """In a row, while it answers pings: such a worker is replaced after three."""
    cause: str
    """Why it was lost the last time."""


@dataclass(frozen=True, slots=True)
class FleetStats:
    """How the fleet is doing.

    Example:
        FleetStats(workers=(…, …), groups=310, tokens=81_200, restarts=1, retries=4)
    """

    workers: tuple[WorkerStats, ...]
    groups: int
    """Finished since the start."""
    tokens: int
    restarts: int
    retries: int
    """Attempts that were lost with their worker, or failed on it, and made again."""
    verdicts: dict[str, int] = field(default_factory=dict)
    """What the living workers' reward pools have counted; failures by kind, which score 0."""

    @property
    def states(self) -> tuple[str, ...]:
        """State of each worker."""
        return tuple(worker.state for worker in self.workers)

    @property
    def in_flight(self) -> int:
        """Groups that workers are busy with."""
        return sum(worker.in_flight for worker in self.workers)


@dataclass(frozen=True, slots=True)
class FleetUse:
    """What a fleet has done since it began, by which its speed is known.

    Example:
        FleetUse(workers=2, filled_seconds=118.0, rollouts=2_560, reward_seconds=6.2)
    """

    workers: int
    """That stay."""
    filled_seconds: float
    """Seconds of workers, each weighed by how full it was of groups."""
    rollouts: int
    """Of finished groups."""
    reward_seconds: float
    """From the last token of a group to its last verdict, summed over groups."""


class Fleet:
    """Spreads tasks over workers and hands weights to all of them.

    Lives on one asyncio loop: `start → publish → rollout …, publish … → close`.

    Args:
        spawn: makes a new worker (`RayWorker`); returns at once.
        note: receives an event for the timeline, kinds "rollout" and those of the roster.
        machines: on which the workers are; without them nothing ever happens to these.
        full_at: groups with which a worker is full.
        now: the clock by which its use is measured.
        crew: what its workers are called.
        most_each: groups that a worker is given at a time; others wait for a place, where no
            deadline runs. Of itself whoever asks decides how many there are.
    """

    def __init__(
        self,
        section: FleetSection,
        spawn: Callable[[], Worker],
        note: Callable[[Event], None] = lambda event: None,
        machines: Machines | None = None,
        *,
        full_at: float = 1.0,
        now: Callable[[], float] = time.monotonic,
        crew: Crew = WORKERS,
        most_each: float = math.inf,
    ) -> None:
        self._section, self._note = section, note
        self._full_at, self._now = full_at, now
        self._filled = self._filled_seconds = self._reward_seconds = 0.0
        self._rollouts, self._since = 0, now()
        self._roster = Roster(section, spawn, note, machines or StillMachines(), crew)
        self._dealer = Dealer(self._roster, section.max_attempts, most_each, self._loaded)
        self._groups = self._tokens = 0

    async def start(self) -> None:
        """Bring up all workers; returns when each has answered or been given up.

        Raises:
            WorkersLostError: fewer than `min_workers` came up.
        """
        await self._roster.start()

    async def publish(self, version: int, weights: object) -> None:
        """Load a version into all workers in flight; returns when all that serve have it.

        They load side by side; one that does not acknowledge in time is replaced.

        Raises:
            WorkersLostError: too few workers are left.
            DataError: the weights do not fit the model.
        """
        await self._roster.refit(version, weights)

    async def rollout(self, task: GroupTask) -> Group:
        """Have a group sampled and scored by the worker with the least to do.

        Raises:
            InfraError: `max_attempts` workers were lost under it.
            WorkersLostError: too few workers are left.
            PacktrainError: what the worker says is wrong with the task.
        """

        async def attempt(seat: Seat[Worker], number: int) -> Group:
            return await self._attempt(seat, task, number)

        return await self._dealer.deal(f"group {task.id}", attempt, where="fleet", fix=_FIX)

    def resize(self, num_workers: int) -> None:
        """Have so many workers from now on; see `Roster.resize`."""
        self._roster.resize(num_workers)

    def use(self) -> FleetUse:
        """What the fleet has done since it began.

        Raises:
            PacktrainError: what the fleet failed with.
        """
        self._roster.check()
        self._count(0.0)
        active = len(self._roster.staying)
        return FleetUse(active, self._filled_seconds, self._rollouts, self._reward_seconds)

    def stats(self) -> FleetStats:
        """A snapshot."""
        return FleetStats(
            workers=tuple(map(stats_of, self._roster.seats)),
            groups=self._groups,
            tokens=self._tokens,
            restarts=self._roster.restarts,
            retries=self._dealer.retries,
            verdicts=dict(sum((Counter(s.pong.verdicts) for s in self._roster.seats), Counter())),
        )

    async def close(self) -> None:
        """End all workers; their processes are gone when this returns."""
        await self._roster.close()

    async def _attempt(self, seat: Seat[Worker], task: GroupTask, attempt: int) -> Group:
        assert seat.worker
        started = time.time()
        result = await seat.within(
            self._section.rollout_deadline_seconds,
            f"group {task.id}",
            seat.worker.rollout(task, attempt),
            more=self._put_offs(seat, task, attempt),
        )
        _check_is_ours(result, task, attempt)
        self._groups += 1
        self._tokens += result.num_tokens
        self._rollouts += len(result.group.rollouts)
        self._reward_seconds += result.ended - result.sampled
        self._mark(seat, started, task, attempt, result)
        return result.group

    def _loaded(self, before: int, now: int) -> None:
        """A worker got a group, or is rid of one."""
        self._count(min(now / self._full_at, 1.0) - min(before / self._full_at, 1.0))

    def _count(self, change: float) -> None:
        """Sum up how full the workers were until now; from now on it is so much more."""
        now = self._now()
        self._filled_seconds += self._filled * (now - self._since)
        self._since, self._filled = now, self._filled + change

    def _put_offs(self, seat: Seat[Worker], task: GroupTask, attempt: int) -> Iterator[float]:
        """Seconds that a group still has when its deadline has passed.

        The deadline is for sampling and begins with its first place in the engine. Then verifiers
        may take their time, its turn included: each answer is tried at most twice, hanging ones
        are killed one by one, and a sound worker must not be blamed for them.
        """
        id_, section = task.attempt_id(attempt), self._section
        while (left := _left(seat, id_, section.rollout_deadline_seconds)) > 0:
            yield max(left, section.ping_every_seconds)
        if id_ in seat.pong.scoring:
            turns = 1 + seat.in_flight // section.reward_processes
            yield turns * 2 * len(task.seeds) * section.reward_deadline_seconds

    def _mark(
        self, seat: Seat[Worker], started: float, task: GroupTask, attempt: int, result: GroupResult
    ) -> None:
        now = time.time()
        event: Event = {"time": now, "kind": "rollout", "role": seat.name}
        event |= {"start": started, "end": now, "group": task.id, "attempt": attempt}
        event |= {"tokens": result.num_tokens, "version": result.group.oldest_version}
        self._note(event)


def _left(seat: Seat[Worker], attempt_id: str, deadline_seconds: float) -> float:
    """What an attempt has left of its sampling time, as of the worker's last ping."""
    return deadline_seconds - seat.pong.sampling.get(attempt_id, math.inf)


def _check_is_ours(result: GroupResult, task: GroupTask, attempt: int) -> None:
    """An answer to another attempt is a zombie's: its worker was given up in the meantime."""
    if (result.group.id, result.attempt) != (task.id, attempt):
        raise InfraError(
            f"an answer to attempt {attempt} at group {task.id} was asked for, got one to attempt "
            f"{result.attempt} at {result.group.id}",
            where="fleet",
        )


def stats_of(seat: Seat) -> WorkerStats:
    """A snapshot of one seat."""
    return WorkerStats(
        name=seat.name,
        state="leaving" if seat.is_leaving and not seat.is_retired else str(seat.state),
        since=seat.since,
        version=seat.version,
        in_flight=seat.in_flight,
        lives=seat.lives,
        failed_tasks=seat.failed_tasks,
        cause=seat.causes[-1] if seat.causes else "",
    )
