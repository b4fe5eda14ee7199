"""A whole run on a virtual clock: the real controller, books, ledger and fleet; simulated workers.

    durations ──▶ run_steps(section, pool, Durations(…)) ──▶ Played(seconds, idle shares, ages)

Who draws, waits, refills and goes first is decided by the code of real runs (rl/controller.py,
rl/books.py, rl/buffer.py, rollout/fleet.py); only tokens and steps of the optimizer are durations.
So scheduling at thousands of devices can be seen in seconds, on one core.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ground.records import Difficulty, Message, Prompt
from rl.balance import Balance
from rl.books import Books
from rl.buffer import Plan
from rl.config import RlSection
from rl.controller import Controller
from rl.journal import Journal
from rollout.config import FleetSection
from rollout.fleet import Fleet
from rollout.seeds import sample_seed
from rollout.simulation import Clock, SimulatedWorker, run_virtual
from rollout.systems import SystemInstruction
from rollout.task import GroupTask

_PATIENCE = 1e9
"""Deadlines mean nothing on a clock that jumps."""
_PING_SECONDS = 300.0
"""A worker finds its first weights at a ping."""


@dataclass(frozen=True, slots=True)
class Durations:
    """How long things take; answers by their sampling seed, so that every schedule has the same.

    Example:
        Durations(tokens=lambda seed: 900.0, train_seconds=lambda plan: 12.0,
                  step_seconds=lambda rows: 0.02)
    """

    tokens: Callable[[int], float]
    """Of a rollout, by its sampling seed."""
    train_seconds: Callable[[Plan], float]
    """Of the optimizer step on a plan."""
    step_seconds: Callable[[int], float] = lambda rows: 1.0
    """Of an engine's step over so many rows."""
    reward_seconds: float = 0.0
    """Of the verifiers for a rollout."""
    load_seconds: float = 0.0
    """From a step's end to its version in the engines."""
    flat_share: float = 0.0
    """Of groups without an advantage."""


@dataclass(slots=True)
class Played:
    """How a run went.

    Example:
        Played(seconds=812.5, cpu_seconds=3.1, rollouts=16_000, …)
    """

    seconds: float = 0.0
    """On the virtual clock."""
    cpu_seconds: float = 0.0
    """Of this process, simulation included."""
    rollouts: int = 0
    marks: list[Mark] = field(default_factory=list)
    """At the end of each step."""
    gauges: list[dict[str, float]] = field(default_factory=list)
    """What was measured at each step (rl/balance.py)."""
    ages: Counter[int] = field(default_factory=Counter)
    """Versions between the oldest token of a trained rollout and its step → rollouts."""
    work: dict[int, list[list[float]]] = field(default_factory=dict)
    """Tokens of the rollouts of each draw, by step, of draws that were consumed."""

    def rates(self, first: int = 0, last: int = -1) -> Rates:
        """How it went between the ends of two steps, so that beginning and end can be left out."""
        a, b = self.marks[first], self.marks[last]
        seconds, steps = b.now - a.now, len(self.marks[first:]) - len(self.marks[last:])
        lived = b.lived_seconds - a.lived_seconds
        return Rates(
            step_seconds=seconds / steps,
            learner_idle_share=1 - (b.trained_seconds - a.trained_seconds) / seconds,
            engines_idle_share=1 - (b.busy_seconds - a.busy_seconds) / lived,
            places_share=(b.row_seconds - a.row_seconds) / lived,
        )


@dataclass(frozen=True, slots=True)
class Mark:
    """What had been done by the end of a step; seconds of engines are summed over the fleet."""

    now: float
    trained_seconds: float
    """In which the learner took steps."""
    lived_seconds: float
    """Of engines, from birth to end: a fleet that is resized has had more than it has."""
    busy_seconds: float
    """Of engines, with a row at least."""
    row_seconds: float
    """Of engines, weighed by the share of their places with a row in it."""


@dataclass(frozen=True, slots=True)
class Rates:
    """A stretch of a run.

    Example:
        Rates(step_seconds=120.0, learner_idle_share=0.3, engines_idle_share=0.06, places_share=.9)
    """

    step_seconds: float
    learner_idle_share: float
    engines_idle_share: float
    places_share: float


def make_pool(size: int, capabilities: Sequence[str] = ("math", "code", "chat")) -> list[Prompt]:
    """Prompts of some capabilities in turn, mined."""
    return [
        Prompt(
            f"{number:016x}",
            (Message("user", "x"),),
            capabilities[number % len(capabilities)],
            "exact",
            "",
            Difficulty(successes=number % 17, trials=16),
        )
        for number in range(size)
    ]


def run_steps(
    section: RlSection,
    pool: Sequence[Prompt],
    durations: Durations,
    *,
    seed: int = 0,
    worker: type[SimulatedWorker] = SimulatedWorker,
) -> Played:
    """Play a run to its end."""
    played = Played()
    world = _World(section, pool, durations, seed, Clock(), worker)
    with tempfile.TemporaryDirectory() as folder:
        ledger = Journal(Path(folder) / "ledger", buffered=True)
        events = Journal(Path(folder) / "events", buffered=True)
        began = time.process_time()
        # Not the plans are its result, for asyncio writes a result out for a message of its own.
        run_virtual(_play(world, ledger, events, played, plans := []), world.clock)
        played.cpu_seconds = time.process_time() - began
        played.work = {plan.step: world.work(plan) for plan in plans}
        ledger.close()
        events.close()
    return played


def make_books(section: RlSection, pool: Sequence[Prompt], seed: int, ledger: Journal) -> Books:
    """Opened books of a run."""
    books = Books.of(section, pool, seed, ledger.append)
    books.open()
    return books


def make_section(
    *, steps: int, groups_per_step: int, group_size: int, workers: int, slots: int, staleness: int
) -> RlSection:
    """A run of these sizes whose deadlines cannot pass."""
    section = RlSection.model_validate(
        {
            "steps": steps,
            "groups_per_step": groups_per_step,
            "group_size": group_size,
            "max_staleness": staleness,
            "engine": {"num_slots": slots},
        }
    )
    return patient(section, workers)


def patient(section: RlSection, workers: int, most: int | None = None) -> RlSection:
    """The same with so many workers, and with deadlines that cannot pass on a clock that jumps."""
    fleet = FleetSection(
        num_workers=workers,
        max_workers=most,
        ping_every_seconds=_PING_SECONDS,
        rollout_deadline_seconds=_PATIENCE,
        publish_deadline_seconds=_PATIENCE,
        spare=False,
    )
    return section.model_copy(update={"fleet": fleet, "step_deadline_seconds": _PATIENCE})


@dataclass(slots=True)
class _World:
    """What is asked for, and how long things take."""

    section: RlSection
    pool: Sequence[Prompt]
    durations: Durations
    seed: int
    clock: Clock
    kind: type[SimulatedWorker]
    workers: list[SimulatedWorker] = field(default_factory=list)

    def worker(self) -> SimulatedWorker:
        """A worker that takes as long as it is told."""
        self.workers.append(
            self.kind(
                self.clock,
                self.section.engine.num_slots,
                lambda task: [self.durations.tokens(seed) for seed in task.seeds],
                self._rewards,
                step_seconds=self.durations.step_seconds,
                reward_seconds=self.durations.reward_seconds,
                load_seconds=self.durations.load_seconds,
            )
        )
        return self.workers[-1]

    def work(self, plan: Plan) -> list[list[float]]:
        """Tokens of the rollouts of each draw that a plan consumed."""
        draws = [outcome.draw for outcome in plan.outcomes]
        size = range(self.section.group_size)
        return [
            [self.durations.tokens(sample_seed(self.seed, d.prompt.id, d.number, n)) for n in size]
            for d in draws
        ]

    def _rewards(self, task: GroupTask) -> list[float]:
        is_flat = random.Random(task.seeds[0]).random() < self.durations.flat_share
        return [float(is_flat or number % 2) for number in range(len(task.seeds))]


async def _play(
    world: _World, ledger: Journal, events: Journal, played: Played, plans: list[Plan]
) -> None:
    section, clock = world.section, world.clock
    fleet = Fleet(
        section.fleet,
        world.worker,
        events.append,
        full_at=section.engine.num_slots / section.group_size,
        now=lambda: clock.now,
    )
    overlaps = section.max_staleness > 0
    balance = Balance(fleet, section.fleet, overlaps=overlaps, now=lambda: clock.now)
    controller = Controller(
        make_books(section, world.pool, world.seed, ledger),
        fleet,
        section,
        seed=world.seed,
        validation=[],
        system_of=lambda prompt, pass_: SystemInstruction(),
        in_flight=section.groups_in_flight,
        note=events.append,
        now=lambda: clock.now,
    )
    await fleet.start()
    await controller.begin(0, "weights")
    began = clock.now
    publication: asyncio.Task[float | None] | None = None
    seconds = 0.0
    for step in range(section.steps):
        plan, _ = await controller.next_batch(step)
        played.gauges.append(balance.turn(seconds, plan.rollouts))
        plans.append(plan)
        seconds = world.durations.train_seconds(plan)
        await asyncio.sleep(seconds)
        _count(played, world, plan, seconds, clock.now - began)
        if publication:
            await publication
        publication = asyncio.create_task(controller.publish(step + 1, "weights"))
    assert publication
    await publication
    played.seconds = clock.now - began
    await controller.close("end")
    await fleet.close()


def _count(played: Played, world: _World, plan: Plan, seconds: float, now: float) -> None:
    played.rollouts += plan.rollouts
    trained = played.marks[-1].trained_seconds if played.marks else 0.0
    busy, rows = map(sum, zip(*(worker.used() for worker in world.workers), strict=True))
    lived = sum(worker.lived_seconds for worker in world.workers)
    rows /= world.section.engine.num_slots
    played.marks.append(Mark(now, trained + seconds, lived, busy, rows))
    for group in plan.groups:
        played.ages[plan.step - min(group.versions)] += len(group.rollouts)
