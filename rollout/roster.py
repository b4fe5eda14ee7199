"""The seats of a fleet and what keeps them filled: births, weights, pings, losses, restarts.

    starting (⇄ waiting for room) → stale → healthy ⇄ suspect (a ping is late: no new work)
       ▲                               └────────┴──▶ dead → restarting ┐
       └───────────────────────────────────────────────────────────────┘
                                                          └──▶ retired (budget spent, or dismissed)

A worker becomes healthy by acknowledging the current weights, and in no other way. One coroutine
per seat, `_tend`, carries it around this picture. `resize` adds seats, or dismisses some: these get
no new groups, end those that they have under the weights of the day, and go. So do seats on a
machine that is taken away; what they have not ended by then goes to others, as new seats do.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from typing import Generic

from ground.errors import InfraError, PacktrainError
from rollout.changes import Changing
from rollout.config import FleetSection
from rollout.loader import Loader
from rollout.lookout import Lookout
from rollout.losses import no_room, too_few
from rollout.machines import Machines
from rollout.seat import WORKERS, Crew, Kind, Seat, State
from rollout.spare import Spare
from rollout.task import Pong

logger = logging.getLogger(__name__)

Event = dict[str, object]

_UNBORN = (State.STARTING, State.DEAD, State.RESTARTING)


class Roster(Changing, Generic[Kind]):
    """Fills `section.num_workers` seats and keeps them under the current weights.

    Lives on one asyncio loop: `start → refit … → close`; `until` waits for changes.

    Args:
        spawn: makes a new worker; returns at once.
        note: receives an event for the timeline, kinds "lost", "restart", "dismissed", "drained".
        crew: what they are called.
    """

    def __init__(
        self,
        section: FleetSection,
        spawn: Callable[[], Kind],
        note: Callable[[Event], None],
        machines: Machines,
        crew: Crew = WORKERS,
    ) -> None:
        super().__init__(section.patience_seconds, self._states)
        self._section, self._spawn, self._note, self._crew = section, spawn, note, crew
        self._machines = machines
        self.seats: list[Seat[Kind]] = []
        self._spare = Spare(section, spawn, self._quiet, self._is_well_placed)
        self._background: list[asyncio.Task[None]] = []
        self._loader = Loader(section, self._mark)
        self.restarts = 0

    async def start(self) -> None:
        """Bring up all workers; returns when each has answered or been given up.

        Raises:
            WorkersLostError: fewer than `min_workers` came up.
        """
        await self._machines.look()
        self.resize(self._section.num_workers)
        self._run("look at the machines", Lookout(self._machines, self.seats, self._leave).run())
        if self._section.spare:
            self._run("spare worker", self._spare.run())
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
            self._add_seat()
        self.tell()

    @property
    def staying(self) -> list[Seat[Kind]]:
        """Seats that are filled, or will be again; never fewer than `min_workers` but the fleet has
        failed."""
        return [seat for seat in self.seats if not seat.is_leaving and not seat.is_retired]

    async def refit(self, version: int, weights: object) -> None:
        """Load a version everywhere; returns when all that serve have it, and one at least does.

        Raises:
            WorkersLostError: too few workers are left.
            DataError: the weights do not fit the model.
        """
        self._loader.weights = (version, weights)
        self.tell()
        serving = [seat for seat in self.seats if seat.state is State.HEALTHY]
        await asyncio.gather(*(self._refit(seat) for seat in serving))
        await self.until(
            lambda: (
                any(seat.state is State.HEALTHY for seat in self.seats)
                and not any(seat.state is State.STALE for seat in self.seats)
            )
        )

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

    def _add_seat(self) -> None:
        seat = Seat[Kind](len(self.seats), self._crew.title)
        self.seats.append(seat)
        self._background.append(asyncio.create_task(self._tend(seat), name=seat.name))

    async def _tend(self, seat: Seat[Kind]) -> None:
        """Carry a seat around its life for as long as the restart budget lasts."""
        try:
            while True:
                began = time.time()
                await self._live(seat, began)
                if seat.lost.done() and not seat.is_void:
                    await self._bury(seat)
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

    def _run(self, name: str, work: Coroutine[None, None, None]) -> None:
        """Nothing that a fleet runs in the background may end unseen."""

        async def guarded() -> None:
            try:
                await work
            except Exception as error:
                self._fail(PacktrainError(f"the {name}: {type(error).__name__}: {error}"))
                raise

        self._background.append(asyncio.create_task(guarded(), name=name))

    def _leave(self, seat: Seat[Kind]) -> None:
        """It goes with its machine; a new one takes over unless it was to go anyway."""
        if not seat.is_leaving and not self._failure:
            self._add_seat()
        seat.is_leaving = seat.is_drained = True
        self.tell()

    def _is_well_placed(self, worker: Kind) -> bool:
        return worker.node not in self._machines.avoided

    def _pause_seconds(self, failures: int) -> float:
        """None before the first restart: a worker that served well comes back at once."""
        return self._section.backoff_seconds * 2 ** (failures - 2) if failures > 1 else 0.0

    async def _live(self, seat: Seat[Kind], began: float) -> None:
        """One life, from birth to the loss or dismissal; returns when it is over."""
        seat.lost, seat.version, seat.failed_tasks = asyncio.Future(), -1, 0
        seat.lacked_memory, seat.pong = False, Pong()
        seat.lives += 1
        self._move(seat, State.STARTING)
        if seat.is_void and seat.worker:
            seat.worker.kill()
        seat.is_void, seat.kept_from = False, self._machines.avoided
        try:
            seat.worker = self._spare.take() or self._spawn()
            await seat.within(
                self._section.start_deadline_seconds,
                "starting",
                seat.worker.open(seat.index, seat.slots_share),
                more=self._while_no_room(seat, seat.worker),
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

    def _while_no_room(self, seat: Seat[Kind], worker: Kind) -> Iterator[float]:
        """Seconds that a start still has when its deadline has passed.

        A worker for which no machine has room is not to blame, and waits as long as enough others
        are there; once it is placed its deadline begins anew.
        """
        section, waited = self._section, 0.0
        while True:
            while not (worker.is_placed or self._machines.has_room or self._spare.is_ready):
                if seat.is_leaving or self._failure:
                    return
                if seat.state is not State.WAITING:
                    logger.warning("%s waits for a machine that has room for it", seat.name)
                    self._move(seat, State.WAITING)
                filled = sum(each.state is not State.WAITING for each in self.staying)
                if filled < section.min_workers and waited > section.room_seconds:
                    self._fail(no_room(section, self.seats, filled, self._crew))
                waited += section.ping_every_seconds
                yield section.ping_every_seconds
            if seat.state is not State.WAITING:
                return
            self._move(seat, State.STARTING)  # others may be quicker: then it waits on
            yield section.start_deadline_seconds

    async def _ping(self, seat: Seat[Kind], work: asyncio.Task[None] | None = None) -> None:
        """After a while, ask whether it lives; a late answer makes it a suspect meanwhile.

        Args:
            work: nothing is asked once this is done.
        """
        assert seat.worker
        section, over = self._section, {seat.lost} | ({work} if work else set())
        await asyncio.wait(over, timeout=section.ping_every_seconds, return_when="FIRST_COMPLETED")
        if work and work.done():
            return
        loop = asyncio.get_running_loop()
        suspicion = loop.call_later(section.suspect_after_seconds, self._suspect, seat)
        try:
            answer = seat.worker.ping()
            seat.pong = await seat.within(section.ping_deadline_seconds, "a ping", answer)
        finally:
            suspicion.cancel()

    def _suspect(self, seat: Seat[Kind]) -> None:
        if seat.is_serving:
            logger.warning("%s is late with a ping: it gets no new work", seat.name)
            self._move(seat, State.SUSPECT)

    async def _become_healthy(self, seat: Seat[Kind]) -> None:
        """Load the current weights until they still are the current ones when acknowledged."""
        loader = self._loader
        if not loader.is_current(seat):
            self._move(seat, State.STALE)
        while loader.weights is None:
            if seat.may_go:
                return
            await self._ping(seat)
        while not loader.is_current(seat):
            await self._beside_pings(seat, loader.load(seat))
        self._move(seat, State.HEALTHY)

    async def _beside_pings(self, seat: Seat[Kind], work: Coroutine[None, None, None]) -> None:
        """Do what may take long, while the worker is asked for signs of life as ever."""
        task = asyncio.create_task(work)
        try:
            while not task.done():
                await self._ping(seat, task)
            task.result()
        finally:
            task.cancel()

    async def _refit(self, seat: Seat[Kind]) -> None:
        """Load the current weights into a healthy worker; a loss is left to `_tend`."""
        with suppress(InfraError):
            await self._loader.load(seat)

    async def _bury(self, seat: Seat[Kind]) -> None:
        cause = seat.lost.result()
        seat.failures += 1
        seat.causes.append(cause)
        node = ""
        if seat.worker:
            node = seat.worker.node
            seat.worker.kill()
            seat.worker = None
        logger.warning("%s is lost (%d in a row): %s", seat.name, seat.failures, cause)
        seat.memory_losses += seat.lacked_memory
        if seat.memory_losses == 1 and seat.lacked_memory:
            logger.warning("%s has half of %s from now on", seat.name, self._crew.memory_key)
        self._move(seat, State.DEAD)
        self._mark("lost", seat, time.time(), cause=cause)
        if node:
            await self._machines.doubt(node)

    async def _dismiss(self, seat: Seat[Kind]) -> None:
        """A seat that leaves has ended its groups, or was lost and these went to others.

        It has its worker until this is gone, so that a fleet that is closed meanwhile sees it.
        """
        seat.lose("dismissed")
        self._move(seat, State.RETIRED)
        kind = "drained" if seat.is_drained else "dismissed"
        self._mark(kind, seat, time.time(), handed_over=seat.in_flight)
        if seat.worker:
            await seat.worker.close()
            seat.worker = None

    def _retire(self, seat: Seat[Kind]) -> None:
        self._move(seat, State.RETIRED)
        self._require_enough()

    def _require_enough(self) -> None:
        """Those that leave do not count: they get no more work, however well they are."""
        left = len(self.staying)
        if left < self._section.min_workers:
            self._fail(too_few(self._section, self.seats, left, self._crew))

    async def _quiet(self) -> None:
        """No worker is on its way up, so that a spare may take processors."""
        busy = (*_UNBORN, State.WAITING, State.STALE)
        while any(seat.state in busy for seat in self.seats):
            await self._changed.wait()

    def _states(self) -> str:
        return ", ".join(f"{seat.name} {seat.state}" for seat in self.seats)

    def _move(self, seat: Seat[Kind], state: State) -> None:
        seat.state, seat.since = state, time.time()
        self.tell()

    def _mark(self, kind: str, seat: Seat[Kind], start: float, **details: object) -> None:
        now = time.time()
        event: Event = {"time": now, "kind": kind, "role": seat.name, "start": start, "end": now}
        self._note(event | details)
