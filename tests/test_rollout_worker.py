"""Workers and fleet under real Ray: groups, weights in flight, kill -9, SIGSTOP, orphans."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from fleet_doubles import RealBirths, answers, is_running, make_task, run_fleet

from ground.constraints import Constraint
from ground.errors import DataError, WorkersLostError
from rollout.compliance import Demand
from rollout.config import EngineSection, FleetSection
from rollout.fleet import Fleet
from rollout.ray_worker import RayWorker
from rollout.task import WorkerConfig
from rollout.worker import _Sampling

pytestmark = pytest.mark.usefixtures("ray_local")

ENGINE = EngineSection(num_slots=8, max_length=256)
FLEET = FleetSection(
    num_workers=2,
    cpus_per_worker=0.5,
    start_deadline_seconds=60,
    rollout_deadline_seconds=60,
    ping_every_seconds=0.2,
    ping_deadline_seconds=6,
    max_restarts=2,
    backoff_seconds=0.1,
    spare=False,
)


async def sampling(worker: RayWorker) -> None:
    """Return once a worker has a group that is being sampled."""
    async with asyncio.timeout(60):
        while not any((await worker.ping()).sampling.values()):
            await asyncio.sleep(0.01)


def test_a_worker_samples_scores_and_swaps_weights(tiny_model: Path) -> None:
    engine = ENGINE.model_copy(update={"max_length": 500})  # room for seconds of decoding
    births = RealBirths(WorkerConfig(tiny_model, engine, _fleet(num_workers=1)))

    async def scenario(fleet: Fleet) -> None:
        await fleet.start()
        await fleet.publish(0, births.publish(0))
        task = make_task("hello", system="Be brief.")
        group = await fleet.rollout(task)
        assert (group.id, group.system, len(group.rollouts)) == (task.id, "Be brief.", 3)
        assert [rollout.index for rollout in group.rollouts] == [0, 1, 2]
        assert all(1 <= rollout.num_tokens <= 16 for rollout in group.rollouts)
        assert len({rollout.segments for rollout in group.rollouts}) == 3
        assert group.oldest_version == 0 and not any(r.error for r in group.rollouts)
        again = await fleet.rollout(task)
        assert again == group
        held = await fleet.rollout(replace(task, demand=Demand(Constraint("min_words", 999), 0.2)))
        parts = [rollout.reward_parts for rollout in held.rollouts]
        assert [each["compliance:min_words"] for each in parts] == [0.0] * 3

        published = births.post.publish_model(1, tiny_model, scale=0.9)
        long = [make_task(f"long {n}", tokens=400) for n in range(4)]  # more than there are slots
        running = asyncio.gather(*map(fleet.rollout, long))
        await sampling(births.workers[0])
        await fleet.publish(1, published)
        versions = {
            span.version
            for group in await running
            for rollout in group.rollouts
            for span in rollout.segments[0].versions
        }
        assert max(versions) == 1
        assert (await fleet.rollout(task)).oldest_version == 1

        with pytest.raises(DataError, match=r"must fit max_length 500, got .* \+ 490"):
            await fleet.rollout(make_task("too long", tokens=490))
        with pytest.raises(DataError, match="nonsense"):
            await fleet.rollout(replace(task, prompt=replace(task.prompt, reward="nonsense")))
        with pytest.raises(DataError, match="missing"):
            await fleet.publish(2, births.post.publish(2, {}))

    run_fleet(births, scenario)


def test_sampling_time_begins_with_the_first_request_that_has_a_place() -> None:
    attempt = _Sampling(["a/0", "a/1"])
    assert attempt.seconds(frozenset({"a/0", "a/1", "b/0"}), now=10.0) == 0.0
    assert attempt.seconds(frozenset({"a/1", "b/0"}), now=12.0) == 0.0
    assert attempt.seconds(frozenset({"a/1"}), now=15.5) == 3.5


def test_a_real_worker_tells_which_groups_wait_for_a_place(tiny_model: Path) -> None:
    """Sixteen long answers for eight slots: one group samples, the other has had no place yet."""
    births = RealBirths(WorkerConfig(tiny_model, ENGINE, _fleet(num_workers=1)))
    tasks = [make_task(name, tokens=200, size=8) for name in ("first", "second")]
    names = [task.attempt_id(0) for task in tasks]

    async def scenario(fleet: Fleet) -> None:
        await fleet.start()
        await fleet.publish(0, births.publish(0))
        running = [asyncio.create_task(fleet.rollout(task)) for task in tasks]
        seen: list[dict[str, float]] = []
        while not all(task.done() for task in running):
            pong = await births.workers[0].ping()
            seen.append(pong.sampling)
        assert any(each.get(names[1]) == 0.0 and each.get(names[0], 0) > 0 for each in seen)
        assert any(each.get(names[1], 0) > 0 for each in seen)
        await asyncio.gather(*running)
        assert (await births.workers[0].ping()).sampling == {}

    run_fleet(births, scenario)


def test_half_the_slots_are_whole_steps_of_the_engine() -> None:
    halves = [EngineSection(num_slots=slots).with_slots(0.5).num_slots for slots in (8, 24, 40, 64)]
    assert halves == [8, 8, 16, 32]
    assert EngineSection(num_slots=7).with_slots(1.0).num_slots == 7


def _fleet(**changes: object) -> FleetSection:
    return FLEET.model_copy(update=changes)


def test_kill_nine_in_mid_rollout_loses_no_group_and_no_bit(tiny_model: Path) -> None:
    births = RealBirths(WorkerConfig(tiny_model, ENGINE, _fleet(ping_deadline_seconds=30)))
    tasks = [make_task(f"n{n}", tokens=200) for n in range(10)]

    async def scenario(fleet: Fleet) -> None:
        await fleet.start()
        await fleet.publish(0, births.publish(0))
        whole = await asyncio.gather(*map(fleet.rollout, tasks))
        running = asyncio.gather(*map(fleet.rollout, tasks))
        await sampling(births.workers[0])
        os.kill(births.pids()[0], signal.SIGKILL)
        survived = await running
        assert answers(survived) == answers(whole)
        assert fleet.stats().retries >= 1
        while fleet.stats().states != ("healthy", "healthy"):
            await asyncio.sleep(0.1)
        assert len(births.workers) == 3

    run_fleet(births, scenario)
    assert {event["attempt"] for event in births.events if event["kind"] == "rollout"} == {0, 1}
    assert [event["role"] for event in births.events if event["kind"] == "restart"] == ["worker 0"]


@pytest.mark.slow
def test_a_stopped_worker_is_killed_and_replaced(tiny_model: Path) -> None:
    births = RealBirths(WorkerConfig(tiny_model, ENGINE, FLEET))

    async def scenario(fleet: Fleet) -> None:
        await fleet.start()
        await fleet.publish(0, births.publish(0))
        os.kill(births.pids()[0], signal.SIGSTOP)
        stopped = time.monotonic()
        groups = await asyncio.gather(*(fleet.rollout(make_task(f"n{n}")) for n in range(6)))
        assert len(groups) == 6 and time.monotonic() - stopped < 15
        while fleet.stats().states != ("healthy", "healthy"):
            await asyncio.sleep(0.1)
        assert not is_running(births.pids()[0])

    run_fleet(births, scenario)
    [restart] = [event for event in births.events if event["kind"] == "restart"]
    assert "a ping must be done within 6 s" in str(restart["cause"])


def test_a_model_that_cannot_be_opened_is_a_data_error_at_once(tmp_path: Path) -> None:
    births = RealBirths(WorkerConfig(tmp_path / "absent", ENGINE, FLEET))

    async def scenario(fleet: Fleet) -> None:
        with pytest.raises(DataError, match="absent"):
            await fleet.start()

    run_fleet(births, scenario)


@pytest.mark.slow
def test_a_worker_that_dies_at_birth_ends_the_fleet_in_bounded_time(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine asks for more slots than memory has, so that opening fails every time."""
    config = WorkerConfig(
        tiny_model,
        ENGINE.model_copy(update={"num_slots": 1 << 40}),
        _fleet(num_workers=1, max_restarts=1),
    )

    async def scenario(fleet: Fleet) -> None:
        with pytest.raises(WorkersLostError, match="0 are left after 1 restarts") as caught:
            await fleet.start()
        assert "the engine must open" in caught.value.why

    births = RealBirths(config)
    run_fleet(births, scenario)
    assert len(births.workers) == 2


class Owner:
    """A controller in a process of its own, with one worker."""

    async def begin(self, config: WorkerConfig) -> tuple[int, list[int]]:
        births = RealBirths(config)
        self.fleet = Fleet(config.fleet, births)
        await self.fleet.start()
        return os.getpid(), births.pids()


@pytest.mark.slow
def test_a_worker_does_not_outlive_its_controller(tiny_model: Path) -> None:
    config = WorkerConfig(tiny_model, ENGINE, _fleet(num_workers=1))
    owner = ray.remote(Owner).options(num_cpus=0).remote()
    pid, workers = ray.get(owner.begin.remote(config), timeout=120)
    assert workers and all(map(is_running, workers))

    os.kill(pid, signal.SIGKILL)

    deadline = time.monotonic() + 10
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(map(is_running, workers))
