"""A whole run on a virtual clock: the real controller, books, ledger and fleet; simulated workers.

durations → run_steps(...) → Played(seconds, …)      lower_bound(...): no schedule ends sooner
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ground.records import Difficulty, Message, Prompt, Segment, Span
from rl.books import Books, Plan
from rl.config import RlSection
from rl.controller import Controller
from rl.journal import Journal
from rollout.config import FleetSection
from rollout.fleet import Fleet
from rollout.seeds import sample_seed
from rollout.simulation import Clock, SimulatedWorker, group_of, run_virtual
from rollout.task import GroupResult, GroupTask

_PATIENCE = 1e9
"""Deadlines mean nothing on a clock that jumps."""
_PING_SECONDS = 300.0
"""A worker finds its first weights at a ping."""


class LightWorker(SimulatedWorker):
    """Costs next to nothing itself: one pause per group, one token per rollout."""

    async def rollout(self, task: GroupTask, attempt: int) -> GroupResult:
        """Wait for the longest rollout."""
        began = self._clock.now
        await asyncio.sleep(max(self._seconds(task)))
        group = group_of(task, [self._token()] * len(task.seeds), self._rewards(task))
        return GroupResult(group, began, began, self._clock.now, len(task.seeds), attempt)

    def _token(self) -> Segment:
        return Segment("policy", (7,), (-0.5,), (Span(self._loads[-1][1], 1),))


@dataclass(slots=True)
class Played:
    """How a run went.

    Example:
        Played(seconds=812.5, cpu_seconds=3.1, rollouts=16_000, work={0: [[4.2, 9.1, …]], …})
    """

    seconds: float = 0.0
    """On the virtual clock."""
    cpu_seconds: float = 0.0
    """Of this process, simulation included."""
    rollouts: int = 0
    work: dict[int, list[list[float]]] = field(default_factory=dict)
    """Seconds of the rollouts of each draw, by step, of draws that were consumed."""


def make_pool(size: int) -> list[Prompt]:
    """Prompts of three capabilities, mined."""
    return [
        Prompt(
            f"{number:016x}",
            (Message("user", "x"),),
            ("math", "code", "chat")[number % 3],
            "exact",
            "",
            Difficulty(successes=number % 17, trials=16),
        )
        for number in range(size)
    ]


def run_steps(
    section: RlSection,
    pool: Sequence[Prompt],
    seconds: Callable[[int], float],
    train_seconds: Callable[[int], float],
    *,
    seed: int = 0,
    flat_share: float = 0.0,
    worker: type[SimulatedWorker] = SimulatedWorker,
) -> Played:
    """Play a run to its end.

    Args:
        seconds: of a rollout, by its sampling seed.
        train_seconds: of a step.
    """
    played = Played()
    world = _World(section, pool, seconds, train_seconds, seed, flat_share, Clock(), worker)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Journal(Path(folder) / "ledger", buffered=True)
        events = Journal(Path(folder) / "events")
        began = time.process_time()
        # Not the plans are its result, for asyncio writes a result out for a message of its own.
        run_virtual(_play(world, ledger, events, played, plans := []), world.clock)
        played.cpu_seconds = time.process_time() - began
        played.work = {plan.step: world.work(plan) for plan in plans}
        ledger.close()
        events.close()
    return played


@dataclass(frozen=True, slots=True)
class _World:
    """What is asked for, and how long things take."""

    section: RlSection
    pool: Sequence[Prompt]
    seconds: Callable[[int], float]
    train_seconds: Callable[[int], float]
    seed: int
    flat_share: float
    clock: Clock
    kind: type[SimulatedWorker]

    def worker(self) -> SimulatedWorker:
        return self.kind(self.clock, self.section.engine.num_slots, self.durations, self.rewards)

    def durations(self, task: GroupTask) -> list[float]:
        return [self.seconds(each) for each in task.seeds]

    def rewards(self, task: GroupTask) -> list[float]:
        is_flat = random.Random(task.seeds[0]).random() < self.flat_share
        return [float(is_flat or number % 2) for number in range(len(task.seeds))]

    def work(self, plan: Plan) -> list[list[float]]:
        draws = [outcome.draw for outcome in plan.outcomes]
        size = range(self.section.group_size)
        return [
            [self.seconds(sample_seed(self.seed, d.prompt.id, d.number, n)) for n in size]
            for d in draws
        ]


async def _play(
    world: _World, ledger: Journal, events: Journal, played: Played, plans: list[Plan]
) -> None:
    section, clock = world.section, world.clock
    fleet = Fleet(section.fleet, world.worker, events.append)
    controller = Controller(
        make_books(section, world.pool, world.seed, ledger),
        fleet,
        section,
        seed=world.seed,
        validation=[],
        system_of=lambda prompt, pass_: "",
        in_flight=section.groups_in_flight,
        note=events.append,
        now=lambda: clock.now,
    )
    await fleet.start()
    await controller.begin(0, "weights")
    began = clock.now
    publication: asyncio.Task[float | None] | None = None
    for step in range(section.steps):
        plan, _ = await controller.next_batch(step)
        played.rollouts += plan.rollouts
        plans.append(plan)
        await asyncio.sleep(world.train_seconds(step))
        if publication:
            await publication
        publication = asyncio.create_task(controller.publish(step + 1, "weights"))
    assert publication
    await publication
    played.seconds = clock.now - began
    await controller.close("end")
    await fleet.close()


def make_books(section: RlSection, pool: Sequence[Prompt], seed: int, ledger: Journal) -> Books:
    """Opened books of a run."""
    books = Books.of(section, pool, seed, ledger.append)
    books.open()
    return books


def make_section(
    *, steps: int, groups_per_step: int, group_size: int, workers: int, slots: int, staleness: int
) -> RlSection:
    """A run whose deadlines cannot pass."""
    fleet = FleetSection(
        num_workers=workers,
        ping_every_seconds=_PING_SECONDS,
        rollout_deadline_seconds=_PATIENCE,
        spare=False,
    )
    return RlSection.model_validate(
        {
            "steps": steps,
            "groups_per_step": groups_per_step,
            "group_size": group_size,
            "max_staleness": staleness,
            "step_deadline_seconds": _PATIENCE,
            "engine": {"num_slots": slots},
            "fleet": fleet.model_dump(),
        }
    )


def lower_bound(
    section: RlSection, work: dict[int, list[list[float]]], train: Callable[[int], float]
) -> float:
    """Seconds before which no schedule can end that keeps the bound on staleness.

    Even one that knows all durations: the slots of step u open with version u - S, its longest
    rollout takes what it takes, all rollouts of the steps up to u must fit into the places of the
    fleet, and steps follow one another.
    """
    places = section.engine.num_slots * section.fleet.num_workers
    published, done = [0.0], 0.0
    for step in range(section.steps):
        opened = published[max(0, step - section.max_staleness)]
        groups = work[step]
        done += sum(map(sum, groups))
        ready = max(opened + max(max(group) for group in groups), done / places)
        published.append(max(published[-1], ready) + train(step))
    return published[-1]
