"""The loop between curriculum, fleet and learner: asyncio, and nothing of Ray.

            observe(outcomes)                  flat: count, refill from the same capability
 Curriculum ◀──────────────── Controller ────────────────────────────────────────────┐
     │ open                                                                          │
     └──────▶ admit ──▶ fleet.rollout(task) ──▶ Group ──▶ settle ──▶ buffer ─────────┘
                 ▲                                             │ next_batch(step)
                 └────────────── publish(version) ◀─ learner ◀─┘

`rl/books.py` decides everything; this only carries: it keeps as many groups in flight as the fleet
can decode (the oldest slot first, so that a refill overtakes younger slots), hands out plans, and
makes a version known. With `late: drop` it also calls off what a step no longer waits for. Every
wait has a deadline and says what it waits for; a background task that fails fails the run.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import Protocol

from ground import faults
from ground.errors import InfraError, WorkersLostError
from ground.records import Group, Prompt
from rl.books import Books, Broken, Plan
from rl.config import RlSection
from rl.droughts import Droughts
from rl.source import Draw
from rollout.engine import PromptTooLong
from rollout.seeds import sample_seed
from rollout.systems import SystemInstruction
from rollout.task import GroupTask

logger = logging.getLogger("packtrain")


class Fleet(Protocol):
    """What the controller needs of rollout/fleet.py."""

    async def rollout(self, task: GroupTask) -> Group:
        """Sample and score one group."""
        ...

    async def publish(self, version: int, weights: object) -> None:
        """Return once every worker that serves has these weights."""
        ...


class Controller:
    """Carries groups from the fleet to the learner and versions back.

    Example:
        await controller.begin(0, weights)
        plan = await controller.next_batch(0);  …;  await controller.publish(1, weights)

    Args:
        books: opened, or restored and replayed.
        in_flight: groups that the fleet is given at a time.
        note: receives an event for the timeline.
        now: the clock by which the fleet's idle share is measured.
    """

    def __init__(
        self,
        books: Books,
        fleet: Fleet,
        section: RlSection,
        *,
        seed: int,
        validation: Sequence[Prompt],
        system_of: Callable[[Prompt, int], SystemInstruction],
        in_flight: int,
        note: Callable[[Mapping[str, object]], None],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._books, self._fleet, self._section, self._seed = books, fleet, section, seed
        self._validation, self._system_of = validation, system_of
        self._in_flight, self._note = in_flight, note
        self._queue: asyncio.PriorityQueue[tuple[int, int, Draw]] = asyncio.PriorityQueue()
        self._changed = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._running: dict[str, asyncio.Task[Group | Broken]] = {}
        self._failure: BaseException | None = None
        self._busy = BusyClock(now)
        self._droughts = Droughts(books, section.max_empty_steps, note)
        self._asked: int | None = None
        self._since, self._moves = 0.0, 0

    async def begin(self, version: int, weights: object) -> None:
        """Bring the first weights to the fleet and start sampling."""
        self._droughts.begin()
        await self._hand_over(version, weights)
        self._admit(self._books.waiting())
        for number in range(self._in_flight):
            self._tasks.append(asyncio.create_task(self._guarded(self._sample(), f"s{number}")))

    async def next_batch(self, step: int) -> tuple[Plan, dict[str, float]]:
        """The plan of a step once its slots are settled, and how the fleet did meanwhile.

        Raises:
            InfraError: the slots were not settled within the deadline; names them.
        """
        seconds = self._section.step_deadline_seconds
        self._asked, self._since = step, time.time()
        try:
            async with asyncio.timeout(seconds), self._changed:
                await self._changed.wait_for(
                    lambda: self._failure is not None or self._books.is_ready(step)
                )
        except TimeoutError:
            raise InfraError(
                f"step {step} must have its groups within {seconds:g} s, it waits for "
                f"{self._books.describe_waiting(step)}",
                where="controller",
                fix="look at the workers' log, or raise rl.step_deadline_seconds",
            ) from None
        finally:
            self._asked = None
        self._raise_failure()
        for draw in self._books.drop_late(step):
            self._call_off(draw)
        faults.point("plan")
        return self._books.plan(step), self._gauges()

    async def publish(
        self, version: int, weights: object, *, evaluate: bool = False
    ) -> float | None:
        """Step `version - 1` is done: give the fleet the new weights, free its slots, go on.

        With `evaluate` it returns once the validation slice was answered by exactly these weights,
        and how well: publications come one after another, so the next one waits for it.
        """
        faults.point("publish.begin")
        await self._hand_over(version, weights)
        faults.point("publish.handed")
        self._admit(self._books.publish(version))
        self._droughts.tell(version)
        self._moves += 1
        faults.point("publish.freed")
        score = await self.evaluate(version) if evaluate else None
        self._raise_failure()
        return score

    async def evaluate(self, version: int) -> float | None:
        """Pass rate on the validation slice; each look uses the same seeds, so looks compare.

        A look that lost a prompt to the machinery would not compare: it gives None and a warning.
        """
        start, turns = time.time(), asyncio.Semaphore(self._in_flight)
        if not self._validation:
            return None

        async def rate(prompt: Prompt) -> float | None:
            size = self._section.validation.samples
            task = self._task(prompt, f"{prompt.id}.validation-{version}", "validation", size)
            async with turns:
                try:
                    return (await self._fleet.rollout(task)).pass_rate
                except PromptTooLong:
                    return None

        try:
            rates = await asyncio.gather(*map(rate, self._validation))
        except InfraError as error:
            logger.warning("version %d has no validation: %s", version, error)
            return None
        self._timeline("evaluate", start, version)
        answered = [each for each in rates if each is not None]
        return sum(answered) / len(answered) if answered else None

    def state(self) -> dict[str, object]:
        """The books as of the last publication and of what came in since."""
        faults.point("state")
        return self._books.state_dict()

    def status(self) -> dict[str, object]:
        """What is going on, for those who watch from outside.

        `step` is the one that the learner asks for, `waits_for` what that one lacks, `since` the
        unix time of its question, and `settled` grows whenever anything moves.
        """
        step = self._asked
        return {
            "version": self._books.version,
            "step": step,
            "waits_for": "" if step is None else self._books.describe_waiting(step),
            "since": None if step is None else self._since,
            "buffered": self._books.buffer.num_settled,
            "in_flight": len(self._running),
            "settled": self._moves,
        }

    async def close(self, reason: str) -> dict[str, int]:
        """Stop sampling, withdraw what is still open, and return the ledger's sums."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._books.ledger.withdraw_all(reason)
        return self._books.ledger.counts()

    def _admit(self, draws: Sequence[Draw]) -> None:
        for draw in draws:
            self._queue.put_nowait((draw.slot, draw.attempt, draw))

    async def _sample(self) -> None:
        """One of `in_flight` loops: take the oldest waiting draw, have it sampled, settle it."""
        while True:
            _, _, draw = await self._queue.get()
            if not self._books.waits_for(draw):
                continue
            faults.point("draw")
            self._books.send(draw)
            with self._busy:
                group = await self._group_unless_late(draw)
            if group is None:
                continue
            faults.point("settle")
            refill = self._books.settle(draw, group)
            self._admit([refill] if refill else [])
            self._moves += 1
            async with self._changed:
                self._changed.notify_all()

    async def _group_unless_late(self, draw: Draw) -> Group | Broken | None:
        """What came of a draw; None when it was called off, or came in just after that."""
        task = self._running[draw.task_id] = asyncio.create_task(self._group_of(draw))
        try:
            await asyncio.wait({task})
        finally:
            del self._running[draw.task_id]
            task.cancel()
        return task.result() if self._books.waits_for(draw) else None

    def _call_off(self, draw: Draw) -> None:
        """Stop sampling a draw; cancelling the fleet's task aborts its requests."""
        if task := self._running.get(draw.task_id):
            task.cancel()

    async def _group_of(self, draw: Draw) -> Group | Broken:
        task = self._task(draw.prompt, draw.task_id, draw.number, self._section.group_size)
        try:
            return replace(await self._fleet.rollout(task), id=draw.group_id)
        except WorkersLostError:
            raise
        except InfraError as error:
            logger.warning("group %s is broken: %s", draw.group_id, error)
            return "broken"
        except PromptTooLong as error:
            logger.warning("prompt %s leaves the pool: %s", draw.prompt.id, error)
            return "refused"

    def _task(self, prompt: Prompt, group_id: str, pass_: int | str, size: int) -> GroupTask:
        seeds = tuple(sample_seed(self._seed, prompt.id, pass_, sample) for sample in range(size))
        number = pass_ if isinstance(pass_, int) else 0
        system = self._system_of(prompt, number)
        return GroupTask(
            id=group_id,
            prompt=prompt,
            system=system.text,
            sampling=self._section.sampling,
            seeds=seeds,
            demand=system.demand,
        )

    async def _hand_over(self, version: int, weights: object) -> None:
        start = time.time()
        await self._fleet.publish(version, weights)
        self._timeline("handover", start, version)

    def _gauges(self) -> dict[str, float]:
        counts = self._books.curriculum.counts()
        return {
            "rollout_idle_share": 1 - self._busy.share(),
            "buffered": float(self._books.buffer.num_settled),
            **self._droughts.gauges(),
            **{f"prompts_{name}": float(count) for name, count in counts.items()},
        }

    def _timeline(self, kind: str, start: float, version: int) -> None:
        now = time.time()
        self._note(
            {"time": now, "kind": kind, "role": "controller", "start": start, "end": now}
            | {"version": version}
        )

    async def _guarded(self, work: Coroutine[None, None, None], name: str) -> None:
        """Keep the first failure of a background task for whoever waits, and wake them."""
        try:
            await work
        except Exception as error:
            logger.error("background task %s failed: %s", name, error)
            self._failure = self._failure or error
            async with self._changed:
                self._changed.notify_all()

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure


class BusyClock:
    """Measures the share of the time in which at least one body is inside.

    Example:
        with clock: …;  clock.share() → 0.8 since the last share()
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._inside, self._busy_seconds = 0, 0.0
        self._since = self._asked = now()

    def __enter__(self) -> None:
        self._tick()
        self._inside += 1

    def __exit__(self, *error: object) -> None:
        self._tick()
        self._inside -= 1

    def share(self) -> float:
        """Busy share since the last call, or since the beginning."""
        self._tick()
        elapsed, busy = self._since - self._asked, self._busy_seconds
        self._asked, self._busy_seconds = self._since, 0.0
        return busy / elapsed if elapsed > 0 else 0.0

    def _tick(self) -> None:
        now = self._now()
        if self._inside:
            self._busy_seconds += now - self._since
        self._since = now
