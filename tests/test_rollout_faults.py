"""Workers under real Ray, broken on purpose at named points: what is noticed, retried, refused."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import re
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine
from pathlib import Path

import psutil
import pytest
import ray
from fleet_doubles import (
    Births,
    PretendingWorker,
    RealBirths,
    answers,
    is_running,
    make_task,
    one_at_a_time,
    run_fleet,
)
from ray.exceptions import RayActorError
from test_ground_exits import tells_ends

from ground.errors import InfraError, PacktrainError, WorkersLostError
from ground.faults import Faults
from ground.strikes import Action, delay, hang_gil, kill9, raise_, segv, stop
from rollout.config import EngineSection, FleetSection
from rollout.fleet import Fleet
from rollout.ray_worker import RayWorker
from rollout.seat import OutOfMemoryError, WorkerDiedError
from rollout.task import GroupResult, GroupTask, WorkerConfig

pytestmark = pytest.mark.usefixtures("ray_local")

Arm = Callable[[Faults], Faults]
NO_MODEL = Path("nowhere")
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
PATIENT = FLEET.model_copy(update={"ping_deadline_seconds": 30.0})
"""Where nobody hangs: on a busy machine others are late with a ping too."""
NOTICED_SECONDS = 3.0
# Ray calls all of them a lost connection; which signal it was the kernel tells since Linux 6.15.
TELLS_ENDS = tells_ends()
KILLED = "ended by SIGKILL; " if TELLS_ENDS else "connection"
SEGFAULT = "ended by SIGSEGV; " if TELLS_ENDS else "connection"


def one_fleet(births: Births, version: int = 0) -> Callable[[Fleet], Coroutine[None, None, None]]:
    """Bring a fleet up under version 0."""

    async def begin(fleet: Fleet) -> None:
        await fleet.start()
        await fleet.publish(version, births.publish(version))

    return begin


async def healthy_again(fleet: Fleet, lives: tuple[int, ...]) -> None:
    """Wait until every worker serves, in these lives."""
    await fleet._roster.until(
        lambda: (
            set(fleet.stats().states) == {"healthy"}
            and tuple(worker.lives for worker in fleet.stats().workers) == lives
        )
    )


@pytest.mark.parametrize(
    ("point", "nth", "action", "cause"),
    [
        pytest.param("gen.mid", 5, kill9, KILLED, id="#2 killed in mid-generation"),
        pytest.param("gen.begin", 2, segv, SEGFAULT, id="#6 SIGSEGV"),
        pytest.param("gen.mid", 5, hang_gil, "ping", id="#5 native deadlock"),
        pytest.param("gen.mid", 5, stop, "ping", id="#4 SIGSTOP"),
        pytest.param("gen.scored", 2, kill9, KILLED, id="#2 killed as it answers"),
        pytest.param("weights.fetch", 2, kill9, KILLED, id="#3 killed as it fetches"),
        pytest.param("weights.load", 2, kill9, KILLED, id="#3 killed as it loads"),
    ],
)
def test_a_worker_that_is_lost_costs_no_group_and_comes_back_with_the_current_weights(
    tmp_path: Path, armed: Arm, point: str, nth: int, action: Action, cause: str
) -> None:
    plan = armed(Faults(tmp_path).at("rollout/0", point, nth).do(action))
    births = Births(WorkerConfig(NO_MODEL, ENGINE, FLEET if cause == "ping" else PATIENT))
    is_handover = point.startswith("weights.")
    tasks = [make_task(f"n{n}", tokens=200 if is_handover else 40) for n in range(8)]
    """While weights are handed over they take a second, so that some are lost."""

    async def scenario(fleet: Fleet) -> None:
        await one_fleet(births)(fleet)
        running = asyncio.gather(*map(fleet.rollout, tasks))
        if is_handover:
            await fleet.publish(1, births.publish(1))
        groups = await running
        assert [group.id for group in groups] == [task.id for task in tasks]
        await healthy_again(fleet, (2, 1))
        version = 1 if is_handover else 0
        assert [worker.version for worker in fleet.stats().workers] == [version] * 2
        assert not is_running(births.pids()[0])

    run_fleet(births, scenario)
    [firing] = plan.fired()
    assert firing.pid == births.pids()[0]
    [lost] = births.events_of("lost")
    assert cause in str(lost["cause"]), lost
    deadline = FLEET.ping_deadline_seconds + FLEET.ping_every_seconds if cause == "ping" else 0.0
    assert float(str(lost["end"])) - firing.time < NOTICED_SECONDS + deadline
    retried = [event for event in births.events_of("rollout") if event["attempt"]]
    assert retried and {event["attempt"] for event in retried} == {1}


def test_an_idle_worker_that_is_killed_is_noticed_and_no_prompt_is_touched() -> None:
    """#1"""
    births = Births(WorkerConfig(NO_MODEL, ENGINE, PATIENT))
    killed = []

    async def scenario(fleet: Fleet) -> None:
        await one_fleet(births)(fleet)
        os.kill(births.pids()[0], signal.SIGKILL)
        killed.append(time.time())
        await healthy_again(fleet, (2, 1))

    run_fleet(births, scenario)
    [lost] = births.events_of("lost")
    assert float(str(lost["end"])) - killed[0] < NOTICED_SECONDS
    assert not births.events_of("rollout")


def test_a_stopped_worker_is_suspected_at_once_and_a_short_stop_costs_nothing() -> None:
    """#4: SIGSTOP … SIGCONT within the deadline."""
    births = Births(WorkerConfig(NO_MODEL, ENGINE, PATIENT))

    async def scenario(fleet: Fleet) -> None:
        await one_fleet(births)(fleet)
        os.kill(births.pids()[0], signal.SIGSTOP)
        stopped = time.monotonic()
        await fleet._roster.until(lambda: fleet.stats().states[0] == "suspect")
        assert time.monotonic() - stopped < NOTICED_SECONDS
        await asyncio.gather(*(fleet.rollout(make_task(f"n{n}")) for n in range(4)))
        await fleet.publish(1, births.publish(1))
        assert [worker.version for worker in fleet.stats().workers] == [0, 1]
        os.kill(births.pids()[0], signal.SIGCONT)
        await healthy_again(fleet, (1, 1))
        assert [worker.version for worker in fleet.stats().workers] == [1, 1]

    run_fleet(births, scenario)
    assert {event["role"] for event in births.events_of("rollout")} == {"worker 1"}
    assert not births.events_of("lost")


def test_a_zombie_that_wakes_up_after_it_was_given_up_is_not_heard(
    tmp_path: Path, armed: Arm, monkeypatch: pytest.MonkeyPatch
) -> None:
    """#4: as on a machine that we cannot send signals to, so that it lives on."""
    plan = armed(Faults(tmp_path).at("rollout/0", "gen.mid", 5).do(stop))
    monkeypatch.setattr(RayWorker, "kill", lambda self: None)
    births = Births(WorkerConfig(NO_MODEL, ENGINE, FLEET))
    task = make_task("n", tokens=40)

    async def scenario(fleet: Fleet) -> None:
        await one_fleet(births)(fleet)
        group = await fleet.rollout(task)
        [firing] = plan.fired()
        os.kill(firing.pid, signal.SIGCONT)
        again = await asyncio.gather(*(fleet.rollout(make_task(f"m{n}")) for n in range(6)))
        assert len({group.id, *(other.id for other in again)}) == 7
        await births.workers[0].close()

    run_fleet(births, scenario)
    done = [event for event in births.events_of("rollout") if event["group"] == task.id]
    assert [(event["role"], event["attempt"]) for event in done] == [("worker 1", 1)]


@pytest.mark.parametrize("error", ["MemoryError", "KeyboardInterrupt"])
def test_what_the_machine_lacks_is_tried_again_elsewhere_and_the_worker_stays(
    tmp_path: Path, armed: Arm, error: str
) -> None:
    """#9"""
    armed(Faults(tmp_path).at("rollout/0", "gen.begin").do(raise_(error)))
    births = Births(WorkerConfig(NO_MODEL, ENGINE, PATIENT))

    async def scenario(fleet: Fleet) -> None:
        await one_fleet(births)(fleet)
        groups = await asyncio.gather(*(fleet.rollout(make_task(f"n{n}")) for n in range(4)))
        assert len(groups) == 4 and fleet.stats().retries == 1
        assert [worker.lives for worker in fleet.stats().workers] == [1, 1]

    run_fleet(births, scenario)


class Cramped(PretendingWorker):
    """May take 256 MB of address space more than it had when it opened; a prompt that names a
    number wants as many bytes."""

    async def open(self, index: int, slots_share: float = 1.0) -> None:
        await super().open(index, slots_share)
        limit = psutil.Process().memory_info().vms + (256 << 20)
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    async def _rollout(self, task: GroupTask, attempt: int) -> GroupResult:
        bytearray(int(str(task.prompt.messages[0].content).removeprefix("say ")))
        return await super()._rollout(task, attempt)


def test_a_group_that_does_not_fit_into_a_workers_memory_is_told_and_the_worker_stays() -> None:
    """#9: RLIMIT_AS in the worker's process; what fits is sampled meanwhile and afterwards."""
    section = PATIENT.model_copy(update={"max_attempts": 2})
    births = Births(WorkerConfig(NO_MODEL, ENGINE, section), Cramped)

    async def scenario(fleet: Fleet) -> None:
        await one_fleet(births)(fleet)
        small = asyncio.gather(*(fleet.rollout(make_task(f"{1000 + n}")) for n in range(4)))
        with pytest.raises(InfraError, match="must be done in 2 attempts") as caught:
            await fleet.rollout(make_task(f"{1 << 30}"))
        for name in ("worker 0", "worker 1"):
            assert re.search(rf"{name}: group \S+ must fit into memory, got Mem", caught.value.why)
        assert len(await small) == 4
        assert len((await fleet.rollout(make_task("5"))).rollouts) == 3
        assert [worker.lives for worker in fleet.stats().workers] == [1, 1]

    run_fleet(births, scenario)
    assert not births.events_of("lost")


@pytest.mark.parametrize("error", ["Unpicklable", "SystemExit", "ZeroDivisionError"])
def test_a_defect_is_told_whole_across_processes_and_not_tried_again(
    tmp_path: Path, armed: Arm, error: str
) -> None:
    """#18: an error that cannot be pickled, or that would end the process."""
    armed(Faults(tmp_path).at("rollout/*", "gen.begin").do(raise_(error)))
    births = Births(WorkerConfig(NO_MODEL, ENGINE, PATIENT))

    async def scenario(fleet: Fleet) -> None:
        await one_fleet(births)(fleet)
        with pytest.raises(PacktrainError, match=f"failed: {error}: {error} by an armed") as caught:
            await fleet.rollout(make_task("n"))
        assert not isinstance(caught.value, InfraError)
        assert "worker.py" in caught.value.why
        assert len((await fleet.rollout(make_task("m"))).rollouts) == 3
        assert fleet.stats().retries == 0

    run_fleet(births, scenario)


@pytest.mark.slow
def test_memory_that_runs_out_in_the_decode_thread_replaces_the_worker(
    tiny_model: Path, tmp_path: Path, armed: Arm
) -> None:
    """#9, #26: it answers pings all the while, and every group fails."""
    armed(Faults(tmp_path).at("rollout/0", "gen.mid", 3).do(raise_("MemoryError")))
    births = RealBirths(WorkerConfig(tiny_model, ENGINE, PATIENT))

    async def scenario(fleet: Fleet) -> None:
        await one_fleet(births)(fleet)
        tasks = [make_task(f"n{n}", tokens=30) for n in range(12)]
        assert len(await asyncio.gather(*map(fleet.rollout, tasks))) == 12
        await healthy_again(fleet, (2, 1))

    run_fleet(births, scenario)
    [lost] = births.events_of("lost")
    assert "tasks in a row failed" in str(lost["cause"]) and "MemoryError" in str(lost["cause"])


@pytest.mark.slow
def test_an_engine_that_hangs_behind_good_pings_is_replaced_by_its_deadline(
    tiny_model: Path, tmp_path: Path, armed: Arm
) -> None:
    """#26: the decode thread stands still without the interpreter's lock."""
    armed(Faults(tmp_path).at("rollout/0", "gen.mid", 3).do(delay(600)))
    section = PATIENT.model_copy(update={"rollout_deadline_seconds": 15.0})
    births = RealBirths(WorkerConfig(tiny_model, ENGINE, section))

    async def scenario(fleet: Fleet) -> None:
        await one_fleet(births)(fleet)
        tasks = [make_task(f"n{n}", tokens=30) for n in range(6)]
        assert len(await asyncio.gather(*map(fleet.rollout, tasks))) == 6
        await healthy_again(fleet, (2, 1))

    run_fleet(births, scenario)
    [lost] = births.events_of("lost")
    assert re.search(r"must be done within (1[5-9]|2\d)[.0-9]* s", str(lost["cause"]))


def test_a_reward_process_that_is_killed_costs_nobody_a_verdict(tmp_path: Path, armed: Arm) -> None:
    """#16"""
    births = Births(WorkerConfig(NO_MODEL, ENGINE, PATIENT))
    tasks = [make_task(f"n{n}") for n in range(4)]
    answered = []

    async def scenario(fleet: Fleet) -> None:
        await one_fleet(births)(fleet)
        answered.append(answers(await asyncio.gather(*map(fleet.rollout, tasks))))

    run_fleet(births, scenario)
    plan = armed(Faults(tmp_path).at("reward", "score", 2).do(kill9, times=2))
    births = Births(WorkerConfig(NO_MODEL, ENGINE, PATIENT))
    run_fleet(births, scenario)
    assert len(plan.fired()) == 2
    assert answered[0] == answered[1]


@pytest.mark.timeout(120)
def test_the_whole_fleet_dead_is_a_typed_end_in_bounded_time(tmp_path: Path, armed: Arm) -> None:
    """#7, #27: every life ends as its engine opens."""
    births = Births(WorkerConfig(NO_MODEL, ENGINE, FLEET))

    async def scenario(fleet: Fleet) -> None:
        await one_fleet(births)(fleet)
        armed(Faults(tmp_path).at("rollout/*", "open").do(kill9, times=99))
        running = asyncio.gather(
            *(fleet.rollout(make_task(f"n{n}", tokens=200)) for n in range(4)),
            return_exceptions=True,
        )
        for pid in births.pids():
            os.kill(pid, signal.SIGKILL)
        began = time.monotonic()
        outcomes = await running
        assert time.monotonic() - began < 60
        assert all(isinstance(outcome, WorkersLostError) for outcome in outcomes)
        assert "0 are left after 2 restarts in a row" in str(outcomes[0])

    run_fleet(births, scenario)
    assert len(births.workers) == 6


def test_messages_of_another_life_of_the_run_are_refused() -> None:
    births = Births(WorkerConfig(NO_MODEL, ENGINE, FLEET, incarnation=2))

    async def scenario(fleet: Fleet) -> None:
        await one_fleet(births)(fleet)
        for call in (
            births.workers[0]._actor.ping.remote(1),
            births.workers[0]._actor.rollout.remote(pickle.dumps((1, make_task("n"), 0))),
            births.workers[0]._actor.load.remote(1, 5, births.publish(5)),
        ):
            with pytest.raises(InfraError, match="of life 2 of the run are taken, got one of"):
                await births.workers[0]._sorted(call)

    run_fleet(births, scenario)


def test_a_worker_ends_itself_when_nobody_pings_it() -> None:
    """A lease, for where Ray does not notice that the controller is gone."""
    worker = RayWorker(WorkerConfig(NO_MODEL, ENGINE, FLEET, lease_seconds=6.0), PretendingWorker)

    async def scenario() -> None:
        await worker.open(0)
        for _ in range(28):
            await worker.ping()
            await asyncio.sleep(0.25)
        assert worker.pid and is_running(worker.pid)
        async with asyncio.timeout(14):
            while is_running(worker.pid):
                await asyncio.sleep(0.05)

    asyncio.run(scenario())
    with pytest.raises(RayActorError):
        ray.get(worker._actor.ping.remote(0), timeout=10)


HOG = """
import asyncio, json, sys
from pathlib import Path
import ray
from fleet_doubles import Births, PretendingWorker, make_task, run_fleet
from ground.errors import WorkersLostError
from rollout.config import EngineSection, FleetSection
from rollout.task import GroupResult, GroupTask, WorkerConfig

LEAST, FILE = int(sys.argv[1]), Path(sys.argv[2])

class Hog(PretendingWorker):
    def _open_engine(self, section, model):
        self.slots = section.num_slots
        with FILE.open("a") as file:
            print(self.slots, file=file)
        return super()._open_engine(section, model)

    async def load(self, incarnation, version, published):
        kept = []
        while self.slots >= LEAST:
            kept.append(b"x" * (50 << 20))
            await asyncio.sleep(0.02)
        return await super().load(incarnation, version, published)

ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False,
         object_store_memory=80 << 20, _system_config={"worker_niceness": 0})
section = FleetSection(num_workers=1, max_restarts=1, spare=False, backoff_seconds=0.1)
config = WorkerConfig(Path("nowhere"), EngineSection(num_slots=32), section)
births, told = Births(config, Hog), {}

async def scenario(fleet):
    await fleet.start()
    try:
        await fleet.publish(0, births.publish(0))
        told["rollouts"] = len((await fleet.rollout(make_task("n"))).rollouts)
    except WorkersLostError as error:
        told.update(why=error.why, fix=error.fix)

run_fleet(births, scenario)
told["causes"] = [str(event["cause"]) for event in births.events_of("lost")]
print(json.dumps(told | {"slots": FILE.read_text().split()}))
"""


def run_hog(least: int, folder: Path) -> dict[str, object]:
    """A fleet of one worker that fills the memory while it has so many slots, or more; Ray's memory
    monitor ends it at a threshold above what is used now, with room for whoever runs beside us."""
    memory = psutil.virtual_memory()
    filled = min(memory.available // 2, 6 << 30)
    threshold = 1 - (memory.available - filled) / memory.total
    if threshold > 0.9 or filled < 2 << 30:
        pytest.skip("less than 4 GB of memory are free to be filled")
    environment = {
        "RAY_memory_usage_threshold": f"{threshold:.3f}",
        "RAY_memory_monitor_refresh_ms": "100",
        "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[1])]),
    }
    script = folder / "hog.py"
    script.write_text(HOG)
    with one_at_a_time("hog"):
        done = subprocess.run(
            [sys.executable, str(script), str(least), str(folder / "slots")],
            env=os.environ | environment,
            stdout=subprocess.PIPE,
            text=True,
            timeout=180,
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.slow
def test_a_worker_that_memory_runs_out_on_comes_back_with_half_its_slots(tmp_path: Path) -> None:
    """#8: 32 slots are too many, 16 are not."""
    told = run_hog(32, tmp_path)
    assert told["slots"] == ["32", "16"] and told["rollouts"] == 3
    assert isinstance(told["causes"], list)
    [cause] = told["causes"]
    assert "Ray ended it: " in cause and "low on memory" in cause


@pytest.mark.slow
def test_memory_that_runs_out_with_half_the_slots_too_ends_the_run_with_advice(
    tmp_path: Path,
) -> None:
    """#8: the slots are halved once."""
    told = run_hog(0, tmp_path)
    assert told["slots"] == ["32", "16"]
    why = str(told["why"])
    assert "Ray ended it: " in why and "low on memory" in why
    assert str(told["fix"]).startswith("lower rl.engine.num_slots")


def test_the_kernels_own_count_tells_a_kill_for_want_of_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """#8: all that Ray says of such an end is that the connection was lost."""
    counts = iter([4, 4, 5])
    monkeypatch.setattr("rollout.ray_worker.memory_kills", lambda: next(counts))
    worker = RayWorker(WorkerConfig(NO_MODEL, ENGINE, FLEET), PretendingWorker)

    async def scenario() -> None:
        await worker.open(0)
        assert worker.pid
        os.kill(worker.pid, signal.SIGKILL)
        for kind in (WorkerDiedError, OutOfMemoryError):
            with pytest.raises(WorkerDiedError) as caught:
                await worker.ping()
            assert type(caught.value) is kind

    asyncio.run(scenario())
