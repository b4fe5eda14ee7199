"""Random schedules on a virtual clock: the bound on staleness, capacity, starvation, and bias.

The controller, the books and the ledger are the real ones; only tokens and time are simulated.
"""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ks_2samp

from ground.errors import InfraError
from ground.records import Difficulty, Message, Prompt
from rl.books import Books
from rl.buffer import LATE, Plan
from rl.config import RlSection
from rl.controller import Controller
from rl.ledger import audit_ledger
from rollout.simulation import Clock, SimulatedFleet, run_virtual
from rollout.systems import SystemInstruction
from rollout.task import GroupTask

POOL = [
    Prompt.make(
        (Message("user", f"task {number}"),),
        capability=("sums", "logic", "code")[number % 3],
        reward="exact",
        answer="",
        difficulty=Difficulty(successes=number % 7, trials=8),
    )
    for number in range(60)
]


@dataclass
class World:
    """How long things take and what goes wrong, all from one seed."""

    section: RlSection
    seed: int = 0
    num_workers: int = 2
    slots: int = 3
    skew: float = 1.0
    flat_share: float = 0.2
    failure_share: float = 0.0
    train_seconds: float = 5.0
    load_seconds: float = 2.0
    clock: Clock = field(default_factory=Clock)
    plans: list[Plan] = field(default_factory=list)
    records: list[dict[str, object]] = field(default_factory=list)

    def run(self) -> World:
        run_virtual(self._live(), self.clock)
        return self

    def chance(self, *what: object) -> random.Random:
        """A draw that depends on what it is for, not on when it is made."""
        return random.Random(repr((self.seed, *what)))

    def seconds(self, task: GroupTask) -> tuple[float, ...]:
        return tuple(self.chance("s", seed).lognormvariate(1.0, self.skew) for seed in task.seeds)

    def rewards(self, task: GroupTask) -> tuple[float, ...]:
        if self.chance("flat", task.seeds).random() < self.flat_share:
            return (1.0,) * len(task.seeds)
        return tuple(float(n % 2) for n in range(len(task.seeds)))

    def fails(self, task: GroupTask) -> Exception | None:
        is_broken = self.chance("fail", task.id).random() < self.failure_share
        return InfraError("a worker is gone") if is_broken else None

    async def _live(self) -> None:
        fleet = SimulatedFleet(
            self.clock,
            self.num_workers,
            self.slots,
            self.seconds,
            self.rewards,
            self.fails,
            lambda worker, version: (
                self.chance("load", worker, version).random() * self.load_seconds
            ),
        )
        self.books = make_books(self.section, self.records)
        self.controller = Controller(
            self.books,
            fleet,
            self.section,
            seed=self.seed,
            validation=[],
            system_of=lambda prompt, pass_: SystemInstruction(),
            in_flight=self.num_workers * self.slots + 1,
            note=lambda event: None,
            now=lambda: self.clock.now,
        )
        await self.controller.begin(0, "weights")
        publication: asyncio.Task[float | None] | None = None
        for step in range(self.section.steps):
            plan, _ = await self.controller.next_batch(step)
            assert (await self.controller.next_batch(step))[0] == plan
            self.plans.append(plan)
            await asyncio.sleep(self.chance("train", step).random() * self.train_seconds)
            if publication:
                await publication
            publication = asyncio.create_task(self.controller.publish(step + 1, "weights"))
        assert publication
        await publication
        await self.controller.close("end")


def make_books(section: RlSection, records: list[dict[str, object]]) -> Books:
    books = Books.of(section, POOL, 0, lambda record: records.append(dict(record)))
    books.open()
    return books


def make_section(**values: object) -> RlSection:
    shape = {"steps": 8, "groups_per_step": 4, "group_size": 2, "max_staleness": 1}
    return RlSection.model_validate({**shape, "step_deadline_seconds": 1e6, **values})


@settings(max_examples=60)
@given(
    staleness=st.integers(0, 3),
    refills=st.integers(0, 2),
    late=st.sampled_from(["wait", "drop"]),
    floor=st.sampled_from([0.25, 0.5, 0.9]),
    seed=st.integers(0, 10_000),
    workers=st.integers(1, 4),
    skew=st.sampled_from([0.1, 1.0, 2.0]),
    failures=st.sampled_from([0.0, 0.3]),
    train=st.sampled_from([0.0, 5.0, 60.0]),
    load=st.sampled_from([0.0, 2.0, 40.0]),
)
def test_whatever_the_schedule_the_bound_holds_and_every_draw_is_accounted_for(
    staleness: int,
    refills: int,
    late: str,
    floor: float,
    seed: int,
    workers: int,
    skew: float,
    failures: float,
    train: float,
    load: float,
) -> None:
    section = make_section(
        max_staleness=staleness, max_refills=refills, late=late, late_floor=floor
    )
    world = World(section, seed, workers, 2, skew, 0.3, failures, train, load).run()
    check_bound(world)
    totals = audit_ledger(world.records)
    drawn = {r["draw"] for r in world.records}
    assert sum(totals.values()) == len(drawn)
    assert len(world.books.buffer) == 0
    trained = [group.id for plan in world.plans for group in plan.groups]
    assert len(trained) == len(set(trained)) == totals.get("trained", 0)
    dropped = Counter(o.draw.number for p in world.plans for o in p.outcomes if o.reason == LATE)
    assert max(dropped.values(), default=0) <= 1
    again = sum(o.draw.is_again and o.draw.attempt == 0 for p in world.plans for o in p.outcomes)
    assert again + totals.get("withdrawn", 0) == len(dropped)
    assert again >= len(dropped) - section.groups_per_step * 2
    if late == "wait":
        assert not dropped and "withdrawn" not in totals


def check_bound(world: World) -> None:
    """No token that is trained on is older than the bound, or than its slot."""
    bound = world.section.max_staleness
    for plan in world.plans:
        for outcome in plan.outcomes:
            if outcome.group and not outcome.reason:
                versions = outcome.group.versions
                assert plan.step - bound <= min(versions) <= max(versions) <= plan.step
                assert min(versions) >= outcome.draw.version


def test_a_swap_in_flight_leaves_spans_of_both_versions() -> None:
    world = World(make_section(steps=20, max_staleness=2), skew=1.5, load_seconds=1.0).run()
    check_bound(world)
    mixed = [g for plan in world.plans for g in plan.groups if len(g.versions) > 1]
    assert len(mixed) > 10
    ages = [plan.step - group.oldest_version for plan in world.plans for group in plan.groups]
    assert max(ages) == 2 and min(ages) < 2


@pytest.mark.parametrize("staleness", [0, 2])
def test_draws_do_not_depend_on_who_finishes_first(staleness: int) -> None:
    """Same answers, other durations: the same prompts are drawn for the same slots."""
    drawn = []
    for skew, workers in ((0.1, 1), (2.0, 4)):
        world = World(
            make_section(max_staleness=staleness), skew=skew, num_workers=workers, flat_share=0.4
        ).run()
        outcomes = [o for plan in world.plans for o in plan.outcomes]
        drawn.append([(o.draw.slot, o.draw.number, o.draw.prompt.id, o.reason) for o in outcomes])
    assert drawn[0] == drawn[1]
    assert any(reason for *_, reason in drawn[0])


def trained_seconds(world: World) -> list[float]:
    """How long the rollouts took that were trained on."""
    tokens = [r.num_tokens for p in world.plans for g in p.groups for r in g.rollouts]
    return [count / 10 for count in tokens]


def drawn_seconds(world: World) -> list[float]:
    """How long all rollouts take whose prompts were drawn, each draw once, by the ledger."""
    prompts, found = {prompt.id: prompt for prompt in POOL}, list[float]()
    for record in world.records:
        if record["state"] == "pending":
            prompt, number = prompts[str(record["prompt_id"])], int(str(record["draw"]))
            task = world.controller._task(prompt, "", number, world.section.group_size)
            found += [max(1, round(seconds * 10)) / 10 for seconds in world.seconds(task)]
    return found


def p_value(one: list[float], two: list[float]) -> float:
    """Kolmogorov and Smirnov's chance of two samples as different as these from one source."""
    return float(ks_2samp(one, two)[1])  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("late", ["wait", "drop"])
def test_long_answers_are_trained_on_as_often_as_they_are_drawn(late: str) -> None:
    """Under heavy skew; `drop` puts long groups off by a step or more but does not lose them."""
    section = make_section(
        steps=60, groups_per_step=8, max_staleness=1, late=late, late_floor=0.5, max_refills=0
    )
    world = World(section, skew=2.0, num_workers=4, slots=4, flat_share=0.0, train_seconds=1.0)
    world.run()
    trained, drawn = trained_seconds(world), drawn_seconds(world)
    late_ones = sum(o.reason == LATE for plan in world.plans for o in plan.outcomes)
    assert (late_ones > 20) == (late == "drop")
    assert len(drawn) > 700
    assert p_value(trained, drawn) > 0.5
    # A loop that took whoever finished first would be seen: the shorter half of each step.
    hasty = [
        r.num_tokens / 10
        for plan in world.plans
        for g in sorted(plan.groups, key=lambda g: max(r.num_tokens for r in g.rollouts))[:4]
        for r in g.rollouts
    ]
    assert p_value(hasty, drawn) < 1e-3


def test_a_step_that_drops_ends_sooner_than_one_that_waits() -> None:
    ends = {}
    for late in ("wait", "drop"):
        section = make_section(steps=30, late=late, late_floor=0.5, max_staleness=1)
        ends[late] = World(section, skew=2.0, num_workers=4, slots=4).run().clock.now
    assert ends["drop"] < ends["wait"]
