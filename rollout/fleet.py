"""The rollout workers of a run: who is well, who gets what, and what happens to the lost.

    starting → stale → healthy → dead → restarting → starting …
                                   └──▶ retired (restart budget spent)

Only a healthy worker gets tasks, and it becomes healthy by acknowledging the current weights. One
coroutine per seat, `_tend`, carries it around this picture. A worker that dies, hangs or passes a
deadline is killed and replaced; its tasks go to others with the next attempt number.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from ground.errors import InfraError, PacktrainError, WorkersLostError
from ground.records import Group
from rollout.config import FleetSection
from rollout.seat import Seat, State, Worker
from rollout.task import GroupTask

logger = logging.getLogger(__name__)

Event = dict[str, object]

_MAX_FAILED_TASKS = 3
"""Tasks in a row that may fail on a worker which still answers pings, before it is replaced."""


@dataclass(frozen=True, slots=True)
class FleetStats:
    """How the fleet is doing.

    Example:
        FleetStats(states=("healthy", "restarting"), in_flight=5, groups=310, tokens=81_200,
                   restarts=1, retries=4)
    """

    states: tuple[str, ...]
    in_flight: int
    groups: int
    """Finished since the start."""
    tokens: int
    restarts: int
    retries: int
    """Attempts that were lost with their worker and made again."""


class Fleet:
    """Keeps `section.num_workers` workers going and spreads tasks over them.

    Lives on one asyncio loop: `start → publish → rollout …, publish … → close`.

    Args:
        spawn: makes a new worker (`RayWorker`) for a seat by its index; returns at once.
        note: receives an event for the timeline, kinds "rollout" and "restart".
    """

    def __init__(
        self,
        section: FleetSection,
        spawn: Callable[[int], Worker],
        note: Callable[[Event], None] = lambda event: None,
    ) -> None:
        self._section, self._spawn, self._note = section, spawn, note
        self._seats: list[Seat] = []
        self._tending: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()
        self._weights: tuple[int, object] | None = None
        self._failure: PacktrainError | None = None
        self._groups = self._tokens = self._restarts = self._retries = 0

    async def start(self) -> None:
        """Bring up all workers; returns when each has answered or been given up.

        Raises:
            WorkersLostError: none came up.
        """
        self._seats = [Seat(index) for index in range(self._section.num_workers)]
        self._tending = [
            asyncio.create_task(self._tend(seat), name=seat.name) for seat in self._seats
        ]
        unborn = {State.STARTING, State.DEAD, State.RESTARTING}
        await self._until(lambda: all(seat.state not in unborn for seat in self._seats))

    async def publish(self, version: int, weights: object) -> None:
        """Load a version into all workers in flight; returns when all that live have it.

        They load side by side; one that does not acknowledge in time is replaced.

        Raises:
            WorkersLostError: no worker is left.
            DataError: the weights do not fit the model.
        """
        self._weights = (version, weights)
        self._tell()
        await asyncio.gather(
            *(self._refit(seat) for seat in self._seats if seat.state is State.HEALTHY)
        )
        await self._until(
            lambda: (
                any(seat.state is State.HEALTHY for seat in self._seats)
                and not any(seat.state is State.STALE for seat in self._seats)
            )
        )

    async def rollout(self, task: GroupTask) -> Group:
        """Have a group sampled and scored by the worker with the least to do.

        Raises:
            InfraError: `max_attempts` workers were lost under it.
            WorkersLostError: no worker is left.
            PacktrainError: what the worker says is wrong with the task.
        """
        causes: list[str] = []
        for attempt in range(self._section.max_attempts):
            seat = await self._least_loaded()
            try:
                return await self._attempt(seat, task, attempt)
            except InfraError as error:
                causes.append(f"{seat.name}: {error.what}")
                self._retries += 1
        raise InfraError(
            f"group {task.id} must be done in {self._section.max_attempts} attempts",
            where="fleet",
            why="; ".join(causes),
            fix="look at the workers' logs for what this prompt does to them",
        )

    def stats(self) -> FleetStats:
        """A snapshot."""
        return FleetStats(
            states=tuple(str(seat.state) for seat in self._seats),
            in_flight=sum(seat.in_flight for seat in self._seats),
            groups=self._groups,
            tokens=self._tokens,
            restarts=self._restarts,
            retries=self._retries,
        )

    async def close(self) -> None:
        """End all workers; their processes are gone when this returns."""
        self._fail(InfraError("the fleet was closed", where="fleet"))
        for task in self._tending:
            task.cancel()
        await asyncio.gather(*self._tending, return_exceptions=True)
        for seat in self._seats:
            seat.lose("the fleet was closed")
        workers = [seat.worker for seat in self._seats if seat.worker]
        await asyncio.gather(*(worker.close() for worker in workers))

    async def _attempt(self, seat: Seat, task: GroupTask, attempt: int) -> Group:
        assert seat.worker
        started = time.time()
        seat.in_flight += 1
        try:
            result = await seat.within(
                self._section.rollout_deadline_seconds,
                f"group {task.id}",
                seat.worker.rollout(task, attempt),
            )
        except InfraError as error:
            self._count_failure(seat, error)
            raise
        finally:
            seat.in_flight -= 1
            self._tell()
        seat.failures = seat.failed_tasks = 0
        self._groups += 1
        self._tokens += result.num_tokens
        self._mark(
            "rollout",
            seat,
            started,
            group=task.id,
            attempt=attempt,
            tokens=result.num_tokens,
            version=result.group.oldest_version,
        )
        return result.group

    def _count_failure(self, seat: Seat, error: InfraError) -> None:
        """A worker may answer pings and still do no work: too many in a row end its life."""
        seat.failed_tasks += 1
        if seat.failed_tasks >= _MAX_FAILED_TASKS:
            seat.lose(f"{seat.failed_tasks} groups in a row failed, the last with: {error.what}")

    async def _least_loaded(self) -> Seat:
        def healthy() -> list[Seat]:
            return [s for s in self._seats if s.state is State.HEALTHY and not s.lost.done()]

        await self._until(lambda: bool(healthy()))
        return min(healthy(), key=lambda seat: (seat.in_flight, seat.index))

    async def _tend(self, seat: Seat) -> None:
        """Carry a seat around its life for as long as the restart budget lasts."""
        try:
            while True:
                began = time.time()
                await self._live(seat, began)
                self._bury(seat)
                if seat.failures > self._section.max_restarts:
                    return self._retire(seat)
                self._move(seat, State.RESTARTING)
                await asyncio.sleep(self._section.backoff_seconds * 2 ** (seat.failures - 1))
                self._restarts += 1
        except PacktrainError as error:
            self._fail(error)
        except Exception as error:
            self._fail(PacktrainError(f"{seat.name}: {type(error).__name__}: {error}"))
            raise

    async def _live(self, seat: Seat, began: float) -> None:
        """One life, from birth to the loss; returns when it is over."""
        section = self._section
        seat.lost, seat.version, seat.failed_tasks = asyncio.Future(), -1, 0
        self._move(seat, State.STARTING)
        try:
            seat.worker = self._spawn(seat.index)
            await seat.within(section.start_deadline_seconds, "starting", seat.worker.open())
            self._move(seat, State.STALE)
            await self._become_healthy(seat)
            if seat.failures:
                self._mark("restart", seat, began, cause=seat.causes[-1])
            while True:
                await asyncio.wait({seat.lost}, timeout=section.ping_every_seconds)
                await seat.within(section.ping_deadline_seconds, "a ping", seat.worker.ping())
        except InfraError as error:
            seat.lose(error.what)

    async def _become_healthy(self, seat: Seat) -> None:
        """Load the current weights until they still are the current ones when acknowledged."""
        assert seat.worker
        while self._weights is None:
            await asyncio.wait({seat.lost}, timeout=self._section.ping_every_seconds)
            await seat.within(self._section.ping_deadline_seconds, "a ping", seat.worker.ping())
        while self._weights[0] != seat.version:
            await self._load(seat, *self._weights)
        self._move(seat, State.HEALTHY)

    async def _refit(self, seat: Seat) -> None:
        """Load the current weights into a healthy worker; a loss is left to `_tend`."""
        assert self._weights
        with suppress(InfraError):
            await self._load(seat, *self._weights)

    async def _load(self, seat: Seat, version: int, weights: object) -> None:
        assert seat.worker
        seconds = self._section.publish_deadline_seconds
        try:
            acked = await seat.within(
                seconds, f"loading version {version}", seat.worker.load(version, weights)
            )
        except InfraError as error:
            seat.lose(error.what)
            raise
        if acked != version:
            seat.lose(f"version {version} must be acknowledged, got {acked}")
            raise InfraError(seat.lost.result(), where=seat.name)
        seat.version = version

    def _bury(self, seat: Seat) -> None:
        cause = seat.lost.result()
        seat.failures += 1
        seat.causes.append(cause)
        if seat.worker:
            seat.worker.kill()
            seat.worker = None
        logger.warning("%s is lost (%d in a row): %s", seat.name, seat.failures, cause)
        self._move(seat, State.DEAD)

    def _retire(self, seat: Seat) -> None:
        self._move(seat, State.RETIRED)
        if any(other.state is not State.RETIRED for other in self._seats):
            return
        self._fail(
            WorkersLostError(
                f"at least one rollout worker must live, all {len(self._seats)} are lost after "
                f"{self._section.max_restarts} restarts in a row",
                where="fleet",
                why="; ".join(f"{each.name}: {each.causes[-1]}" for each in self._seats),
                fix="mend the cause, then go on with --resume",
            )
        )

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Wait until a change of state makes this true, or the fleet has failed."""
        seconds = self._patience_seconds
        try:
            async with asyncio.timeout(seconds):
                while self._failure is None and not condition():
                    await self._changed.wait()
        except TimeoutError:
            states = ", ".join(f"{seat.name} {seat.state}" for seat in self._seats)
            raise InfraError(
                f"workers must be ready within {seconds:g} s, they are: {states}", where="fleet"
            ) from None
        if self._failure is not None:
            raise self._failure

    @property
    def _patience_seconds(self) -> float:
        """Longest time that a worker may spend on coming up, over all its lives."""
        section, lives = self._section, self._section.max_restarts + 1
        life = section.start_deadline_seconds + section.publish_deadline_seconds
        return lives * life + section.backoff_seconds * 2**lives

    def _tell(self) -> None:
        """Wake everybody who waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _move(self, seat: Seat, state: State) -> None:
        seat.state = state
        self._tell()

    def _fail(self, error: PacktrainError) -> None:
        """From now on every call raises this; the first failure counts."""
        self._failure = self._failure or error
        self._tell()

    def _mark(self, kind: str, seat: Seat, start: float, **details: object) -> None:
        now = time.time()
        event: Event = {"time": now, "kind": kind, "role": seat.name, "start": start, "end": now}
        self._note(event | details)
