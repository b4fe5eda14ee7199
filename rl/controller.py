"""The loop between curriculum, fleet and learner: asyncio, and nothing of Ray.

            observe(outcomes)                  flat: count, refill from the same capability
 Curriculum ◀──────────────── Controller ────────────────────────────────────────────┐
     │ open                                                                          │
     └──────▶ admit ──▶ fleet.rollout(task) ──▶ Group ──▶ settle ──▶ buffer ─────────┘
                 ▲                        └─ classroom ─┘      │ next_batch(step)
                 └────────────── publish(version) ◀─ learner ◀─┘

`rl/books.py` decides everything; this only carries: it keeps as many groups in flight as the fleet
can decode (the oldest slot first, so that a refill overtakes younger slots), hands out plans, and
makes a version known. With `late: drop` it also calls off what a step no longer waits for. Askings
of the survey (rl/survey.py) go to the fleet where draws leave places free, and are put off as soon
as a draw comes that needs one. Every wait has a deadline and says what it waits for; a background
task that fails fails the run.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

from ground import faults
from ground.errors import InfraError, WorkersLostError
from ground.records import Group, Prompt
from rl.books import Books
from rl.buffer import Outcome, Plan
from rl.busy import BusyClock
from rl.classroom import Classroom, Speakers
from rl.config import RlSection
from rl.droughts import Droughts
from rl.fleet import Fleet
from rl.source import Draw
from rl.survey import NO_SLOT
from rl.verdicts import Broken
from rollout.engine import PromptTooLong
from rollout.judge_fleet import Unjudged
from rollout.seeds import sample_seed
from rollout.systems import SystemInstruction
from rollout.task import GroupTask

Found = TypeVar("Found")

_LEAVE_SECONDS = 5.0
"""For what is being published when the run is asked to end; its supervisor gives it 20 in all."""

logger = logging.getLogger("packtrain")


class Controller:
    """Carries groups from the fleet to the learner and versions back.

    Example:
        await controller.begin(0, weights)
        plan = await controller.next_batch(0);  …;  await controller.publish(1, weights)

    Args:
        books: opened, or restored and replayed.
        in_flight: groups that the fleet is given at a time, twice what it has places for.
        note: receives an event for the timeline.
        teachers: who speak to each group that teaches, where the recipe wants that.
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
        teachers: Speakers | None = None,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._books, self._fleet, self._section, self._seed = books, fleet, section, seed
        self._validation, self._system_of = validation, system_of
        self._in_flight, self._note = in_flight, note
        self._places = max(in_flight // 2, 1)
        self._queue: asyncio.PriorityQueue[tuple[int, int, Draw]] = asyncio.PriorityQueue()
        self._changed = asyncio.Condition()
        self._tasks: list[asyncio.Task[None]] = []
        self._running: dict[str, tuple[Draw, asyncio.Task[Group | Broken]]] = {}
        self._failure: BaseException | None = None
        self._busy = BusyClock(now)
        self._droughts = Droughts(books, section.max_empty_steps, note)
        self._classroom = Classroom(teachers, books.waits_for, self._record) if teachers else None
        self._asked: int | None = None
        self._since, self._moves = 0.0, 0
        self._leaving = asyncio.Event()

    async def begin(self, version: int, weights: object) -> None:
        """Bring the first weights to the fleet and start sampling."""
        self._droughts.begin()
        await self._hand_over(version, weights)
        self._admit(self._books.waiting())
        for number in range(self._in_flight):
            self._tasks.append(asyncio.create_task(self._guarded(self._sample(), f"s{number}")))
        askings = self._section.curriculum.survey_groups * (self._section.max_staleness + 1)
        for number in range(min(self._places, askings)):
            self._tasks.append(asyncio.create_task(self._guarded(self._look(), f"l{number}")))
        if room := self._classroom:
            works = [self._guarded(room.run(), f"t{number}") for number in range(room.places)]
            self._tasks += map(asyncio.create_task, works)

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
                f"{self._waited_for(step)}",
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
        and how well: publications come one after another, so the next one waits for it. A run that
        leaves waits for neither for long (`leave`).
        """
        faults.point("publish.begin")
        await self._unless_leaving(self._hand_over(version, weights))
        faults.point("publish.handed")
        self._admit(self._books.publish(version))
        self._droughts.tell(version)
        self._moves += 1
        async with self._changed:
            self._changed.notify_all()
        faults.point("publish.freed")
        score = await self.evaluate(version) if evaluate else None
        self._raise_failure()
        return score

    async def evaluate(self, version: int) -> float | None:
        """Pass rate on the validation slice; each look uses the same seeds, so looks compare.

        A look that lost a prompt to the machinery would not compare: it gives None and a warning.
        So does, without a warning, one that is broken off because the run leaves (`leave`).
        """
        return await self._unless_leaving(self._look_at(version))

    def leave(self) -> None:
        """The run was asked to end: it samples nothing more, and what is being published has a few
        seconds left.

        There may be no worker to wait for, when their machine is the one that is taken away.
        """
        for task in self._tasks:
            task.cancel()
        asyncio.get_running_loop().call_later(_LEAVE_SECONDS, self._leaving.set)

    async def _unless_leaving(self, work: Coroutine[None, None, Found]) -> Found | None:
        """What comes of it; None when the run leaves before that."""
        task, leaving = asyncio.create_task(work), asyncio.create_task(self._leaving.wait())
        try:
            await asyncio.wait({task, leaving}, return_when=asyncio.FIRST_COMPLETED)
            return task.result() if task.done() else None
        finally:
            leaving.cancel()
            task.cancel()

    async def _look_at(self, version: int) -> float | None:
        start, turns = time.time(), asyncio.Semaphore(self._in_flight)
        if not self._validation:
            return None

        async def rate(prompt: Prompt) -> float | None:
            size = self._section.validation.samples
            task = self._task(prompt, f"{prompt.id}.validation-{version}", "validation", size)
            async with turns:
                try:
                    return (await self._fleet.rollout(task)).pass_rate
                except (PromptTooLong, Unjudged):
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
            "waits_for": "" if step is None else self._waited_for(step),
            "since": None if step is None else self._since,
            "buffered": self._books.buffer.num_settled,
            "in_flight": len(self._running),
            **self._at_school("at_teacher"),
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
        excess = max(self._wanted - self._places, 0)
        askings = [task for draw, task in self._running.values() if draw.slot == NO_SLOT]
        for task in askings[::-1][:excess]:
            task.cancel()

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
            if group is not None:
                faults.point("settle")
                outcome = self._books.outcome_of(draw, group)
                if not self._classroom or outcome.reason:
                    await self._record(outcome)
                    continue
                self._classroom.put(outcome)
            async with self._changed:
                self._changed.notify_all()  # a place is free

    async def _record(self, outcome: Outcome) -> None:
        """A draw is through: its slot goes on, and whoever waits for it looks again."""
        refill = self._books.record(outcome)
        self._admit([refill] if refill else [])
        self._moves += 1
        async with self._changed:
            self._changed.notify_all()

    async def _look(self) -> None:
        """One of the loops that answer the survey while draws leave places free."""
        while True:
            async with self._changed:
                await self._changed.wait_for(lambda: self._next_asking() is not None)
            if (asking := self._next_asking()) is None:
                continue
            self._books.send(asking)
            with self._busy:
                group = await self._group_unless_late(asking)
            if group is not None:
                self._books.settle(asking, group)
                self._moves += 1
            elif self._books.waits_for(asking):
                self._books.put_off(asking)
            async with self._changed:
                self._changed.notify_all()

    def _next_asking(self) -> Draw | None:
        """The oldest one that nobody samples, if there is a place for it."""
        if self._wanted >= self._places:
            return None
        askings = self._books.askings()
        return next((each for each in askings if each.task_id not in self._running), None)

    @property
    def _wanted(self) -> int:
        """Groups that are sampled or wait for it."""
        return self._queue.qsize() + len(self._running)

    async def _group_unless_late(self, draw: Draw) -> Group | Broken | None:
        """What came of a draw; None when it was called off, or came in just after that."""
        task = asyncio.create_task(self._group_of(draw))
        self._running[draw.task_id] = draw, task
        try:
            await asyncio.wait({task})
        finally:
            del self._running[draw.task_id]
            task.cancel()
        return task.result() if self._books.waits_for(draw) and not task.cancelled() else None

    def _call_off(self, draw: Draw) -> None:
        """Stop sampling a draw; cancelling the fleet's task aborts its requests."""
        if running := self._running.get(draw.task_id):
            running[1].cancel()

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
        start, seconds = time.time(), self._section.step_deadline_seconds
        try:
            async with asyncio.timeout(seconds):
                await self._fleet.publish(version, weights)
        except TimeoutError:
            raise InfraError(
                f"version {version} must be with all workers within {seconds:g} s",
                where="controller",
                why="a link is too slow for the weights, or workers still come up; "
                "log/rl.controller.log says who waits for what",
                fix="raise rl.step_deadline_seconds, or leave out machines behind slow links",
            ) from None
        self._timeline("handover", start, version)

    def _gauges(self) -> dict[str, float]:
        counts = self._books.curriculum.counts()
        return {
            "rollout_idle_share": 1 - self._busy.share(),
            "buffered": float(self._books.buffer.num_settled),
            **self._books.curriculum.gauges(),
            **self._droughts.gauges(),
            **self._at_school("groups_at_teacher"),
            **{f"prompts_{name}": float(count) for name, count in counts.items()},
        }

    def _waited_for(self, step: int) -> str:
        """What a step lacks, in words; what the teacher has of it is named too."""
        number = self._classroom.num_groups if self._classroom else 0
        told = f"; {number} groups wait for the teacher's word" if number else ""
        return self._books.describe_waiting(step) + told

    def _at_school(self, name: str) -> dict[str, float]:
        return {name: float(self._classroom.num_groups)} if self._classroom else {}

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
