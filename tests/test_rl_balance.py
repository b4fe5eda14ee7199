"""Speeds, the policy that resizes the fleet, and how the fleet grows and shrinks at work."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Coroutine

import pytest

from ground.errors import WorkersLostError
from ground.records import Group, Message, Prompt
from rl.balance import Balance
from rl.buffer import Plan
from rl.config import RlSection
from rl.simulate import Durations, Played, make_pool, make_section, patient, run_steps
from rl.speeds import BAND, SpeedMeter, Speeds, trimmed_mean, wanted
from rollout.config import FleetSection, SamplingSection
from rollout.fleet import Fleet, FleetUse
from rollout.roster import Event
from rollout.seat import WorkerDiedError
from rollout.simulation import Clock, SimulatedWorker, run_virtual
from rollout.task import GroupResult, GroupTask, Pong


def test_the_fleet_is_resized_to_where_the_paces_meet() -> None:
    speeds = Speeds(learner=0.02, rollout=0.07, reward=0.0)
    assert wanted(speeds, 2, 1, 8) == 4  # 0.07 / 4 = 0.0175, 0.07 / 3 would be too slow
    assert wanted(speeds, 8, 1, 8) == 4
    assert wanted(speeds, 2, 1, 3) == 3 and wanted(speeds, 8, 5, 8) == 5


def test_inside_the_band_nothing_moves() -> None:
    for rollout in (0.0701, 0.08, 0.0919):  # 4 workers, paces of 0.0175 to 0.023 against 0.02
        assert wanted(Speeds(0.02, rollout, 0.0), 4, 1, 8) == 4
    assert 0.02 * (1 + BAND) < 0.0921 / 4
    assert wanted(Speeds(0.02, 0.0921, 0.0), 4, 1, 8) == 5
    assert wanted(Speeds(0.02, 0.0509, 0.0), 4, 1, 8) == 3  # 3 workers: 0.017 a sample


def test_a_change_shows_after_three_steps_and_an_outlier_never() -> None:
    meter = SpeedMeter()
    for learner in (1.0, 1.0, 1.0, 9.0, 1.0):
        meter.see(Speeds(learner, 2.0, 0.0))
        assert meter.speeds == Speeds(1.0, 2.0, 0.0)
    for _ in range(2):
        meter.see(Speeds(2.0, 2.0, 0.0))
    assert meter.speeds and meter.speeds.learner == 2.0  # 1, 9, 1, 2, 2
    assert Speeds(0.5, 3.0, 0.0).step_seconds(2, 10) == 15.0


class CountingFleet:
    """A fleet of which only the books are kept."""

    def __init__(self, workers: int) -> None:
        self.workers, self.filled, self.rollouts = workers, 0.0, 0

    def use(self) -> FleetUse:
        return FleetUse(self.workers, self.filled, self.rollouts, 0.5 * self.rollouts)

    def resize(self, num_workers: int) -> None:
        self.workers = num_workers


def test_decisions_follow_the_median_and_predictions_the_mean_without_its_ends() -> None:
    """Steps that alternate: the median is one of both, the mean lies between them."""
    meter = SpeedMeter()
    assert meter.speeds is None and meter.typical is None
    for step in range(12):
        learner = 99.0 if step < 2 else 9.0 if step == 7 else 1.0 + step % 2
        meter.see(Speeds(learner, 3.0, 0.0, rest=0.5))
    # the last ten: 1 2 1 2 1 9 1 2 1 2; the last five: 9 1 2 1 2
    assert meter.typical == Speeds(1.5, 3.0, 0.0, rest=0.5)
    assert meter.speeds == Speeds(2.0, 3.0, 0.0, rest=0.5)
    assert trimmed_mean([4.0, 1.0]) == 2.5 and trimmed_mean([9.0, 1.0, 2.0]) == 2.0


def test_in_turns_the_step_is_the_sum_and_the_fleet_only_grows() -> None:
    speeds = Speeds(learner=0.02, rollout=0.04, reward=0.0)
    assert speeds.step_seconds(4, 100, overlaps=False) == pytest.approx(3.0)  # 2 s + 1 s
    assert speeds.step_seconds(4, 100) == pytest.approx(2.0)
    assert wanted(speeds, 4, 1, 8, overlaps=False) == 8 and wanted(speeds, 4, 1, 8) == 2
    fleet = CountingFleet(4)
    settings = FleetSection(num_workers=4, max_workers=8)
    balance = Balance(fleet, settings, overlaps=False, now=lambda: 0.0)
    for step in range(4):
        fleet.filled, fleet.rollouts = 4.0 * step, 100 * step
        gauges = balance.turn(2.0, 100)
    assert fleet.workers == 8 and gauges["predicted_seconds"] == pytest.approx(3.0)


def test_a_fleet_without_workers_has_gauges_without_a_prediction() -> None:
    fleet = CountingFleet(2)
    balance = Balance(fleet, FleetSection(num_workers=2, max_workers=4), overlaps=True)
    balance.turn(0.0, 10)
    fleet.filled, fleet.rollouts, fleet.workers = 12.0, 8, 0
    assert balance.turn(5.0, 10) == {"workers": 0.0}


def test_the_learners_time_is_its_step_over_the_rollouts_of_that_steps_plan() -> None:
    fleet, clock = CountingFleet(2), iter([0.0, 4.0, 13.0])
    balance = Balance(fleet, FleetSection(num_workers=2), overlaps=True, now=lambda: next(clock))
    assert balance.turn(0.0, 10) == {"workers": 2.0}
    fleet.filled, fleet.rollouts = 12.0, 8
    gauges = balance.turn(5.0, 20)
    assert gauges["learner_seconds_per_sample"] == 0.5
    assert gauges["rollout_seconds_per_sample"] == 1.5
    assert gauges["reward_seconds_per_sample"] == 0.5
    assert gauges["rest_seconds"] == 9.0 - 10 * 0.75  # two workers: 1.5 / 2
    assert gauges["predicted_seconds"] == 20 * 0.75 + 1.5
    assert fleet.workers == 2  # without max_workers nothing is resized, however far apart


Slow = dict[str, float]


def play_drift(side: str, most: int | None) -> Played:
    """40 steps of 16 groups of 4, each worker with places for 8 answers: four workers keep up with
    the learner until, from step 20 on, one side is half as fast."""
    slow: Slow = {"train": 1.0, "decode": 1.0}

    def train(plan: Plan) -> float:
        if plan.step == 20:
            slow[side] = 2.0
        return 10.0 * slow["train"]

    durations = Durations(
        tokens=lambda seed: 5.0, train_seconds=train, step_seconds=lambda rows: slow["decode"]
    )
    section = make_section(
        steps=40, groups_per_step=16, group_size=4, workers=4, slots=8, staleness=1
    )
    return run_steps(patient(section, 4, most), make_pool(200), durations)


def test_a_fleet_of_half_its_speed_grows_and_the_old_step_time_is_back() -> None:
    fixed, played = play_drift("decode", None), play_drift("decode", 12)
    before = played.rates(10, 19).step_seconds
    assert before == pytest.approx(10.0, rel=0.05)
    assert fixed.rates(28, -3).step_seconds == pytest.approx(2 * before, rel=0.1)
    assert played.rates(28, -3).step_seconds == pytest.approx(before, rel=0.1)
    workers = [gauges["workers"] for gauges in played.gauges]
    assert set(workers[:20]) == {4.0} and workers[-1] in (8.0, 9.0)
    assert recovery(played, before) <= 6


def test_a_learner_of_half_its_speed_gets_a_smaller_fleet_and_is_as_fast_with_it() -> None:
    fixed, played = play_drift("train", None), play_drift("train", 12)
    workers = [gauges["workers"] for gauges in played.gauges]
    assert workers[19] == 4.0 and workers[-1] == 2.0
    slow = fixed.rates(28, -3)
    assert slow.step_seconds == pytest.approx(20.0, rel=0.05) and slow.engines_idle_share > 0.4
    assert played.rates(28, -3).step_seconds == pytest.approx(slow.step_seconds, rel=0.05)
    # Two workers of four have gone, and the two that stay are busy all the time.
    assert played.rates(28, -3).engines_idle_share == pytest.approx(0.0, abs=0.02)
    assert played.rates(28, -3).places_share == pytest.approx(1.0, abs=0.02)


def recovery(played: Played, before: float) -> int:
    """Steps from the change at step 20 until a step takes no longer than it did, and a tenth."""
    ends = [mark.now for mark in played.marks]
    return next(n for n in range(1, 20) if ends[20 + n] - ends[19 + n] <= 1.1 * before)


def test_resizing_changes_nothing_of_what_a_synchronous_run_trains_on() -> None:
    trained: list[list[list[tuple[int, str]]]] = []
    for workers, most in ((2, None), (1, 5)):
        plans: list[list[tuple[int, str]]] = []

        def train(plan: Plan, into: list[list[tuple[int, str]]] = plans) -> float:
            into.append([(o.draw.number, o.draw.prompt.id) for o in plan.outcomes])
            return 1.0

        section = make_section(
            steps=12, groups_per_step=6, group_size=4, workers=2, slots=4, staleness=0
        )
        played = run_steps(
            patient(section, workers, most),
            make_pool(50),
            Durations(lambda seed: 3 + seed % 7, train, flat_share=0.3),
        )
        assert (played.gauges[-1]["workers"] > workers) == (most is not None)
        trained.append(plans)
    assert trained[0] == trained[1]


# The fleet itself.

SECTION = FleetSection(
    num_workers=2, max_workers=8, spare=False, ping_every_seconds=1, rollout_deadline_seconds=1e6
)


class Crew:
    """Spawns simulated workers and remembers who sampled what and who was ended."""

    def __init__(self, seconds: float = 10.0) -> None:
        self.clock, self.seconds = Clock(), seconds
        self.born: list[RecordingWorker] = []
        self.dies_at_birth = False
        self.events: list[Event] = []

    def spawn(self) -> RecordingWorker:
        self.born.append(RecordingWorker(self))
        return self.born[-1]

    def sampled(self) -> Counter[str]:
        return Counter(name for worker in self.born for name in worker.sampled)


class RecordingWorker(SimulatedWorker):
    """A simulated worker with four places."""

    def __init__(self, crew: Crew) -> None:
        rewards: Callable[[GroupTask], list[float]] = lambda task: [1.0] * len(task.seeds)  # noqa: E731
        super().__init__(crew.clock, 4, lambda task: [crew.seconds] * len(task.seeds), rewards)
        self.sampled: list[str] = []
        self.is_closed = self.is_killed = False
        self.dies = self.death = False
        self.closing_seconds = 0.0
        self.crew = crew

    async def open(self, index: int, slots_share: float = 1.0) -> None:
        if self.crew.dies_at_birth:
            raise WorkerDiedError("it died")
        await super().open(index, slots_share)

    async def ping(self) -> Pong:
        if self.death:
            raise WorkerDiedError("it died")
        return await super().ping()

    async def rollout(self, task: GroupTask, attempt: int) -> GroupResult:
        if self.dies:
            await asyncio.sleep(1)
            raise WorkerDiedError("it died")
        result = await super().rollout(task, attempt)
        self.sampled.append(task.id)
        return result

    def kill(self) -> None:
        self.is_killed = True

    async def close(self) -> None:
        await asyncio.sleep(self.closing_seconds)
        self.is_closed = True


def make_task(name: str) -> GroupTask:
    prompt = Prompt.make((Message("user", name),), capability="c", reward="exact", answer="")
    return GroupTask(name, prompt, "", SamplingSection(), (1, 2))


def run(crew: Crew, scenario: Callable[[Fleet], Coroutine[None, None, None]]) -> None:
    async def main() -> None:
        fleet = Fleet(SECTION, crew.spawn, crew.events.append, now=lambda: crew.clock.now)
        await fleet.start()
        await fleet.publish(0, "weights")
        await scenario(fleet)
        await fleet.close()

    run_virtual(main(), crew.clock)


async def begin(fleet: Fleet, *names: str) -> list[asyncio.Task[Group]]:
    tasks = [asyncio.create_task(fleet.rollout(make_task(name))) for name in names]
    await asyncio.sleep(0.1)
    return tasks


def test_a_seat_that_is_added_gets_work_once_it_has_the_weights() -> None:
    crew = Crew()

    async def scenario(fleet: Fleet) -> None:
        fleet.resize(3)
        assert fleet.stats().states == ("healthy", "healthy", "starting")
        await asyncio.sleep(2)
        assert fleet.stats().states == ("healthy",) * 3
        await asyncio.gather(*await begin(fleet, "a", "b", "c"))
        assert [worker.sampled for worker in crew.born] == [["a"], ["b"], ["c"]]

    run(crew, scenario)


def test_a_seat_that_leaves_ends_its_groups_and_gets_no_others() -> None:
    crew = Crew()

    async def scenario(fleet: Fleet) -> None:
        first = await begin(fleet, "a", "b", "c", "d")
        fleet.resize(1)
        assert fleet.stats().states == ("healthy", "leaving")
        await fleet.publish(1, "weights")  # it takes them too, for what it still samples
        later = await begin(fleet, "e", "f")
        groups = await asyncio.gather(*first, *later)
        await asyncio.sleep(2)
        assert fleet.stats().states == ("healthy", "retired") and fleet.use().workers == 1
        assert crew.born[1].sampled == ["b", "d"] and crew.born[1].is_closed
        assert max(groups[1].versions) == 1
        assert not crew.born[0].is_closed

    run(crew, scenario)
    assert set(crew.sampled().values()) == {1} and len(crew.sampled()) == 6
    assert [event["role"] for event in crew.events if event["kind"] == "dismissed"] == ["worker 1"]


def test_a_seat_that_dies_while_it_leaves_is_not_replaced_and_loses_nothing() -> None:
    crew = Crew()

    async def scenario(fleet: Fleet) -> None:
        crew.born[1].dies = True
        running = await begin(fleet, "a", "b", "c", "d")
        fleet.resize(1)
        await asyncio.gather(*running)
        await asyncio.sleep(3)
        assert fleet.stats().states == ("healthy", "retired") and len(crew.born) == 2
        assert crew.born[1].is_killed and not crew.born[1].is_closed

    run(crew, scenario)
    assert crew.sampled() == Counter("abcd")


def test_a_fleet_whose_last_staying_seat_is_given_up_has_failed() -> None:
    """Seat 1 is well and leaves, so it gets no more work; nobody else ever comes."""
    crew = Crew(seconds=1e5)

    async def scenario(fleet: Fleet) -> None:
        running = await begin(fleet, "a", "b")
        fleet.resize(1)
        crew.dies_at_birth = True
        crew.born[0].death = True
        with pytest.raises(WorkersLostError, match="at least 1 of 2 rollout workers must live, 0 "):
            await fleet.rollout(make_task("c"))
        for call in (fleet.use, lambda: fleet.resize(2)):
            with pytest.raises(WorkersLostError):
                call()
        assert crew.clock.now < 1e4 and fleet.stats().states == ("retired", "leaving")
        await asyncio.gather(*running, return_exceptions=True)

    run(crew, scenario)


def test_who_does_not_serve_leaves_before_who_does() -> None:
    crew = Crew()

    async def scenario(fleet: Fleet) -> None:
        crew.dies_at_birth = crew.born[0].death = True
        await asyncio.sleep(2)
        assert fleet.stats().states == ("restarting", "healthy")
        fleet.resize(1)
        assert [seat.is_leaving for seat in fleet._roster.seats] == [True, False]
        born = len(crew.born)
        await asyncio.sleep(100)
        assert fleet.stats().states == ("retired", "healthy")
        assert len(crew.born) == born  # it is not born again to be dismissed

    run(crew, scenario)


def test_a_dismissed_worker_that_ends_slowly_is_closed_with_the_fleet() -> None:
    crew = Crew()

    async def scenario(fleet: Fleet) -> None:
        crew.born[1].closing_seconds = 50.0
        fleet.resize(1)
        await asyncio.sleep(2)
        assert fleet.stats().states == ("healthy", "retired") and not crew.born[1].is_closed

    run(crew, scenario)
    assert crew.born[1].is_closed


def test_a_fleet_that_shrank_grows_again_in_new_seats() -> None:
    crew = Crew()

    async def scenario(fleet: Fleet) -> None:
        fleet.resize(1)
        await asyncio.sleep(2)
        fleet.resize(2)
        await asyncio.sleep(2)
        assert fleet.stats().states == ("healthy", "retired", "healthy")
        fleet.resize(2)
        assert len(crew.born) == 3

    run(crew, scenario)


def test_use_counts_workers_as_full_as_they_are() -> None:
    crew = Crew()

    async def scenario(fleet: Fleet) -> None:
        began = crew.clock.now
        await asyncio.gather(*await begin(fleet, "a", "b", "c"))  # two on one worker, at full_at 1
        assert fleet.use().filled_seconds == pytest.approx(2 * 10.0)
        assert fleet.use().rollouts == 6 and crew.clock.now == pytest.approx(began + 10)

    run(crew, scenario)


def test_the_recipe_allows_it_and_everything_that_is_sized_by_it_follows() -> None:
    with pytest.raises(ValueError, match=r"max_workers must be at least num_workers \(4\), got 3"):
        FleetSection(num_workers=4, max_workers=3)
    fixed, elastic = (
        RlSection.model_validate({"steps": 1, "fleet": fleet})
        for fleet in ({"num_workers": 2}, {"num_workers": 2, "max_workers": 6})
    )
    assert fixed.fleet.most_workers == 2 and elastic.fleet.most_workers == 6
    assert elastic.groups_in_flight == 3 * fixed.groups_in_flight
