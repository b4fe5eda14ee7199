"""A fleet whose machines are taken away, cut off, full or behind a thin link: the same state
machine as in test_rollout_fleet.py. Real machines are in test_rollout_nodes.py."""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass, field

import pytest
from scripted_fleet import (
    SECTION,
    Call,
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

from ground.errors import WorkersLostError
from rollout.fleet import Fleet
from rollout.seat import WorkerDiedError
from rollout.task import BASE, Arriving


@dataclass
class ScriptedMachines:
    """Machines to which happens what a test says."""

    leaving: dict[str, float] = field(default_factory=dict)
    avoided: frozenset[str] = frozenset()
    sound: frozenset[str] = frozenset()
    has_room: bool = True
    doubted: list[str] = field(default_factory=list)

    async def look(self) -> None:
        return

    async def doubt(self, node: str) -> None:
        self.doubted.append(node)


def _for(seconds: float) -> Call:
    async def spend(worker: ScriptedWorker) -> None:
        await asyncio.sleep(seconds)

    return spend


ROOMY = SECTION.model_copy(update={"rollout_deadline_seconds": 100.0})


@pytest.mark.parametrize(
    ("notice", "handed_over", "attempts"), [(60.0, 0, [0, 0]), (12.0, 1, [1, 0])]
)
def test_a_worker_on_a_machine_that_is_taken_away_leaves_in_order_and_another_takes_over(
    notice: float, handed_over: int, attempts: list[int]
) -> None:
    """#41: a group of 20 s ends within a notice of 60 s; of 12 s half are left for it."""
    machines = ScriptedMachines()
    script = Script(
        worker0=having(node="spot", sampling=_for(20.0)),
        others=having(node="steady", sampling=pause),
    )

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        long = asyncio.create_task(fleet.rollout(task_of("long")))
        await asyncio.sleep(0.01)
        machines.leaving["spot"] = notice
        await fleet._roster.until(lambda: fleet.stats().states[0] == "leaving")
        noticed = loop_time()
        await fleet._roster.until(lambda: fleet.stats().states[1:] == ("healthy", "healthy"))
        assert len(fleet._roster.staying) == 2
        await asyncio.gather(*(fleet.rollout(task_of(f"g{n}")) for n in range(6)))
        assert script.born[0].tasks == [("long", 0)] and not script.born[0].killed
        await long
        await fleet._roster.until(lambda: script.born[0].killed)
        assert loop_time() - noticed < notice
        assert fleet.stats().states == ("retired", "healthy", "healthy")
        assert [seat.failures for seat in fleet._roster.seats] == [0, 0, 0]

    play(script, scenario, ROOMY, machines)
    [drained] = [event for event in script.events if event["kind"] == "drained"]
    assert (drained["role"], drained["handed_over"]) == ("worker 0", handed_over)
    assert not [event for event in script.events if event["kind"] in ("lost", "dismissed")]
    done = {str(e["group"]): e["attempt"] for e in script.events if e["kind"] == "rollout"}
    assert [done["long"], done["g0"]] == attempts and len(done) == 7


def test_a_worker_that_is_dismissed_and_then_drained_still_leaves_in_time() -> None:
    machines = ScriptedMachines()
    script = Script(worker1=having(node="spot", sampling=_for(50.0)), others=having(sampling=pause))

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        groups = [asyncio.create_task(fleet.rollout(task_of(f"g{n}"))) for n in range(2)]
        await asyncio.sleep(0.01)
        fleet.resize(1)
        machines.leaving["spot"] = 20.0
        assert len(await asyncio.gather(*groups)) == 2
        assert 10.0 < loop_time() < 13.0, "twenty seconds, of which ten are for the closing"
        assert len(script.born) == 2, "nobody takes over from who was to go"

    play(script, scenario, ROOMY, machines)


def test_a_worker_that_no_machine_has_room_for_waits_and_is_not_blamed() -> None:
    machines, placed = ScriptedMachines(), asyncio.Event()

    async def opening(worker: ScriptedWorker) -> None:
        await placed.wait()
        await asyncio.sleep(0.4)  # within its deadline, which begins when it is placed

    script = Script(worker2=having(opening=opening, is_placed=False))

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        machines.has_room = False
        script.born[1].pinging = failing(WorkerDiedError("ActorDiedError: its node died"))
        await fleet._roster.until(lambda: fleet.stats().states == ("healthy", "waiting"))
        await asyncio.sleep(60)
        assert fleet.stats().states == ("healthy", "waiting")
        await fleet.publish(1, "weights 1")
        await fleet.rollout(task_of("g"))
        machines.has_room = script.born[2].is_placed = True
        placed.set()
        await fleet._roster.until(lambda: fleet.stats().states == ("healthy", "healthy"))
        assert len(script.born) == 3 and script.born[2].loads == [1]
        assert [seat.failures for seat in fleet._roster.seats] == [0, 1]

    play(script, scenario, SECTION, machines)


def test_a_worker_whose_room_others_were_quicker_to_take_waits_on_without_blame() -> None:
    """Two crews watch the same machines: room is there for a moment, twice."""
    machines = ScriptedMachines()
    script = Script(worker2=having(opening=forever, is_placed=False))

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        machines.has_room = False
        script.born[1].pinging = failing(WorkerDiedError("ActorDiedError"))
        await fleet._roster.until(lambda: fleet.stats().states == ("healthy", "waiting"))
        for _ in range(2):
            machines.has_room = True
            await fleet._roster.until(lambda: fleet.stats().states == ("healthy", "starting"))
            machines.has_room = False
            await fleet._roster.until(lambda: fleet.stats().states == ("healthy", "waiting"))
        assert [seat.failures for seat in fleet._roster.seats] == [0, 1]

    play(script, scenario, SECTION, machines)


def test_a_group_for_which_no_worker_has_a_place_waits_without_a_deadline() -> None:
    """Ten groups of 0.2 s, one after the other, two at hand, and a deadline of 0.5 s for each."""
    turn = asyncio.Lock()

    async def in_turn(worker: ScriptedWorker) -> None:
        async with turn:
            await asyncio.sleep(0.2)

    script = Script(others=having(sampling=in_turn))

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        await asyncio.gather(*(fleet.rollout(task_of(f"g{n}")) for n in range(10)))
        assert len(script.born) == 1 and loop_time() == pytest.approx(2.0, abs=0.1)

    play(script, scenario, SECTION.model_copy(update={"num_workers": 1}), most_each=2)


def test_a_worker_that_waits_is_born_on_the_machine_that_was_cut_off_once_it_answers() -> None:
    """#31: a link that broke for less time than Ray takes to notice."""
    machines = ScriptedMachines(avoided=frozenset({"far"}))
    script = Script(worker2=having(opening=forever, is_placed=False))

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        machines.has_room = False
        script.born[1].pinging = failing(WorkerDiedError("ActorDiedError"))
        await fleet._roster.until(lambda: fleet.stats().states == ("healthy", "waiting"))
        await asyncio.sleep(10)
        assert len(script.born) == 3, "it is still cut off"
        machines.avoided = frozenset()
        await asyncio.sleep(10)
        assert len(script.born) == 3, "it is gone"
        machines.sound, machines.has_room = frozenset({"far"}), True
        await fleet._roster.until(lambda: fleet.stats().states == ("healthy", "healthy"))
        assert len(script.born) == 4 and script.born[2].killed
        assert [seat.failures for seat in fleet._roster.seats] == [0, 1]

    play(script, scenario, SECTION.model_copy(update={"start_deadline_seconds": 30.0}), machines)
    assert len([event for event in script.events if event["kind"] == "lost"]) == 1


def test_a_fleet_for_which_there_is_no_room_at_all_is_a_typed_end_in_bounded_time() -> None:
    """0.5 s for the start, and then as much as three lives have for theirs."""
    machines = ScriptedMachines(has_room=False)
    script = Script(others=having(opening=forever, is_placed=False))

    async def scenario(fleet: Fleet) -> None:
        await fleet.start()
        assert fleet.stats().states == ("waiting", "waiting")
        with pytest.raises(
            WorkersLostError, match=r"0 have one: for 1\.5 s no machine had"
        ) as caught:
            await fleet.publish(0, "weights 0")
        assert "ray start" in caught.value.fix and 2.0 <= loop_time() < 2.1

    play(script, scenario, SECTION, machines)


def test_a_machine_is_doubted_when_a_worker_there_is_lost_and_its_spare_is_left_alone() -> None:
    """#31: the spare on the machine that is cut off cannot help; one elsewhere can."""
    section = SECTION.model_copy(update={"spare": True})
    machines = ScriptedMachines()
    script = Script(
        worker1=having(node="far"), worker2=having(node="far"), others=having(node="near")
    )

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        await asyncio.sleep(1)
        assert len(script.born) == 3
        machines.avoided = frozenset({"far"})
        script.born[1].pinging = script.born[2].pinging = forever
        await fleet._roster.until(
            lambda: (
                [seat.lives for seat in fleet._roster.seats] == [1, 2]
                and fleet.stats().states == ("healthy", "healthy")
            )
        )
        assert machines.doubted == ["far"]
        assert script.born[1].killed and script.born[3].loads == [0]

    play(script, scenario, section, machines)


@pytest.mark.parametrize(("comes_until", "lives"), [(2.0, 1), (0.9, 2)])
@pytest.mark.parametrize("first", [True, False])
def test_a_load_has_another_deadline_for_every_part_that_came_and_none_without(
    first: bool, comes_until: float, lives: int
) -> None:
    """#33: 2 s of a thin link with a deadline of 0.5 s; the second kind stops coming after 0.9 s,
    which is seen at 1.5 s."""
    began: list[float] = []

    async def slowly(worker: ScriptedWorker) -> None:
        began.append(loop_time())
        await asyncio.sleep(2.0)

    def arriving() -> Arriving | None:
        spent = min(loop_time() - began[0], comes_until) if began else 0.0
        return Arriving(1, int(500 * spent), 1000, spent)

    script = Script()

    async def scenario(fleet: Fleet) -> None:
        await fleet.start()
        if not first:
            await fleet.publish(0, "weights 0")
        script.born[0].loading, script.born[0].arriving = slowly, arriving
        await fleet.publish(1, "weights 1")
        await fleet._roster.until(lambda: fleet.stats().states == ("healthy", "healthy"))
        assert [worker.lives for worker in fleet.stats().workers] == [lives, 1]
        assert loop_time() - began[0] == pytest.approx(2.0 if lives == 1 else 1.5, abs=0.03)

    play(script, scenario)


def test_a_base_that_comes_after_its_adapter_is_waited_for_as_well() -> None:
    """#33: 0.4 s of an adapter, then 1.6 s of its base, with a deadline of 0.5 s."""
    began: list[float] = []

    async def slowly(worker: ScriptedWorker) -> None:
        began.append(loop_time())
        await asyncio.sleep(2.0)

    def arriving() -> Arriving | None:
        spent = loop_time() - began[0] if began else 0.0
        adapter = Arriving(1, min(int(100 * spent), 40), 40, spent)
        return Arriving(BASE, int(1000 * spent), 2000, spent) if spent > 0.6 else adapter

    script = Script()

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        script.born[0].loading, script.born[0].arriving = slowly, arriving
        await fleet.publish(1, "weights 1")
        assert [worker.lives for worker in fleet.stats().workers] == [1, 1]
        assert loop_time() - began[0] == pytest.approx(2.0, abs=0.03)

    play(script, scenario)


@pytest.mark.parametrize("version", [0, BASE])
def test_what_came_before_a_load_began_is_no_sign_that_it_goes_on(version: int) -> None:
    """#33: it hangs before its first byte, and has its deadline of 0.5 s like any other."""
    began: list[float] = []

    async def hang(worker: ScriptedWorker) -> None:
        began.append(loop_time())
        await forever(worker)

    script = Script(worker0=having(arriving=lambda: Arriving(version, 10, 10, 0.5)))

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        await asyncio.sleep(1.0)
        script.born[0].loading = hang
        await fleet.publish(1, "weights 1")
        await fleet._roster.until(lambda: fleet.stats().states == ("healthy", "healthy"))
        assert [worker.lives for worker in fleet.stats().workers] == [2, 1]
        assert loop_time() - began[0] == pytest.approx(0.5, abs=0.03)

    play(script, scenario)


def test_what_comes_from_another_machine_has_a_speed() -> None:
    """40 of 200 MB in 20 s: 2 MB/s, and 80 s are left."""
    got = Arriving(3, 40_000_000, 200_000_000, 20.0)
    assert (got.megabytes_per_second, got.seconds_left) == (2.0, 80.0)
    nothing = Arriving(3, 0, 200_000_000, 0.0)
    assert (nothing.megabytes_per_second, nothing.seconds_left) == (0.0, math.inf)


def test_a_spare_that_finds_no_room_is_tried_again_for_as_long_as_there_is_none() -> None:
    """Each try has 0.5 s; three tries that failed otherwise would be the last."""
    script = Script(worker0=having(), others=having(preparing=forever, is_placed=False))
    section = SECTION.model_copy(update={"spare": True, "num_workers": 1})

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        await asyncio.sleep(5.2)
        assert len(script.born) == 1 + 11
        script.plans["others"] = having()
        while not fleet._roster._spare.is_ready:
            await asyncio.sleep(0.1)

    play(script, scenario, section)


def test_a_spare_leaves_a_machine_that_is_taken_away_and_another_is_made() -> None:
    machines = ScriptedMachines()
    script = Script(worker1=having(node="spot"))
    section = SECTION.model_copy(update={"spare": True, "num_workers": 1})

    async def scenario(fleet: Fleet) -> None:
        await begin(fleet)
        await asyncio.sleep(0.1)
        machines.avoided = frozenset({"spot"})
        await asyncio.sleep(0.1)
        assert script.born[1].killed and len(script.born) == 3
        script.born[0].pinging = failing(WorkerDiedError("killed"))
        await fleet._roster.until(lambda: fleet.stats().workers[0].lives == 2)
        await fleet._roster.until(lambda: fleet.stats().states == ("healthy",))
        assert script.born[2].loads == [0]

    play(script, scenario, section, machines)
