"""The seats of a fleet and what keeps them filled: births, weights, pings, losses, restarts.

    starting → stale → healthy ⇄ suspect (a ping is late: no new work until it answers)
       ▲                  └────────┴──▶ dead → restarting ┐
       └──────────────────────────────────────────────────┘
                                             └──▶ retired (restart budget spent, or dismissed)

A worker becomes healthy by acknowledging the current weights, and in no other way. One coroutine
per seat, `_tend`, carries it around this picture. `resize` adds seats, or dismisses some: these get
no new groups, end those that they have under the weights of the day, and go.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextlib import suppress

from ground.errors import InfraError, PacktrainError, WorkersLostError
from rollout.config import FleetSection
from rollout.seat import Seat, State, Worker
from rollout.spare import Spare

logger = logging.getLogger(__name__)

Event = dict[str, object]

_UNBORN = (State.STARTING, State.DEAD, State.RESTARTING)
_UP = (State.STALE, State.HEALTHY, State.SUSPECT)


class Roster:
    """Fills `section.num_workers` seats and keeps them under the current weights.

    Lives on one asyncio loop: `start → refit … → close`; `until` waits for changes.

    Args:
        spawn: makes a new worker; returns at once.
        note: receives an event for the timeline, kinds "lost" and "restart".
    """

    def __init__(
        self, section: FleetSection, spawn: Callable[[], Worker], note: Callable[[Event], None]
    ) -> None:
        self._section, self._spawn, self._note = section, spawn, note
        self.seats: list[Seat] = []
        self._spare = Spare(section, spawn, self._quiet)
        self._background: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()
        self._weights: tuple[int, object] | None = None
        self._failure: PacktrainError | None = None
        self.restarts = 0

    async def start(self) -> None:
        """Bring up all workers; returns when each has answered or been given up.

        Raises:
            WorkersLostError: fewer than `min_workers` came up.
        """
        self.resize(self._section.num_workers)
        if self._section.spare:
            self._background.append(asyncio.create_task(self._keep_spare(), name="spare worker"))
        await self.until(lambda: all(seat.state not in _UNBORN for seat in self.seats))

    def resize(self, num_workers: int) -> None:
        """Have so many workers from now on, `min_workers` at least: new ones come up, or those that
        do not serve leave, and then the youngest.

        Nothing waits here. A new one is given work when it has the current weights, one that leaves
        ends what it has begun; no group is lost or sampled twice.

        Raises:
            PacktrainError: what the fleet failed with.
        """
        self.check()
        num_workers = max(num_workers, self._section.min_workers)
        staying = sorted(self.staying, key=lambda seat: (not seat.is_serving, seat.index))
        for seat in staying[num_workers:]:
            seat.is_leaving = True
        for _ in range(num_workers - len(staying)):
            seat = Seat(len(self.seats))
            self.seats.append(seat)
            self._background.append(asyncio.create_task(self._tend(seat), name=seat.name))
        self.tell()

    @property
    def staying(self) -> list[Seat]:
        """Seats that are filled, or will be again; never fewer than `min_workers` but the fleet has
        failed."""
        return [seat for seat in self.seats if not seat.is_leaving and not seat.is_retired]

    async def refit(self, version: int, weights: object) -> None:
        """Load a version everywhere; returns when all that serve have it, and one at least does.

        Raises:
            WorkersLostError: too few workers are left.
            DataError: the weights do not fit the model.
        """
        self._weights = (version, weights)
        self.tell()
        serving = [seat for seat in self.seats if seat.state is State.HEALTHY]
        await asyncio.gather(*(self._refit(seat) for seat in serving))
        await self.until(
            lambda: (
                any(seat.state is State.HEALTHY for seat in self.seats)
                and not any(seat.state is State.STALE for seat in self.seats)
            )
        )

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a change makes this true, or the fleet has failed.

        Raises:
            InfraError: workers take longer than all their lives may.
            PacktrainError: what the fleet failed with.
        """
        seconds = self._patience_seconds
        try:
            async with asyncio.timeout(seconds):
                while self._failure is None and not condition():
                    await self._changed.wait()
        except TimeoutError:
            states = ", ".join(f"{seat.name} {seat.state}" for seat in self.seats)
            raise InfraError(
                f"workers must be ready within {seconds:g} s, they are: {states}", where="fleet"
            ) from None
        self.check()

    def check(self) -> None:
        """Nothing more comes of a fleet that has failed.

        Raises:
            PacktrainError: what it failed with.
        """
        if self._failure is not None:
            raise self._failure

    def tell(self) -> None:
        """Wake everybody who waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def close(self) -> None:
        """End all workers; their processes are gone when this returns."""
        self._fail(InfraError("the fleet was closed", where="fleet"))
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        for seat in self.seats:
            seat.lose("the fleet was closed")
        workers = [seat.worker for seat in self.seats if seat.worker]
        await asyncio.gather(self._spare.close(), *(worker.close() for worker in workers))

    async def _tend(self, seat: Seat) -> None:
        """Carry a seat around its life for as long as the restart budget lasts."""
        try:
            while True:
                began = time.time()
                await self._live(seat, began)
                if seat.lost.done():
                    self._bury(seat)
                if not seat.is_leaving:
                    if seat.failures > self._section.max_restarts:
                        return self._retire(seat)
                    self._move(seat, State.RESTARTING)
                    await asyncio.sleep(self._pause_seconds(seat.failures))
                if seat.is_leaving:
                    return await self._dismiss(seat)
                self.restarts += 1
        except PacktrainError as error:
            self._fail(error)
        except Exception as error:
            self._fail(PacktrainError(f"{seat.name}: {type(error).__name__}: {error}"))
            raise

    async def _keep_spare(self) -> None:
        """Nothing that a fleet runs in the background may end unseen."""
        try:
            await self._spare.run()
        except Exception as error:
            self._fail(PacktrainError(f"the spare worker: {type(error).__name__}: {error}"))
            raise

    def _pause_seconds(self, failures: int) -> float:
        """None before the first restart: a worker that served well comes back at once."""
        return self._section.backoff_seconds * 2 ** (failures - 2) if failures > 1 else 0.0

    async def _live(self, seat: Seat, began: float) -> None:
        """One life, from birth to the loss or dismissal; returns when it is over."""
        seat.lost, seat.version, seat.failed_tasks = asyncio.Future(), -1, 0
        seat.lacked_memory = False
        seat.lives += 1
        self._move(seat, State.STARTING)
        try:
            seat.worker = self._spare.take() or self._spawn()
            await seat.within(
                self._section.start_deadline_seconds,
                "starting",
                seat.worker.open(seat.index, seat.slots_share),
            )
            await self._become_healthy(seat)
            if seat.failures:
                self._mark("restart", seat, began, cause=seat.causes[-1])
            while not seat.may_go:
                await self._ping(seat)
                if seat.state is State.SUSPECT:
                    await self._become_healthy(seat)
        except InfraError as error:
            seat.lose(error.what)

    async def _ping(self, seat: Seat) -> None:
        """After a while, ask whether it lives; a late answer makes it a suspect meanwhile."""
        assert seat.worker
        section = self._section
        await asyncio.wait({seat.lost}, timeout=section.ping_every_seconds)
        loop = asyncio.get_running_loop()
        suspicion = loop.call_later(section.suspect_after_seconds, self._suspect, seat)
        try:
            answer = seat.worker.ping()
            seat.pong = await seat.within(section.ping_deadline_seconds, "a ping", answer)
        finally:
            suspicion.cancel()

    def _suspect(self, seat: Seat) -> None:
        if seat.is_serving:
            logger.warning("%s is late with a ping: it gets no new work", seat.name)
            self._move(seat, State.SUSPECT)

    async def _become_healthy(self, seat: Seat) -> None:
        """Load the current weights until they still are the current ones when acknowledged."""
        if self._weights is None or self._weights[0] != seat.version:
            self._move(seat, State.STALE)
        while self._weights is None:
            await self._ping(seat)
        while self._weights[0] != seat.version:
            await self._load(seat, *self._weights)
        self._move(seat, State.HEALTHY)

    async def _refit(self, seat: Seat) -> None:
        """Load the current weights into a healthy worker; a loss is left to `_tend`."""
        assert self._weights
        with suppress(InfraError):
            await self._load(seat, *self._weights)

    async def _load(self, seat: Seat, version: int, weights: object) -> None:
        """Weights into a life that is up; one that ends first leaves them to the next life."""
        seconds = self._section.publish_deadline_seconds
        async with seat.loading:
            if seat.version == version:
                return
            if seat.worker is None or seat.state not in _UP:
                raise InfraError(f"{seat.name} is {seat.state}", where="fleet")
            started = time.time()
            try:
                loaded = await seat.within(
                    seconds, f"loading version {version}", seat.worker.load(version, weights)
                )
            except InfraError as error:
                seat.lose(error.what)
                raise
            if loaded.version != version:
                seat.lose(f"version {version} must be acknowledged, got {loaded.version}")
                raise InfraError(seat.lost.result(), where=seat.name)
            seat.version = version
            phases = {f"{phase}_seconds": each for phase, each in loaded.seconds.items()}
            self._mark("handover", seat, started, version=version, drift=loaded.drift, **phases)

    def _bury(self, seat: Seat) -> None:
        cause = seat.lost.result()
        seat.failures += 1
        seat.causes.append(cause)
        if seat.worker:
            seat.worker.kill()
            seat.worker = None
        logger.warning("%s is lost (%d in a row): %s", seat.name, seat.failures, cause)
        seat.memory_losses += seat.lacked_memory
        if seat.memory_losses == 1 and seat.lacked_memory:
            logger.warning("%s has half of rl.engine.num_slots from now on", seat.name)
        self._move(seat, State.DEAD)
        self._mark("lost", seat, time.time(), cause=cause)

    async def _dismiss(self, seat: Seat) -> None:
        """A seat that leaves has ended its groups, or was lost and these went to others.

        It has its worker until this is gone, so that a fleet that is closed meanwhile sees it.
        """
        seat.lose("dismissed")
        self._move(seat, State.RETIRED)
        self._mark("dismissed", seat, time.time())
        if seat.worker:
            await seat.worker.close()
            seat.worker = None

    def _retire(self, seat: Seat) -> None:
        self._move(seat, State.RETIRED)
        self._require_enough()

    def _require_enough(self) -> None:
        """Those that leave do not count: they get no more work, however well they are."""
        left = len(self.staying)
        if left >= self._section.min_workers:
            return
        lacked_memory = any(seat.memory_losses for seat in self.seats)
        fix = "lower rl.engine.num_slots or rl.fleet.num_workers"
        fix = fix if lacked_memory else "mend the cause"
        self._fail(
            WorkersLostError(
                f"at least {self._section.min_workers} of {len(self.seats)} rollout workers must "
                f"live, {left} are left after {self._section.max_restarts} restarts in a row",
                where="fleet",
                why="; ".join(
                    f"{each.name}: {each.causes[-1]}" for each in self.seats if each.causes
                ),
                fix=f"{fix}, then go on with --resume",
            )
        )

    async def _quiet(self) -> None:
        """No worker is on its way up, so that a spare may take processors."""
        busy = (*_UNBORN, State.STALE)
        while any(seat.state in busy for seat in self.seats):
            await self._changed.wait()

    @property
    def _patience_seconds(self) -> float:
        """Longest time that a worker may spend on coming up, over all its lives."""
        section, lives = self._section, self._section.max_restarts + 1
        life = section.start_deadline_seconds + section.publish_deadline_seconds
        return lives * life + section.backoff_seconds * 2**lives

    def _move(self, seat: Seat, state: State) -> None:
        seat.state, seat.since = state, time.time()
        self.tell()

    def _fail(self, error: PacktrainError) -> None:
        """From now on every call raises this; the first failure counts."""
        self._failure = self._failure or error
        self.tell()

    def _mark(self, kind: str, seat: Seat, start: float, **details: object) -> None:
        now = time.time()
        event: Event = {"time": now, "kind": kind, "role": seat.name, "start": start, "end": now}
        self._note(event | details)
