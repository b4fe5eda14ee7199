"""The fleet under anything that can happen to its workers, in any order, on a virtual clock.

Roster, seats and fleet are the real ones; workers are scripted: they sample, load and answer in so
many seconds, die, hang and wake up, run out of memory, fail, and answer questions of before. Their
machines, two workers each, are taken away with more or less notice.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from dataclasses import dataclass, field
from types import CoroutineType
from typing import Any

from fleet_doubles import make_task
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ground.errors import DataError, InfraError, WorkersLostError
from ground.records import Group, Segment, Span
from rollout.config import FleetSection
from rollout.fleet import Fleet
from rollout.roster import Event
from rollout.seat import OutOfMemoryError, State, WorkerDiedError
from rollout.simulation import Clock, _VirtualLoop, group_of
from rollout.task import GroupResult, GroupTask, Loaded, Pong

MAX_ATTEMPTS, MAX_RESTARTS = 3, 2


@dataclass(eq=False)
class Asked:
    """A question that the fleet was asked, and what it has made of it."""

    task: GroupTask
    seconds: float
    is_bad: bool
    attempts: list[asyncio.Future[str]] = field(default_factory=list)
    """The lives that were given it, in order."""
    running: Counter[int] = field(default_factory=Counter)
    """By attempt."""
    answer: asyncio.Task[Group] = field(init=False)


class Scripted:
    """A worker in a process that is told what happens to it."""

    def __init__(self, world: FleetMachine) -> None:
        self.world, self.version, self.share, self.born = world, -1, 0.0, False
        self.death: asyncio.Future[WorkerDiedError] = asyncio.Future()
        self.awake = asyncio.Event()
        self.awake.set()
        self.next: list[str] = []
        """What becomes of its next rollouts: `fail`, `stale` answer."""
        self.sampling: dict[str, float] = {}
        self.node, self.is_placed = world.node(), True

    async def prepare(self) -> None:
        await self._spend(1.0)

    async def open(self, index: int, slots_share: float = 1.0) -> None:
        assert not self.born, "one life, one seat"
        self.born, self.share = True, slots_share
        await self._spend(2.0)

    async def ping(self) -> Pong:
        await self._spend(0.01)
        now = asyncio.get_running_loop().time()
        return Pong({id_: now - began for id_, began in self.sampling.items()})

    async def load(self, version: int, weights: object) -> Loaded:
        assert weights == f"weights {version}"
        await self._spend(0.5)
        assert version >= self.version, "versions only rise"
        self.version = version
        return Loaded(version, {}, 0.0)

    def rollout(self, task: GroupTask, attempt: int) -> CoroutineType[Any, Any, GroupResult]:
        return self._rollout(self.world.assigned(self, task, attempt), task, attempt)

    async def _rollout(self, asked: Asked, task: GroupTask, attempt: int) -> GroupResult:
        self.sampling[task.attempt_id(attempt)] = asyncio.get_running_loop().time()
        asked.running[attempt] += 1
        try:
            await self._spend(asked.seconds)
        finally:
            asked.running[attempt] -= 1
            del self.sampling[task.attempt_id(attempt)]
        if asked.is_bad:
            raise DataError("the prompt is too long")
        what = self.next.pop() if self.next else ""
        if what == "fail":
            raise InfraError("out of file handles")
        answered = attempt - (what == "stale")
        segment = Segment("policy", (10 + answered,), (-0.5,), (Span(self.version, 1),))
        group = group_of(task, [segment] * len(task.seeds), [1.0] * len(task.seeds))
        return GroupResult(group, 0.0, 0.0, 0.0, len(task.seeds), answered)

    def kill(self) -> None:
        self.die(WorkerDiedError("killed"))

    async def close(self) -> None:
        self.kill()

    def die(self, cause: WorkerDiedError) -> None:
        if not self.death.done():
            self.death.set_result(cause)

    async def _spend(self, seconds: float) -> None:
        """It takes so long, longer while it hangs, and for ever is no longer than it lives."""

        async def work() -> None:
            await asyncio.sleep(seconds)
            await self.awake.wait()

        task = asyncio.ensure_future(work())
        try:
            await asyncio.wait({task, self.death}, return_when="FIRST_COMPLETED")
            if self.death.done():
                raise self.death.result()
        finally:
            task.cancel()


@dataclass
class Spot:
    """Machines of which some are taken away."""

    gone_at: dict[str, float] = field(default_factory=dict)
    has_room: bool = True
    sound: frozenset[str] = frozenset()

    async def look(self) -> None:
        return

    async def doubt(self, node: str) -> None:
        return

    @property
    def leaving(self) -> dict[str, float]:
        now = asyncio.get_running_loop().time()
        return {node: at - now for node, at in self.gone_at.items()}

    @property
    def avoided(self) -> frozenset[str]:
        return frozenset(self.gone_at)


class FleetMachine(RuleBasedStateMachine):
    """No group lost or delivered twice, no work for who is not well, no budget exceeded, and in the
    end everything ends."""

    def __init__(self) -> None:
        super().__init__()
        self.is_started = False

    @initialize(num_workers=st.integers(1, 3), min_workers=st.integers(1, 2), spare=st.booleans())
    def start(self, num_workers: int, min_workers: int, spare: bool) -> None:
        logging.getLogger("rollout").setLevel(logging.CRITICAL)  # it tells of every loss
        self.clock = Clock()
        self.runner = asyncio.Runner(loop_factory=lambda: _VirtualLoop(self.clock))
        self.workers: list[Scripted] = []
        self.machines, self.births = Spot(), 0
        self.asked: dict[str, Asked] = {}
        self.events: list[Event] = []
        self.was_retired: set[int] = set()
        self.short_of_memory: set[int] = set()
        self.version = self.published = -1
        self.publication: asyncio.Task[None] | None = None
        section = FleetSection(
            num_workers=num_workers,
            min_workers=min(min_workers, num_workers),
            spare=spare,
            start_deadline_seconds=20,
            rollout_deadline_seconds=30,
            publish_deadline_seconds=10,
            ping_deadline_seconds=5,
            max_restarts=MAX_RESTARTS,
            max_attempts=MAX_ATTEMPTS,
        )
        self.section = section
        self.fleet = Fleet(section, self._spawn, self.events.append, self.machines)
        self.runner.run(self.fleet.start())
        self.is_started = True
        self.publish()
        self.pass_time(5.0)

    def node(self) -> str:
        """Where the next worker is born."""
        while (node := f"machine {self.births // 2}") in self.machines.gone_at:
            self.births += 1
        self.births += 1
        return node

    def _spawn(self) -> Scripted:
        self.workers.append(Scripted(self))
        return self.workers[-1]

    def assigned(self, worker: Scripted, task: GroupTask, attempt: int) -> Asked:
        """The fleet gives a worker an attempt."""
        [seat] = [seat for seat in self.fleet._roster.seats if seat.worker is worker]
        assert seat.state is State.HEALTHY and not seat.lost.done()
        assert worker.version >= seat.version >= self.published
        asked = self.asked[task.id]
        assert attempt == len(asked.attempts) < MAX_ATTEMPTS, "each attempt once, in order"
        for number, life in enumerate(asked.attempts):
            assert not asked.running[number] or life.done(), "nobody is to work on it any more"
        asked.attempts.append(seat.lost)
        return asked

    def _living(self) -> list[Scripted]:
        return [worker for worker in self.workers if not worker.death.done()]

    @rule(seconds=st.sampled_from([0.5, 3.0, 20.0]), is_bad=st.sampled_from([False] * 5 + [True]))
    def ask(self, seconds: float, is_bad: bool) -> None:
        task = make_task(f"n{len(self.asked)}", size=2)
        asked = self.asked[task.id] = Asked(task, seconds, is_bad)

        async def begin() -> None:
            asked.answer = asyncio.create_task(self.fleet.rollout(task))
            await asyncio.sleep(0)

        self.runner.run(begin())

    @precondition(lambda self: self.asked)
    @rule(data=st.data())
    def call_off(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(list(self.asked.values()))).answer.cancel()
        self.pass_time(0.0)

    @precondition(lambda self: not self.publication or self.publication.done())
    @rule()
    def publish(self) -> None:
        self.version += 1

        async def whole(version: int) -> None:
            await self.fleet.publish(version, f"weights {version}")
            self.published = version

        async def begin() -> None:
            self.publication = asyncio.create_task(whole(self.version))

        self.runner.run(begin())

    @rule(seconds=st.sampled_from([0.0, 0.3, 1.0, 6.0, 40.0]))
    def pass_time(self, seconds: float) -> None:
        self.runner.run(asyncio.sleep(seconds))

    @rule(num_workers=st.integers(1, 4))
    def resize(self, num_workers: int) -> None:
        async def begin() -> None:
            if self.fleet._roster._failure is None:  # which what was due meanwhile may have changed
                self.fleet.resize(num_workers)

        self.runner.run(begin())

    @precondition(lambda self: self._living())
    @rule(data=st.data(), lacks_memory=st.booleans())
    def die(self, data: st.DataObject, lacks_memory: bool) -> None:
        worker = data.draw(st.sampled_from(self._living()))
        worker.die(OutOfMemoryError("oom") if lacks_memory else WorkerDiedError("SIGSEGV"))

    @precondition(lambda self: self._living())
    @rule(data=st.data(), seconds=st.sampled_from([1.0, 12.0, 60.0, math.inf]))
    def take_away(self, data: st.DataObject, seconds: float) -> None:
        """A machine, and with it who is there by then."""
        node = data.draw(st.sampled_from(self._living())).node
        if node in self.machines.gone_at:
            return

        async def begin() -> None:
            loop = asyncio.get_running_loop()
            self.machines.gone_at[node] = loop.time() + seconds
            if seconds < math.inf:
                loop.call_later(seconds, self._lose, node)

        self.runner.run(begin())

    def _lose(self, node: str) -> None:
        for worker in self.workers:
            if worker.node == node:
                worker.die(WorkerDiedError("its machine is gone"))

    @precondition(lambda self: self._living())
    @rule(data=st.data(), seconds=st.sampled_from([0.0, 2.5]))
    def hang(self, data: st.DataObject, seconds: float) -> None:
        """For long enough, then, to be suspected and not yet given up."""
        data.draw(st.sampled_from(self._living())).awake.clear()
        self.pass_time(seconds)

    @precondition(lambda self: self._living())
    @rule(data=st.data())
    def wake(self, data: st.DataObject) -> None:
        data.draw(st.sampled_from(self._living())).awake.set()

    @precondition(lambda self: self._living())
    @rule(data=st.data(), what=st.sampled_from(["fail", "stale"]))
    def err_next_time(self, data: st.DataObject, what: str) -> None:
        data.draw(st.sampled_from(self._living())).next.append(what)

    @invariant()
    def budgets_hold(self) -> None:
        seats = self.fleet._roster.seats
        retired = {seat.index for seat in seats if seat.state is State.RETIRED}
        assert retired >= self.was_retired, "for good"
        self.was_retired = retired
        for seat in seats:
            assert seat.failures <= MAX_RESTARTS + 1
            assert seat.in_flight >= 0
            share = 0.5 if seat.memory_losses else 1.0
            if isinstance(seat.worker, Scripted) and seat.state is State.STARTING:
                assert not seat.worker.born or seat.worker.share == share
        assert len(self._living()) <= len(seats) + self.section.spare
        drained = [seat for seat in seats if seat.is_drained and seat.is_retired]
        marked = [event for event in self.events if event["kind"] == "drained"]
        assert len(drained) == len(marked)
        staying = [seat for seat in seats if seat.index not in retired and not seat.is_leaving]
        is_lost = len(staying) < self.section.min_workers
        assert is_lost == isinstance(self.fleet._roster._failure, WorkersLostError)

    @invariant()
    def nothing_is_delivered_twice(self) -> None:
        done = [each for each in self.asked.values() if each.answer.done()]
        groups = [self._group(each) for each in done if not each.answer.cancelled()]
        delivered = [group for group in groups if group]
        assert len({group.id for group in delivered}) == len(delivered)
        marked = Counter(str(e["group"]) for e in self.events if e["kind"] == "rollout")
        assert all(count == 1 for count in marked.values())
        assert {group.id for group in delivered} <= set(marked)

    def _group(self, asked: Asked) -> Group | None:
        """What came of a question; every other end has its type."""
        error = asked.answer.exception()
        if isinstance(error, AssertionError):
            raise error
        if error is None:
            group = asked.answer.result()
            assert group.id == asked.task.id and not asked.is_bad
            tokens = [rollout.segments[0].token_ids for rollout in group.rollouts]
            newest = 10 + len(asked.attempts) - 1
            assert tokens == [(newest,)] * len(asked.task.seeds), "no zombie's answer"
            return group
        if isinstance(error, DataError):
            assert asked.is_bad and len(asked.attempts) >= 1
        elif isinstance(error, WorkersLostError):
            assert self.fleet._roster._failure is error
        else:
            assert isinstance(error, InfraError)
            assert len(asked.attempts) == MAX_ATTEMPTS or "closed" in error.what
        return None

    def teardown(self) -> None:
        if not self.is_started:
            return
        for worker in self._living():
            worker.awake.set()
            worker.next.clear()
        limit = self.section.max_attempts * (self.section.rollout_deadline_seconds + 60)
        for _ in range(40):
            if all(each.answer.done() for each in self.asked.values()):
                break
            self.pass_time(limit / 10)
        lost = [each.task.id for each in self.asked.values() if not each.answer.done()]
        assert not lost, f"{lost} never ended"
        self.nothing_is_delivered_twice()
        assert all(seat.in_flight == 0 for seat in self.fleet._roster.seats)
        self._check_retries()
        self.runner.run(self.fleet.close())
        assert not self._living(), "no process is left"
        if self.publication:
            self.publication.cancel()
        self.pass_time(1.0)
        assert len(asyncio.all_tasks(self.runner.get_loop())) == 0
        self.runner.close()
        logging.getLogger("rollout").setLevel(logging.NOTSET)

    def _check_retries(self) -> None:
        """Every attempt but the one that answered counts as made again, called-off ones aside."""
        certain = called_off = 0
        for each in self.asked.values():
            if each.answer.cancelled():
                called_off += len(each.attempts)
                continue
            error = each.answer.exception()
            certain += len(each.attempts) - (error is None or isinstance(error, DataError))
        assert certain <= self.fleet.stats().retries <= certain + called_off


FleetMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40)
TestFleet = FleetMachine.TestCase
