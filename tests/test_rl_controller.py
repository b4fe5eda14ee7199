"""The loop's carrying part against engines that play back a script."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping

import pytest

import rl.controller
from curation.config import CurriculumSection
from curation.curriculum import Curriculum
from ground.errors import DataError, InfraError, PacktrainError, WorkersLostError
from ground.records import Difficulty, Group, Message, Prompt, Rollout
from rl.books import Books
from rl.buffer import Buffer
from rl.busy import BusyClock
from rl.classroom import Speakers
from rl.config import RlSection, ValidationSection
from rl.controller import Controller
from rl.ledger import audit_ledger
from rl.source import Source
from rollout.engine import PromptTooLong, Request
from rollout.fake_engine import FakeEngine
from rollout.judge_fleet import Unjudged
from rollout.systems import SystemInstruction
from rollout.task import GroupTask

RIGHT, WRONG, STOP = 7, 8, 2


class ScriptedFleet:
    """Groups from a FakeEngine: a rollout is right when its answer begins with RIGHT."""

    def __init__(self, is_right: Callable[[GroupTask, int], bool], jitter: float = 0.0) -> None:
        self._is_right, self._random, self._jitter = is_right, random.Random(0), jitter
        self._tasks: dict[str, GroupTask] = {}
        self.engine = FakeEngine(self._answer, seconds=self._seconds)
        self.finished: list[str] = []
        self.failures: dict[str, PacktrainError] = {}

    async def publish(self, version: int, weights: object) -> None:
        self.engine.load(version, {})

    async def rollout(self, task: GroupTask) -> Group:
        if error := self.failures.get(task.prompt.messages[0].content):
            raise error
        self._tasks[task.id] = task
        futures = [
            asyncio.wrap_future(
                self.engine.submit(Request(f"{task.id}/{index}", (1, 5), 4, 1.0, seed, (STOP,)))
            )
            for index, seed in enumerate(task.seeds)
        ]
        completions = await asyncio.gather(*futures)
        self.finished.append(task.id)
        rollouts = tuple(
            Rollout(
                index,
                (completion.segment,),
                text=str(completion.segment.token_ids),
                finish=completion.finish,
                reward=float(completion.segment.token_ids[0] == RIGHT),
                passed=completion.segment.token_ids[0] == RIGHT,
            )
            for index, completion in enumerate(completions)
        )
        return Group(task.id, task.prompt, (1, 5), rollouts, task.system)

    def _answer(self, request: Request) -> tuple[int, ...]:
        task, index = request.id.rsplit("/", 1)
        return (RIGHT if self._is_right(self._tasks[task], int(index)) else WRONG, STOP)

    def _seconds(self, request: Request) -> float:
        return self._random.random() * self._jitter


def make_pool(size: int = 24) -> list[Prompt]:
    return [
        Prompt.make(
            (Message("user", f"task {number}"),),
            capability="sums" if number % 2 else "logic",
            reward="exact",
            answer="4",
            difficulty=Difficulty(successes=4, trials=8),
        )
        for number in range(size)
    ]


def make_controller(
    fleet: ScriptedFleet,
    records: list[dict[str, object]],
    *,
    max_staleness: int = 1,
    max_refills: int = 1,
    validation: list[Prompt] | None = None,
    step_deadline_seconds: float = 10.0,
    in_flight: int = 4,
    note: Callable[[Mapping[str, object]], None] = lambda event: None,
    teachers: Speakers | None = None,
) -> Controller:
    section = RlSection(
        steps=4,
        groups_per_step=3,
        group_size=2,
        max_staleness=max_staleness,
        max_refills=max_refills,
        validation=ValidationSection(prompts=2, samples=3),
        step_deadline_seconds=step_deadline_seconds,
    )
    curriculum = Curriculum(make_pool(), CurriculumSection(), seed=0, group_size=2, steps=4)
    source = Source(
        curriculum,
        steps=4,
        groups_per_step=3,
        max_staleness=max_staleness,
        max_refills=max_refills,
    )
    books = Books(
        source,
        Buffer(groups_per_step=3, max_staleness=max_staleness),
        lambda record: records.append(dict(record)),
    )
    books.open()
    return Controller(
        books,
        fleet,
        section,
        seed=0,
        validation=validation or [],
        system_of=lambda prompt, pass_: SystemInstruction(f"system {pass_}"),
        in_flight=in_flight,
        note=note,
        teachers=teachers,
    )


async def play(controller: Controller, steps: int = 4) -> list[tuple[str, ...]]:
    """A learner that learns nothing: what each step was given."""
    trained = []
    await controller.begin(0, "weights")
    for step in range(steps):
        plan, _ = await controller.next_batch(step)
        trained.append(tuple(group.id for group in plan.groups))
        await controller.publish(step + 1, "weights")
    return trained


def first_is_right(task: GroupTask, index: int) -> bool:
    return index == 0


def mostly_mixed(task: GroupTask, index: int) -> bool:
    """Every third draw is flat."""
    return index == 0 or int(task.id.split(".")[1]) % 3 == 0


@pytest.mark.parametrize("max_staleness", [0, 1, 3])
def test_all_steps_are_trained_and_the_ledger_closes(max_staleness: int) -> None:
    records: list[dict[str, object]] = []
    fleet = ScriptedFleet(mostly_mixed, jitter=0.01)

    async def run() -> list[tuple[str, ...]]:
        controller = make_controller(fleet, records, max_staleness=max_staleness)
        trained = await play(controller)
        assert await controller.close("end")
        return trained

    trained = asyncio.run(run())
    everything = [group for step in trained for group in step]
    assert len(set(everything)) == len(everything) > 6
    totals = audit_ledger(records)
    assert totals["trained"] == len(everything)
    assert totals["filtered"] > 0
    assert "withdrawn" not in totals


def test_synchronous_batches_do_not_depend_on_latency() -> None:
    async def run(jitter: float) -> list[tuple[str, ...]]:
        fleet = ScriptedFleet(mostly_mixed, jitter)
        return await play(make_controller(fleet, [], max_staleness=0))

    assert asyncio.run(run(0.0)) == asyncio.run(run(0.03))


def test_no_trained_token_is_older_than_the_bound() -> None:
    ages: list[int] = []

    async def run() -> None:
        fleet = ScriptedFleet(first_is_right, jitter=0.02)
        controller = make_controller(fleet, [], max_staleness=2)
        await controller.begin(0, "weights")
        for step in range(4):
            plan, _ = await controller.next_batch(step)
            ages.extend(step - group.oldest_version for group in plan.groups)
            await controller.publish(step + 1, "weights")

    asyncio.run(run())
    assert len(ages) == 12
    assert min(ages) >= 0 and max(ages) <= 2


def test_77_a_curriculum_that_is_widened_is_told_once_and_shown_in_the_gauges(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Four steps without a group that teaches; the third one widens it."""
    events: list[Mapping[str, object]] = []

    async def run() -> list[float]:
        fleet = ScriptedFleet(lambda task, index: True)
        controller, gauges = make_controller(fleet, [], note=events.append), []
        await controller.begin(0, "weights")
        for step in range(4):
            _, measured = await controller.next_batch(step)
            gauges.append(measured["curriculum_wide"])
            await controller.publish(step + 1, "weights")
        return gauges

    assert asyncio.run(run()) == [0.0, 0.0, 0.0, 1.0]
    widened = [event for event in events if event["kind"] == "widened"]
    assert [(event["version"], event["role"]) for event in widened] == [(3, "controller")]
    told = [record.message for record in caplog.records if "get half" in record.message]
    assert len(told) == 1 and told[0].startswith("no group of 3 steps in")


def test_a_broken_and_a_refused_group_are_replaced_and_told_apart() -> None:
    records: list[dict[str, object]] = []
    fleet = ScriptedFleet(first_is_right)

    async def run() -> list[tuple[str, ...]]:
        controller = make_controller(fleet, records)
        books = controller._books
        draws = books.waiting()
        fleet.failures[draws[0].prompt.messages[0].content] = InfraError("worker lost")
        fleet.failures[draws[1].prompt.messages[0].content] = PromptTooLong("prompt too long")
        await controller.begin(0, "weights")
        plan, _ = await controller.next_batch(0)
        assert plan.filtered == {"broken": 1, "refused": 1}
        return [tuple(group.id.split(".")[1] for group in plan.groups)]

    assert asyncio.run(run()) == [("1", "3", "4")]


def test_a_group_without_verdicts_is_broken_and_a_look_goes_on_without_it() -> None:
    """Broken is no observation; of two validation prompts the one that was judged is the score."""
    fleet = ScriptedFleet(lambda task, index: index > 0)
    looked = make_pool(26)[24:]

    async def run() -> tuple[dict[str, int], float | None]:
        controller = make_controller(fleet, [], max_refills=0, max_staleness=0, validation=looked)
        first = controller._books.waiting()[0].prompt
        for prompt in (first, looked[0]):
            fleet.failures[prompt.messages[0].content] = Unjudged("no verdict")
        await controller.begin(0, "weights")
        plan, _ = await controller.next_batch(0)
        assert [each.observation for each in plan.outcomes if each.reason == "broken"] == [None]
        return plan.filtered, await controller.evaluate(0)

    filtered, score = asyncio.run(run())
    assert filtered == {"broken": 1}
    assert score == pytest.approx(2 / 3)  # two of three answers are right


def test_a_refill_overtakes_younger_slots() -> None:
    fleet = ScriptedFleet(mostly_mixed)

    async def run() -> None:
        controller = make_controller(fleet, [], in_flight=1)
        await controller.begin(0, "weights")
        await controller.next_batch(0)

    asyncio.run(run())
    assert [int(group_id.split(".")[1]) for group_id in fleet.finished[:4]] == [0, 1, 2, 4]


class SlowLink(ScriptedFleet):
    """A fleet to which weights take a minute."""

    async def publish(self, version: int, weights: object) -> None:
        await asyncio.sleep(60)


def test_the_wait_for_a_hand_over_ends_and_says_what_to_raise() -> None:
    """#33"""
    controller = make_controller(SlowLink(first_is_right), [], step_deadline_seconds=0.05)
    with pytest.raises(
        InfraError, match=r"version 0 must be with all workers within 0\.05"
    ) as told:
        asyncio.run(controller.begin(0, "weights"))
    assert "rl.step_deadline_seconds" in told.value.fix


class Emptied(ScriptedFleet):
    """A fleet whose last worker is gone once version 0 is out, and none comes."""

    async def publish(self, version: int, weights: object) -> None:
        if version:
            await asyncio.Event().wait()
        await super().publish(version, weights)


def test_41_a_run_that_leaves_waits_for_no_worker_and_samples_nothing_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rl.controller, "_LEAVE_SECONDS", 0.05)
    fleet = Emptied(first_is_right)

    async def run() -> tuple[float | None, object, int]:
        controller = make_controller(fleet, [], validation=make_pool(2))
        await controller.begin(0, "weights")
        for step in (0, 1):
            await controller.next_batch(step)
        publication = asyncio.create_task(controller.publish(1, "weights", evaluate=True))
        await asyncio.sleep(0)
        controller.leave()
        await asyncio.sleep(0)
        assert not publication.done()  # it has a moment left
        score = await publication
        sampled = len(fleet.finished)
        await controller.publish(2, "weights")
        await controller.close("interrupted")
        return score, controller.state()["version"], len(fleet.finished) - sampled

    assert asyncio.run(run()) == (None, 2, 0)


def test_the_wait_for_a_step_ends_and_names_its_slots() -> None:
    async def run() -> None:
        fleet = ScriptedFleet(first_is_right, jitter=60)
        fleet._random = random.Random(1)
        controller = make_controller(fleet, [], step_deadline_seconds=0.05)
        await controller.begin(0, "weights")
        await controller.next_batch(0)

    with pytest.raises(InfraError, match=r"step 0 must have .* within 0.05 s.*slot 0 \(group "):
        asyncio.run(run())


def test_a_lost_fleet_fails_the_waiting_learner() -> None:
    async def run() -> None:
        fleet = ScriptedFleet(first_is_right)
        for prompt in make_pool():
            fleet.failures[prompt.messages[0].content] = WorkersLostError("all lost")
        await play(make_controller(fleet, []))

    with pytest.raises(WorkersLostError, match="all lost"):
        asyncio.run(run())


def test_a_fault_of_the_recipe_fails_the_run_with_its_own_words() -> None:
    async def run() -> None:
        fleet = ScriptedFleet(first_is_right)
        for prompt in make_pool():
            fleet.failures[prompt.messages[0].content] = DataError("no reward 'exakt'")
        await play(make_controller(fleet, []))

    with pytest.raises(DataError, match="no reward 'exakt'"):
        asyncio.run(run())


def test_a_look_that_lost_a_prompt_counts_for_nothing() -> None:
    async def run() -> float | None:
        fleet = ScriptedFleet(first_is_right)
        held_out = make_pool(26)[24:]
        fleet.failures[held_out[0].messages[0].content] = InfraError("worker lost")
        controller = make_controller(fleet, [], validation=held_out)
        await controller.begin(0, "weights")
        await controller.next_batch(0)
        return await controller.publish(1, "weights", evaluate=True)

    assert asyncio.run(run()) is None


def test_evaluation_asks_the_validation_slice_under_the_version_just_published() -> None:
    asked: list[GroupTask] = []

    def is_right(task: GroupTask, index: int) -> bool:
        if "validation" in task.id:
            asked.append(task)
            return index == 0
        return index == 0

    async def run() -> float | None:
        fleet = ScriptedFleet(is_right)
        held_out = make_pool(26)[24:]
        controller = make_controller(fleet, [], validation=held_out)
        await controller.begin(0, "weights")
        await controller.next_batch(0)
        return await controller.publish(1, "weights", evaluate=True)

    assert asyncio.run(run()) == pytest.approx(1 / 3)
    assert {task.id.split(".")[1] for task in asked} == {"validation-1"}
    assert len({task.prompt.id for task in asked}) == 2


def test_the_fleets_idle_share_is_what_its_clock_leaves() -> None:
    """Busy for 3 of 4 seconds, then for none of 2."""
    now = [0.0]
    controller = make_controller(ScriptedFleet(first_is_right), [])
    controller._busy = BusyClock(lambda: now[0])
    with controller._busy:
        now[0] = 3.0
    now[0] = 4.0
    assert controller._gauges()["rollout_idle_share"] == 0.25
    now[0] = 6.0
    assert controller._gauges()["rollout_idle_share"] == 1.0


def test_busy_share_counts_overlapping_bodies_once() -> None:
    time = 0.0
    clock = BusyClock(lambda: time)
    with clock:
        time = 1.0
        with clock:
            time = 3.0
    time = 4.0
    assert clock.share() == 0.75
    time = 5.0
    assert clock.share() == 0.0
