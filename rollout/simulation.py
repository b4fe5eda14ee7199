"""A fleet's workers on a clock of their own: hours of rollouts in a second, and no threads.

    run_virtual(main()) ──▶ every `asyncio.sleep` ends at once, in the order of its time

For tests and for plans: the fleet, the controller and the books are the real ones, only tokens are
not sampled. A rollout takes as long as it is told, under the versions that its worker then has.
"""

from __future__ import annotations

import asyncio
import math
import selectors
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush
from typing import Any, TypeVar

from ground.records import Group, Rollout, Segment, Span
from rollout.engine import spans_of
from rollout.task import GroupResult, GroupTask, Loaded, Pong

Value = TypeVar("Value")


class _Skipping(selectors.SelectSelector):
    """A selector that never blocks: where it would wait, the clock goes forward."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("everybody waits and nothing is due: a deadlock")
        self._clock.now += max(timeout, 0.0)
        return super().select(0)


@dataclass(slots=True)
class Clock:
    """Seconds since the beginning of the simulation."""

    now: float = 0.0


class _VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self, clock: Clock) -> None:
        super().__init__(_Skipping(clock))
        self._clock = clock

    def time(self) -> float:
        return self._clock.now


def run_virtual(work: Coroutine[None, None, Value], clock: Clock | None = None) -> Value:
    """`asyncio.run` on a clock that jumps from one event to the next.

    Raises:
        RuntimeError: everybody waits and nothing is due.

    Example:
        clock = Clock(); run_virtual(asyncio.sleep(3600), clock); clock.now → 3600.0
    """
    with asyncio.Runner(loop_factory=lambda: _VirtualLoop(clock or Clock())) as runner:
        return runner.run(work)


@dataclass(slots=True)
class SimulatedFleet:
    """Workers with `slots` groups each, behind the interface that the controller needs.

    Args:
        seconds: of each rollout of a task, [G].
        rewards: of each rollout of a task, [G]; a reward above 0 passes.
        fails: raised instead of an answer, where it returns an error.
    """

    clock: Clock
    num_workers: int
    slots: int
    seconds: Callable[[GroupTask], tuple[float, ...]]
    rewards: Callable[[GroupTask], tuple[float, ...]]
    fails: Callable[[GroupTask], Exception | None] = lambda task: None
    load_seconds: Callable[[int, int], float] = lambda worker, version: 0.0
    """Of a worker to take on a version."""
    tokens_per_second: float = 10.0
    busy_seconds: float = 0.0
    """Worker seconds spent on groups, over all slots."""
    drawn: list[float] = field(default_factory=list)
    """Seconds of every rollout that was begun."""
    _loads: list[list[tuple[float, int]]] = field(default_factory=list)
    _free: asyncio.Queue[int] = field(default_factory=asyncio.Queue)

    def __post_init__(self) -> None:
        self._loads = [[] for _ in range(self.num_workers)]
        for _ in range(self.slots):
            for worker in range(self.num_workers):
                self._free.put_nowait(worker)

    async def publish(self, version: int, weights: object) -> None:
        """Workers take the version on side by side, in flight."""

        async def load(worker: int) -> None:
            await asyncio.sleep(self.load_seconds(worker, version))
            self._loads[worker].append((self.clock.now, version))

        await asyncio.gather(*(load(worker) for worker in range(self.num_workers)))

    async def rollout(self, task: GroupTask) -> Group:
        """Wait for a place and for the group's longest rollout."""
        worker = await self._free.get()
        began = self.clock.now
        try:
            seconds = self.seconds(task)
            self.drawn.extend(seconds)
            if error := self.fails(task):
                await asyncio.sleep(max(seconds) / 2)
                raise error
            await asyncio.sleep(max(seconds))
            return self._group(task, worker, began, seconds)
        finally:
            self.busy_seconds += self.clock.now - began
            self._free.put_nowait(worker)

    def _group(
        self, task: GroupTask, worker: int, began: float, seconds: tuple[float, ...]
    ) -> Group:
        segments = [
            _segment(self._loads[worker], began, each, self.tokens_per_second) for each in seconds
        ]
        return group_of(task, segments, self.rewards(task))


class SimulatedWorker:
    """One worker for the real fleet, whose engine decodes all its rows in step.

        rollout ──▶ waiting ──▶ a place is free: rows ──▶ its tokens are out ──▶ verifiers ──▶ group

    A step gives every row a token and takes `step_seconds(rows)`, so a row's tokens are out when
    the engine has made that many steps since the row began; rows wait for places first come, first
    served. A rollout has one token of every version that sampled it.

    Args:
        tokens: of each rollout of a task, [G].
        rewards: of each rollout of a task, [G]; a reward above 0 passes.
        step_seconds: of a step over so many rows; by default a token takes a second.
        reward_seconds: of the verifiers for one rollout, one after another.
        load_seconds: until a version is in; decoding goes on meanwhile.
    """

    def __init__(
        self,
        clock: Clock,
        num_slots: int,
        tokens: Callable[[GroupTask], Sequence[float]],
        rewards: Callable[[GroupTask], Sequence[float]],
        *,
        step_seconds: Callable[[int], float] = lambda rows: 1.0,
        reward_seconds: float = 0.0,
        load_seconds: float = 0.0,
    ) -> None:
        self._clock, self._num_slots = clock, num_slots
        self._tokens, self._rewards = tokens, rewards
        self._step_seconds, self._reward_seconds = step_seconds, reward_seconds
        self._load_seconds = load_seconds
        self._loads: list[tuple[float, int]] = []
        """(steps made by then, version), in order."""
        self._steps, self._since = 0.0, clock.now
        self._born, self._ended = clock.now, math.inf
        self._rows: list[tuple[float, int, _Row]] = []
        self._waiting: deque[_Row] = deque()
        self._left: dict[asyncio.Future[None], int] = {}
        self._begun = 0
        self._timer: asyncio.TimerHandle | None = None
        self._busy_seconds = self._row_seconds = 0.0
        self.node, self.is_placed = "", True

    async def prepare(self) -> None:
        """It is there."""

    async def open(self, index: int, slots_share: float = 1.0) -> None:
        """It can take work."""

    async def ping(self) -> Pong:
        """It lives."""
        return Pong()

    async def load(self, version: int, weights: object) -> Loaded:
        """Take on a version, in flight."""
        await asyncio.sleep(self._load_seconds)
        self._advance()
        self._loads.append((self._steps, version))
        return Loaded(version, {}, 0.0)

    async def rollout(self, task: GroupTask, attempt: int) -> GroupResult:
        """Sample all rollouts side by side, as far as there are places."""
        began, done = self._clock.now, asyncio.get_running_loop().create_future()
        rows = [_Row(tokens, done) for tokens in self._tokens(task)]
        self._left[done] = len(rows)
        self._waiting.extend(rows)
        self._turn()
        try:
            await done
        finally:
            self._forget(done)
        sampled = self._clock.now
        await asyncio.sleep(self._reward_seconds * len(rows))
        segments = [self._segment(row) for row in rows]
        group = group_of(task, segments, self._rewards(task))
        num_tokens = round(sum(row.tokens for row in rows))
        return GroupResult(group, began, sampled, self._clock.now, num_tokens, attempt)

    def kill(self) -> None:
        """Nothing is left of it."""
        self._ended = min(self._ended, self._clock.now)

    async def close(self) -> None:
        """Nothing is left of it."""
        self.kill()

    @property
    def lived_seconds(self) -> float:
        """From its birth to its end, or until now."""
        return min(self._ended, self._clock.now) - self._born

    def used(self) -> tuple[float, float]:
        """Seconds so far with a row at least, and seconds summed over rows."""
        self._advance()
        return self._busy_seconds, self._row_seconds

    def _turn(self) -> None:
        """Take out rows that are done, fill places, and come again when the next one is done."""
        self._advance()
        while self._rows and self._rows[0][0] <= self._steps:
            row = heappop(self._rows)[2]
            row.last = self._steps
            self._left[row.group] -= 1
            if not self._left[row.group] and not row.group.done():
                row.group.set_result(None)
        while self._waiting and len(self._rows) < self._num_slots:
            row = self._waiting.popleft()
            row.first, self._begun = self._steps, self._begun + 1
            heappush(self._rows, (self._steps + row.tokens, self._begun, row))
        if self._timer:
            self._timer.cancel()
        if self._rows:
            end = self._rows[0][0]
            seconds = (end - self._steps) * self._step_seconds(len(self._rows))
            self._timer = asyncio.get_running_loop().call_later(seconds, self._due, end)

    def _due(self, end: float) -> None:
        """The next row's last token is out; by the sum of steps it may be off by a rounding."""
        self._advance()
        self._steps = max(self._steps, end)
        self._turn()

    def _advance(self) -> None:
        """Count the steps since the last time."""
        seconds, rows = self._clock.now - self._since, len(self._rows)
        if rows:
            self._steps += seconds / self._step_seconds(rows)
            self._busy_seconds += seconds
            self._row_seconds += seconds * rows
        self._since = self._clock.now

    def _forget(self, group: asyncio.Future[None]) -> None:
        """A group is done, or was called off: its rows give up their places."""
        if self._left.pop(group):
            self._waiting = deque(row for row in self._waiting if row.group is not group)
            self._rows = [each for each in self._rows if each[2].group is not group]
            heapify(self._rows)
            self._turn()

    def _segment(self, row: _Row) -> Segment:
        """A token of the version that the row began under, and of each that came while it ran."""
        moments = [steps for steps, _ in self._loads]
        first = max(bisect_right(moments, row.first) - 1, 0)
        last = max(bisect_left(moments, row.last), first + 1)
        spans = tuple(Span(version, 1) for _, version in self._loads[first:last])
        return Segment("policy", (7,) * len(spans), (-0.5,) * len(spans), spans)


@dataclass(slots=True, eq=False)
class _Row:
    """A rollout in an engine, and the engine's steps at its first and last token."""

    tokens: float
    group: asyncio.Future[None]
    first: float = 0.0
    last: float = 0.0


def group_of(task: GroupTask, segments: Sequence[Segment], rewards: Sequence[float]) -> Group:
    """A group of one segment per rollout; a reward above 0 passes."""
    rollouts = tuple(
        Rollout(index, (segment,), text="", reward=reward, passed=reward > 0)
        for index, (segment, reward) in enumerate(zip(segments, rewards, strict=True))
    )
    return Group(task.id, task.prompt, (1,), rollouts, task.system)


def _segment(
    loads: Sequence[tuple[float, int]], began: float, seconds: float, tokens_per_second: float
) -> Segment:
    """Tokens evenly spread over the seconds, each of the version that was loaded last before it."""
    count = max(1, round(seconds * tokens_per_second))
    moments, versions = zip(*loads, strict=True)
    spans = spans_of(
        versions[bisect_right(moments, began + seconds * place / count) - 1]
        for place in range(count)
    )
    return Segment("policy", (7,) * count, (-0.5,) * count, spans)
