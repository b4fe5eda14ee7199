"""The fleet as a state machine, on scripted workers and without Ray: routing, loss, hand-over."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest
from scripted_fleet import (
    SECTION,
    Script,
    ScriptedWorker,
    begin,
    failing,
    forever,
    having,
    loop_time,
    pause,
    play,
    task_of,
)

from ground.errors import DataError, InfraError, PacktrainError, WorkersLostError
from rollout.fleet import Fleet
from rollout.seat import OutOfMemoryError, WorkerDiedError


def test_tasks_go_to_the_worker_with_the_least_to_do() -> None:
    script = Script(others=having(sampling=pause))

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        groups = await asyncio.gather(*(fleet.rollout(task_of(f"g{n}")) for n in range(6)))
        assert [group.id for group in groups] == [f"g{n}" for n in range(6)]
        assert [len(worker.tasks) for worker in script.born] == [3, 3]
        stats = fleet.stats()
        assert (stats.groups, stats.tokens, stats.in_flight) == (6, 24, 0)

    play(script, scenario)


def test_nothing_is_sampled_before_the_first_weights_are_acknowledged() -> None:
    script = Script()

    async def scenario(fleet: Fleet) -> None:
        await fleet.start()
        assert fleet.stats().states == ("stale", "stale")
        early = asyncio.create_task(fleet.rollout(task_of("early")))
        await asyncio.sleep(0.1)
        assert not any(worker.tasks for worker in script.born)
        await fleet.publish(3, "weights 3")
        assert (await early).oldest_version == 3
        assert fleet.stats().states == ("healthy", "healthy")

    play(script, scenario)


def test_tasks_of_a_lost_worker_are_done_elsewhere_with_the_next_attempt() -> None:
    script = Script(worker0=having(sampling=failing(WorkerDiedError("ActorDiedError: killed"))))

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        script.born[0].pinging = failing(WorkerDiedError("ActorDiedError: killed"))
        group = await fleet.rollout(task_of("g"))
        assert group.rollouts[0].text == "1"
        assert script.born[1].tasks == [("g", 1)]
        await asyncio.sleep(0.2)
        assert script.born[0].killed and fleet.stats().states == ("healthy", "healthy")
        assert script.born[2].loads == [0]

    play(script, scenario)
    kinds = [(event["kind"], event["role"]) for event in script.events]
    assert kinds == [
        ("handover", "worker 0"),
        ("handover", "worker 1"),
        ("lost", "worker 0"),
        ("rollout", "worker 1"),
        ("handover", "worker 0"),
        ("restart", "worker 0"),
    ]
    assert script.events[0]["version"] == 0 and script.events[0]["load_seconds"] == 0.5
    assert script.events[3]["attempt"] == 1 and script.events[3]["tokens"] == 4
    assert "killed" in str(script.events[5]["cause"])


@pytest.mark.parametrize("silent", ["pinging", "sampling", "loading"])
def test_a_hanging_worker_is_killed_and_replaced(silent: str) -> None:
    script = Script()

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        setattr(script.born[0], silent, forever)
        if silent == "loading":
            await fleet.publish(1, "weights 1")
        groups = await asyncio.gather(*(fleet.rollout(task_of(f"g{n}")) for n in range(4)))
        await asyncio.sleep(0.3)
        assert len(groups) == 4 and script.born[0].killed and not script.born[1].killed
        assert fleet.stats().states == ("healthy", "healthy")
        assert len(script.born) == 3

    play(script, scenario)


def test_a_worker_that_never_comes_up_is_given_up_after_its_budget() -> None:
    script = Script(others=having(opening=failing(InfraError("RuntimeError: no such kernel"))))

    async def scenario(fleet: Fleet) -> None:
        with pytest.raises(
            WorkersLostError, match=r"at least 1 of 2 .* 0 are left after 2 restarts"
        ) as caught:
            await fleet.start()
        assert "worker 1: RuntimeError: no such kernel" in caught.value.why
        assert fleet.stats().states == ("retired", "retired")
        assert len(script.born) == 2 * 3
        with pytest.raises(WorkersLostError):
            await fleet.rollout(task_of("g"))

    play(script, scenario)


def test_the_fleet_goes_on_with_who_is_left() -> None:
    script = Script(others=having(opening=forever), worker1=having())

    async def scenario(fleet: Fleet) -> None:
        await fleet.start()
        assert fleet.stats().states == ("retired", "stale")
        await fleet.publish(0, "weights 0")
        assert (await fleet.rollout(task_of("g"))).rollouts[0].text == "1"

    play(script, scenario, SECTION.model_copy(update={"start_deadline_seconds": 0.05}))


def test_losing_the_whole_fleet_under_a_task_names_what_happened() -> None:
    died = failing(WorkerDiedError("ActorDiedError: out of memory"))
    script = Script(others=having(sampling=died, pinging=died))

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        with pytest.raises(WorkersLostError, match="0 are left") as caught:
            await asyncio.gather(*(fleet.rollout(task_of(f"g{n}")) for n in range(3)))
        assert "worker 0: ActorDiedError: out of memory" in caught.value.why

    play(script, scenario, SECTION.model_copy(update={"max_attempts": 99}))


def test_a_group_that_costs_too_many_workers_is_given_up() -> None:
    script = Script()

    async def sampling(worker: ScriptedWorker) -> None:
        if worker.tasks[-1][0] == "poison":
            raise WorkerDiedError("ActorDiedError: SIGSEGV")

    script.plans["others"] = having(sampling=sampling)

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        with pytest.raises(InfraError, match="group poison must be done in 3 attempts") as caught:
            await fleet.rollout(task_of("poison"))
        assert caught.value.why.count("SIGSEGV") == 3
        await fleet.rollout(task_of("fine"))
        assert fleet.stats().retries == 3

    play(script, scenario)


def test_a_worker_on_which_task_after_task_fails_is_replaced() -> None:
    """It answers pings and acknowledges weights all the while."""
    script = Script(worker0=having(sampling=failing(InfraError("no reward process"))))
    section = SECTION.model_copy(update={"num_workers": 1, "max_attempts": 9})

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        assert (await fleet.rollout(task_of("g"))).rollouts[0].text == "1"
        assert script.born[0].tasks == [("g", 0), ("g", 1), ("g", 2)]
        assert script.born[0].killed

    play(script, scenario, section)


@pytest.mark.parametrize("error", [DataError("prompt too long"), PacktrainError("a defect")])
def test_what_is_wrong_with_the_task_is_told_and_not_tried_again(error: PacktrainError) -> None:
    script = Script(others=having(sampling=failing(error)))

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        with pytest.raises(type(error), match=error.what):
            await fleet.rollout(task_of("g"))
        assert sum(len(worker.tasks) for worker in script.born) == 1
        assert fleet.stats().states == ("healthy", "healthy")

    play(script, scenario)


def test_a_slow_loader_does_not_hold_up_the_others() -> None:
    script = Script()
    release = asyncio.Event()

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)

        async def slowly(worker: ScriptedWorker) -> None:
            await release.wait()

        script.born[0].loading = slowly
        publishing = asyncio.create_task(fleet.publish(1, "weights 1"))
        await asyncio.sleep(0.05)
        assert (script.born[0].loads, script.born[1].loads) == ([0], [0, 1])
        groups = await asyncio.gather(*(fleet.rollout(task_of(f"g{n}")) for n in range(4)))
        assert sorted(group.oldest_version for group in groups) == [0, 0, 1, 1]
        assert not publishing.done()
        release.set()
        await publishing
        assert script.born[0].loads == [0, 1]

    play(script, scenario)


def test_a_restarted_worker_serves_only_under_the_newest_weights() -> None:
    """It dies under version 0 and comes up again while version 1 and 2 are published."""
    gate = asyncio.Event()

    async def wait(worker: ScriptedWorker) -> None:
        await gate.wait()

    script = Script(worker2=having(opening=wait))

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        script.born[0].pinging = failing(WorkerDiedError("ActorDiedError: killed"))
        await asyncio.sleep(0.1)
        await fleet.publish(1, "weights 1")
        await fleet.publish(2, "weights 2")
        assert fleet.stats().states == ("starting", "healthy")
        gate.set()
        await asyncio.sleep(0.1)
        assert fleet.stats().states == ("healthy", "healthy")
        assert script.born[2].loads == [2]

    play(script, scenario)


@pytest.mark.parametrize("ticks", range(8))
def test_3_a_worker_lost_in_the_moment_of_a_publication_loads_it_in_its_next_life(
    ticks: int,
) -> None:
    """However far its burial has come when the publication asks who serves."""
    script = Script()

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        fleet._roster.seats[0].lose("SIGKILL")
        for _ in range(ticks):
            await asyncio.sleep(0)
        await fleet.publish(1, "weights 1")
        await asyncio.sleep(0.3)
        assert fleet.stats().states == ("healthy", "healthy")
        assert [worker.version for worker in fleet.stats().workers] == [1, 1]
        assert [worker.lives for worker in fleet.stats().workers] == [2, 1]

    play(script, scenario)


def test_weights_published_during_a_refit_are_loaded_before_it_serves() -> None:
    gate = asyncio.Event()

    async def wait(worker: ScriptedWorker) -> None:
        await gate.wait()

    script = Script(worker2=having(loading=wait))

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        script.born[0].pinging = failing(WorkerDiedError("ActorDiedError: killed"))
        await asyncio.sleep(0.1)
        assert fleet.stats().states == ("stale", "healthy")
        publishing = asyncio.create_task(fleet.publish(1, "weights 1"))
        await asyncio.sleep(0.05)
        gate.set()
        await publishing
        assert script.born[2].loads == [0, 1]
        groups = await asyncio.gather(*(fleet.rollout(task_of(f"g{n}")) for n in range(4)))
        assert [group.oldest_version for group in groups] == [1] * 4

    play(script, scenario)


def test_a_worker_that_acknowledges_another_version_is_replaced() -> None:
    script = Script(worker0=having(ack_lag=1))

    async def scenario(fleet: Fleet) -> None:
        await fleet.start()
        await fleet.publish(4, "weights 4")
        await asyncio.sleep(0.2)
        assert script.born[0].killed and script.born[2].loads == [4]
        assert fleet.stats().states == ("healthy", "healthy")

    play(script, scenario)


@pytest.mark.parametrize("first", [True, False])
def test_weights_that_do_not_fit_are_the_publishers_error(first: bool) -> None:
    script = Script()

    async def scenario(fleet: Fleet) -> None:
        await fleet.start()
        if not first:
            await fleet.publish(0, "weights 0")
        for worker in script.born:
            worker.loading = failing(DataError("1 are missing: model.norm.weight"))
        with pytest.raises(DataError, match=r"model\.norm\.weight"):
            await fleet.publish(1, "weights 1")

    play(script, scenario)


def test_a_finished_group_renews_the_restart_budget() -> None:
    script = Script()

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        for _ in range(5):
            script.born[-1].pinging = failing(WorkerDiedError("ActorDiedError: killed"))
            await asyncio.sleep(0.1)
            await fleet.rollout(task_of("g"))
        assert fleet.stats().restarts == 5

    play(script, scenario, SECTION.model_copy(update={"num_workers": 1}))


def test_a_cancelled_rollout_frees_its_worker() -> None:
    script = Script(others=having(sampling=forever))

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        waiting = asyncio.create_task(fleet.rollout(task_of("g")))
        await asyncio.sleep(0.05)
        assert fleet.stats().in_flight == 1
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert fleet.stats().in_flight == 0
        assert fleet.stats().states == ("healthy", "healthy")

    play(script, scenario)


def test_a_closed_fleet_refuses_work() -> None:
    script = Script(others=having(sampling=forever))

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        waiting = asyncio.create_task(fleet.rollout(task_of("g")))
        await asyncio.sleep(0.02)
        await fleet.close()
        with pytest.raises(InfraError, match="closed"):
            await waiting
        with pytest.raises(InfraError, match="closed"):
            await fleet.rollout(task_of("h"))

    play(script, scenario)


def test_a_suspect_gets_no_new_work_and_comes_back_under_the_current_weights() -> None:
    script, gate = Script(), asyncio.Event()
    section = SECTION.model_copy(
        update={"suspect_after_seconds": 0.03, "ping_deadline_seconds": 5.0}
    )

    async def slowly(worker: ScriptedWorker) -> None:
        await gate.wait()

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        script.born[0].pinging = slowly
        await fleet._roster.until(lambda: fleet.stats().states == ("suspect", "healthy"))
        groups = await asyncio.gather(*(fleet.rollout(task_of(f"g{n}")) for n in range(3)))
        assert len(groups) == 3 and not script.born[0].tasks
        await fleet.publish(1, "weights 1")
        assert script.born[0].loads == [0]
        gate.set()
        await fleet._roster.until(lambda: fleet.stats().states == ("healthy", "healthy"))
        assert script.born[0].loads == [0, 1] and len(script.born) == 2
        await fleet.rollout(task_of("h"))
        assert script.born[0].tasks == [("h", 0)]

    play(script, scenario, section)
    assert not [event for event in script.events if event["kind"] == "lost"]


def test_failures_of_a_life_that_is_over_are_not_counted_against_the_next() -> None:
    """Four groups fail with their worker; its successor must not be blamed for them."""
    script = Script(worker0=having(sampling=forever))
    section = SECTION.model_copy(update={"num_workers": 1, "rollout_deadline_seconds": 5})

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        running = [asyncio.create_task(fleet.rollout(task_of(f"g{n}"))) for n in range(4)]
        await asyncio.sleep(0.05)
        script.born[0].pinging = failing(WorkerDiedError("ActorDiedError: killed"))
        groups = await asyncio.gather(*running)
        assert {group.rollouts[0].text for group in groups} == {"1"}
        assert len(script.born) == 2 and fleet.stats().retries == 4

    play(script, scenario, section)


def test_the_first_restart_is_made_at_once_and_the_next_ones_after_longer_pauses() -> None:
    """#7: a constructor that always fails; back-off 0, 0.1, 0.2 seconds."""
    opened: list[float] = []

    async def fail(worker: ScriptedWorker) -> None:
        opened.append(loop_time())
        raise InfraError("RuntimeError: no such kernel")

    script = Script(others=having(opening=fail))
    section = SECTION.model_copy(
        update={"num_workers": 1, "backoff_seconds": 0.1, "max_restarts": 3}
    )

    async def scenario(fleet: Fleet) -> None:
        with pytest.raises(WorkersLostError):
            await fleet.start()

    play(script, scenario, section)
    assert [after - before for before, after in pairwise(opened)] == pytest.approx([0, 0.1, 0.2])


def test_a_worker_that_memory_runs_out_on_comes_back_with_half_its_slots() -> None:
    """#8: once; another end for want of memory only costs a life."""
    script = Script(
        worker0=having(sampling=failing(OutOfMemoryError("the kernel ended it"))),
        worker1=having(opening=failing(OutOfMemoryError("the kernel ended it"))),
        worker2=having(opening=failing(WorkerDiedError("killed"))),
    )
    section = SECTION.model_copy(update={"num_workers": 1, "max_restarts": 3})

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        assert (await fleet.rollout(task_of("g"))).rollouts[0].text == "3"
        assert [worker.slots_share for worker in script.born] == [1.0, 0.5, 0.5, 0.5]

    play(script, scenario, section)


def test_the_fleet_stops_when_fewer_are_left_than_it_needs() -> None:
    """#7: the floor."""
    script = Script(others=having(opening=failing(InfraError("no such kernel"))), worker1=having())
    section = SECTION.model_copy(update={"min_workers": 2})

    async def scenario(fleet: Fleet) -> None:
        with pytest.raises(WorkersLostError, match=r"at least 2 of 2 .* 1 are left"):
            await fleet.start()

    play(script, scenario, section)


def test_an_answer_to_another_attempt_is_refused() -> None:
    """#4: a zombie's answer."""
    script = Script(worker0=having(other_answer=True))

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        assert (await fleet.rollout(task_of("g"))).rollouts[0].text == "1"
        assert [len(worker.tasks) for worker in script.born] == [1, 1]

    play(script, scenario)


def test_a_group_that_waits_for_its_verdicts_is_given_the_time_that_they_may_take() -> None:
    """Two answers, 1 + 1 turns, 0.2 s each: tried twice: 0.1 + 2 * 2 * 2 * 0.2 = 1.7 s in all."""
    section = SECTION.model_copy(
        update={
            "num_workers": 1, "rollout_deadline_seconds": 0.1, "reward_deadline_seconds": 0.2,
            "max_attempts": 1,
        }
    )  # fmt: skip

    async def half_a_second(worker: ScriptedWorker) -> None:
        await asyncio.sleep(0.5)

    script = Script(others=having(sampling=half_a_second))

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        script.born[0].scoring = ("scored#0",)
        await asyncio.sleep(0.1)
        assert (await fleet.rollout(task_of("scored"))).id == "scored"
        script.born[0].sampling = forever
        with pytest.raises(InfraError) as caught:
            await fleet.rollout(task_of("scored"))
        assert "group scored must be done within 1.7 s" in caught.value.why
        assert fleet.stats().verdicts == {"texts": 2, "reward_timeout": 1}
        await fleet._roster.until(lambda: fleet.stats().restarts == 1)
        assert script.born[0].killed
        with pytest.raises(InfraError) as caught:
            await fleet.rollout(task_of("unscored"))
        assert "group unscored must be done within 0.1 s" in caught.value.why

    play(script, scenario, section)


def test_the_deadline_of_a_group_begins_with_its_first_place_in_the_engine() -> None:
    """0.2 s to sample in: it waits for 0.5 s and samples for 0.1, then it never ends."""
    section = SECTION.model_copy(
        update={
            "num_workers": 1, "rollout_deadline_seconds": 0.2, "ping_every_seconds": 0.02,
            "max_attempts": 1,
        }
    )  # fmt: skip

    async def waits_then_samples(worker: ScriptedWorker) -> None:
        began = loop_time() + 0.5
        worker.seconds_sampled = lambda: {"g#0": max(loop_time() - began, 0.0)}
        await asyncio.sleep(0.6)

    script = Script(others=having(sampling=waits_then_samples))

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        script.born[0].seconds_sampled = lambda: {"g#0": 0.0}
        await asyncio.sleep(0.1)
        assert (await fleet.rollout(task_of("g"))).id == "g"
        script.born[0].sampling, began = forever, loop_time()
        script.born[0].seconds_sampled = lambda: {"g#0": loop_time() - began}
        await asyncio.sleep(0.1)
        with pytest.raises(InfraError, match="must be done in 1 attempts"):
            await asyncio.wait_for(fleet.rollout(task_of("g")), timeout=5)

    play(script, scenario, section)


def test_a_defect_of_the_spares_keeper_does_not_go_unseen() -> None:
    """#28: it is a background task like the others."""

    async def defect() -> None:
        raise KeyError("no such thing")

    script = Script(worker1=having(prepare=defect))
    section = SECTION.model_copy(update={"spare": True, "num_workers": 1})

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        with pytest.raises(PacktrainError, match="the spare worker: KeyError: 'no such thing'"):
            while True:
                await fleet.rollout(task_of("g"))
                await asyncio.sleep(0.1)

    play(script, scenario, section)


def test_a_spare_takes_the_place_of_a_lost_worker_and_is_replaced_itself() -> None:
    script = Script()
    section = SECTION.model_copy(update={"spare": True, "num_workers": 1})

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        while len(script.born) < 2:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        script.born[0].pinging = failing(WorkerDiedError("ActorDiedError: killed"))
        await fleet._roster.until(lambda: fleet.stats().restarts == 1)
        assert (await fleet.rollout(task_of("g"))).rollouts[0].text == "1"
        while len(script.born) < 3:
            await asyncio.sleep(0.01)
        assert script.born[1].loads == [0] and not script.born[2].loads

    play(script, scenario, section)


def test_a_spare_that_dies_is_made_again_and_given_up_after_three() -> None:
    die = having(pinging=failing(WorkerDiedError("ActorDiedError: killed")))
    script = Script(worker0=having(), others=die)
    section = SECTION.model_copy(update={"spare": True, "num_workers": 1})

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        while len(script.born) < 4 or not script.born[3].killed:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.1)
        assert len(script.born) == 4
        assert (await fleet.rollout(task_of("g"))).rollouts[0].text == "0"

    play(script, scenario, section)
