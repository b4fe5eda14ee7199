"""A fleet's workers on a clock of their own: hours of rollouts in a second, and no threads.

    run_virtual(main()) ──▶ every `asyncio.sleep` ends at once, in the order of its time

For tests and for plans: the fleet, the controller and the books are the real ones, only tokens are
not sampled. A worker's rollout takes the seconds that it is told and its tokens come evenly spread
over them, each with the version that the worker has at that moment.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ground.records import Group, Rollout, Segment
from rollout.engine import spans_of
from rollout.task import GroupTask

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
        rewards = self.rewards(task)
        rollouts = tuple(
            Rollout(
                index,
                (self._segment(worker, began, seconds[index]),),
                text="",
                reward=rewards[index],
                passed=rewards[index] > 0,
            )
            for index in range(len(task.seeds))
        )
        return Group(task.id, task.prompt, (1,), rollouts, task.system)

    def _segment(self, worker: int, began: float, seconds: float) -> Segment:
        count = max(1, round(seconds * self.tokens_per_second))
        versions = spans_of(
            self._version_at(worker, began + seconds * place / count) for place in range(count)
        )
        return Segment("policy", (7,) * count, (-0.5,) * count, versions)

    def _version_at(self, worker: int, moment: float) -> int:
        return max((version for time, version in self._loads[worker] if time <= moment), default=-1)
