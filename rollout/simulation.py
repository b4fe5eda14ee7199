"""A fleet's workers on a clock of their own: hours of rollouts in a second, and no threads.

    run_virtual(main()) ──▶ every `asyncio.sleep` ends at once, in the order of its time

For tests and for plans: the fleet, the controller and the books are the real ones, only tokens are
not sampled. A worker's rollout takes the seconds that it is told and its tokens come evenly spread
over them, each with the version that the worker has at that moment.
"""

from __future__ import annotations

import asyncio
import selectors
from bisect import bisect_right
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ground.records import Group, Rollout, Segment
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
    """One worker for the real fleet: each rollout needs one of its places for its seconds.

    Args:
        seconds: of each rollout of a task, [G].
        rewards: of each rollout of a task, [G]; a reward above 0 passes.
        load_seconds: to take on a version.
    """

    def __init__(
        self,
        clock: Clock,
        num_slots: int,
        seconds: Callable[[GroupTask], Sequence[float]],
        rewards: Callable[[GroupTask], Sequence[float]],
        load_seconds: float = 0.0,
    ) -> None:
        self._clock, self._places = clock, asyncio.Semaphore(num_slots)
        self._seconds, self._rewards, self._load_seconds = seconds, rewards, load_seconds
        self._loads: list[tuple[float, int]] = []

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
        self._loads.append((self._clock.now, version))
        return Loaded(version, {}, 0.0)

    async def rollout(self, task: GroupTask, attempt: int) -> GroupResult:
        """Sample all rollouts side by side, as far as there are places."""
        began = self._clock.now
        segments = await asyncio.gather(*(self._sample(each) for each in self._seconds(task)))
        group = group_of(task, segments, self._rewards(task))
        now, num_tokens = self._clock.now, sum(len(each.token_ids) for each in segments)
        return GroupResult(group, began, now, now, num_tokens, attempt)

    def kill(self) -> None:
        """Nothing is left of it."""

    async def close(self) -> None:
        """Nothing is left of it."""

    async def _sample(self, seconds: float) -> Segment:
        async with self._places:
            began = self._clock.now
            await asyncio.sleep(seconds)
            return _segment(self._loads, began, seconds, tokens_per_second=1.0)


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
