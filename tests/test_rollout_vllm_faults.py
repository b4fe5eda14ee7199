"""vLLM's process killed, stopped, or left behind, and its faults that the parity gate must see."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Timer
from typing import cast

import psutil
import pytest
from conftest import make_tiny_llama
from fleet_doubles import RealBirths, is_running, make_task, run_fleet
from rl_runs import in_use
from test_rollout_vllm import NATS, STUDENT, nudged, request, until_waiting
from test_rollout_worker import sampling
from vllm.v1.engine.async_llm import AsyncLLM

from ground.errors import InfraError
from ground.model import load_model, tensors_of
from rl.prober import Prober
from rollout.config import EngineSection, FleetSection
from rollout.engine import BLANK, Completion, Scores
from rollout.engines import open_blank
from rollout.fleet import Fleet
from rollout.parity import drift_of, is_within
from rollout.task import WorkerConfig
from rollout.vllm_engine import VllmEngine
from rollout.vllm_process import VllmProcess
from rollout.vllm_weights import CheckpointForm, Laid

pytestmark = pytest.mark.slow

SECTION = EngineSection(kind="vllm", num_slots=4, max_length=256)
FLEET = FleetSection(
    num_workers=1,
    cpus_per_worker=0.5,
    start_deadline_seconds=300,
    rollout_deadline_seconds=15,
    ping_every_seconds=0.2,
    ping_deadline_seconds=10,
    max_restarts=2,
    spare=False,
)
HOST = """
import sys, time
from pathlib import Path
from rollout.config import EngineSection
from rollout.engines import open_engine
if __name__ == "__main__":
    section = EngineSection(kind="vllm", num_slots=4, max_length=256)
    engine, _ = open_engine(Path(sys.argv[1]), section)
    print("serving", flush=True)
    time.sleep(600)
"""


def cores_of(pid: int) -> list[psutil.Process]:
    """vLLM's processes among the children of a process."""
    found = []
    for each in psutil.Process(pid).children():
        with suppress(psutil.NoSuchProcess):
            found += [each] if "EngineCore" in each.name() else []
    return found


def litter() -> set[str]:
    """Files in shared memory, and sockets among temporary files.

    A semaphore of Python's ("sem.mp-") is none: its tracker puts it away when the process ends that
    started vLLM, and no sooner; and others have theirs beside us.
    """
    files = (path.name for path in Path("/dev/shm").iterdir() if path.is_file())
    sockets = (path.name for path in Path("/tmp").iterdir() if path.is_socket())
    return {name for name in (*files, *sockets) if not name.startswith("sem.mp-")}


def test_25_a_killed_core_fails_what_is_in_flight_and_whatever_comes_later() -> None:
    before = litter()
    engine = VllmEngine(STUDENT, SECTION)
    [core] = cores_of(os.getpid())
    core.suspend()  # so that nothing is done before the blow
    futures: list[Future[Completion]] = [
        engine.submit(request(f"r{n}", tokens=200)) for n in range(9)
    ]
    until_waiting(engine, len(futures) - SECTION.num_slots)
    killed = time.monotonic()
    core.kill()
    for future in futures:
        with pytest.raises(InfraError, match=rf"pid {core.pid}\) was ended by SIGKILL"):
            future.result(10)
    assert time.monotonic() - killed < 3
    for ask in (
        lambda: engine.submit(request("late")),
        lambda: engine.score([(1, 2)]),
        lambda: engine.load(1, tensors_of(load_model(STUDENT))),
        engine.waiting,
        engine.pause,
    ):
        with pytest.raises(InfraError, match="was ended by SIGKILL"):
            ask()
    engine.abort(["r1"])
    engine.close()
    engine.close()
    assert not is_running(core.pid) and litter() <= before


def test_how_it_ended_is_known_also_where_vllm_s_monitor_took_the_status() -> None:
    """One thread takes the status, the other is told that there is no such child."""
    process = multiprocessing.get_context("fork").Process(
        target=signal.raise_signal, args=[signal.SIGKILL]
    )
    process.start()
    assert process.pid
    os.waitpid(process.pid, 0)
    status = vars(process)["_popen"]
    monitor = Timer(0.2, setattr, (status, "returncode", -signal.SIGKILL))
    monitor.start()
    core = VllmProcess(cast(AsyncLLM, None), process)
    core.wait(10)
    assert "was ended by SIGKILL" in str(core.obituary)
    monitor.join()


def test_closing_leaves_nothing_and_fails_what_is_in_flight() -> None:
    before = litter()
    engine = VllmEngine(STUDENT, SECTION)
    [core] = cores_of(os.getpid())
    core.suspend()  # so that nothing is done before
    future = engine.submit(request("a", tokens=200))
    engine.close()
    with pytest.raises(InfraError, match="the engine was closed"):
        future.result(1)
    with pytest.raises(InfraError, match="the engine was closed"):
        engine.submit(request("b"))
    assert not is_running(core.pid) and litter() <= before


def test_a_core_that_dies_in_the_last_moment_of_its_start_is_the_machines_fault() -> None:
    before = litter()
    with pytest.raises(InfraError, match="was ended by SIGKILL"):
        VllmEngine(STUDENT, SECTION, worker="vllm_doubles.DiesAtLast")
    assert not cores_of(os.getpid()) and litter() <= before


def test_a_load_that_fails_in_the_middle_ends_the_engine() -> None:
    """Some of the weights are new; nothing may be sampled with them."""
    engine = VllmEngine(STUDENT, SECTION, worker="vllm_doubles.FailsInTheMiddle")
    tensors = tensors_of(load_model(STUDENT))
    try:
        engine.pause()  # so that nothing is done before
        future = engine.submit(request("a", tokens=200))
        cause = "load of version 1 must be done wholly, got .*half of them"
        with pytest.raises(InfraError, match=cause):
            engine.load(1, tensors)
        with pytest.raises(InfraError, match=cause):
            future.result(1)
        with pytest.raises(InfraError, match=cause):
            engine.submit(request("b"))
        assert not cores_of(os.getpid())
    finally:
        engine.close()


def test_a_load_that_takes_too_long_ends_the_engine() -> None:
    """Its order is broken off, vLLM goes on with it: nobody knows which weights it has."""
    engine = VllmEngine(STUDENT, SECTION, worker="vllm_doubles.TakesLong")
    tensors = tensors_of(load_model(STUDENT))
    laid = Laid(CheckpointForm(STUDENT).saved(tensors))
    try:
        engine.pause()  # so that nothing is done before
        future = engine.submit(request("a", tokens=200))
        with pytest.raises(InfraError, match=r"load must be done within 0\.5 s"):
            take = partial(engine._asked, "take_weights", laid.path, laid.size, laid.places)
            engine._loop.order("load", lambda: engine._load(1, take), 0.5)
        with pytest.raises(InfraError, match="must be done wholly, got CancelledError"):
            future.result(5)
    finally:
        engine.close()
        laid.close()
    assert not cores_of(os.getpid())


@pytest.mark.parametrize("dense", [False, True])
def test_an_engine_that_began_without_weights_computes_with_those_it_is_handed(
    tmp_path: Path, dense: bool
) -> None:
    """As a worker begins; transformers says what a mixture of experts and a tied head compute."""
    path = make_tiny_llama(tmp_path / "dense") if dense else STUDENT
    folder = tmp_path / "blank"
    shutil.copytree(path, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = tensors_of(load_model(path))
    ids = [[1, *range(30, 90, 2)], [1, 5, 6, 7]]
    scores: list[list[Scores]] = []
    for section in (SECTION, EngineSection(num_slots=8, max_length=256)):
        engine, _ = open_blank(folder, section)
        try:
            assert engine.version == BLANK
            engine.load(0, tensors)
            assert engine.version == 0
            scores.append(engine.score(ids))
        finally:
            engine.close()
    for by_vllm, by_hf in zip(*scores, strict=True):
        assert by_vllm.logprobs == pytest.approx(by_hf.logprobs, abs=NATS)


@pytest.mark.parametrize("moment", ["starting", "serving"])
def test_25_a_core_ends_with_whoever_started_it_and_leaves_no_file(
    tmp_path: Path, moment: str
) -> None:
    before = litter()
    (tmp_path / "host.py").write_text(HOST)
    line = [sys.executable, str(tmp_path / "host.py"), str(STUDENT)]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=environment) as host:
        assert host.stdout
        if moment == "serving":
            assert host.stdout.readline() == "serving\n"
        deadline = time.monotonic() + 300
        while len(born := spawned_by(host.pid)) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(1.0)
        files = in_use([psutil.Process(host.pid), *born])
        host.kill()
    assert len(born) == 2
    deadline = time.monotonic() + 10
    while any(is_running(each.pid) for each in born) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(is_running(each.pid) for each in born) and litter() <= before
    assert not [path for path in files if Path(path).exists()]


def spawned_by(pid: int) -> list[psutil.Process]:
    """Python's tracker and vLLM's process, and no tool that is called for a moment."""
    found = []
    for each in psutil.Process(pid).children():
        with suppress(psutil.NoSuchProcess):
            words = " ".join(each.cmdline())
            found += [each] if "multiprocessing" in words or "EngineCore" in words else []
    return found


@pytest.mark.usefixtures("ray_local")
@pytest.mark.parametrize(
    ("blow", "cause"),
    [
        pytest.param(signal.SIGKILL, "was ended by SIGKILL", id="#25 killed"),
        pytest.param(signal.SIGSTOP, "must be done within", id="#26 answers pings only"),
    ],
)
def test_a_worker_whose_core_is_lost_is_replaced_and_the_group_is_sampled_again(
    blow: signal.Signals, cause: str
) -> None:
    births = RealBirths(WorkerConfig(STUDENT, SECTION, FLEET))
    cores: list[psutil.Process] = []

    async def scenario(fleet: Fleet) -> None:
        await fleet.start()
        await fleet.publish(0, births.publish(0))
        cores.extend(cores_of(births.pids()[0]))
        cores[0].suspend()  # so that no group is done before the blow
        running = asyncio.gather(*(fleet.rollout(make_task(f"n{n}", tokens=20)) for n in range(4)))
        await sampling(births.workers[0])
        cores[0].send_signal(blow)
        groups = await running
        assert all(each.num_tokens for group in groups for each in group.rollouts)
        assert fleet.stats().restarts == 1
        cores.extend(cores_of(births.pids()[1]))

    run_fleet(births, scenario)
    [lost] = births.events_of("lost")
    assert cause in str(lost["cause"]), lost
    assert len(cores) == 2
    deadline = time.monotonic() + 10  # a core ends with its worker, a moment later
    while any(is_running(core.pid) for core in cores) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(is_running(core.pid) for core in cores)


@pytest.mark.parametrize(
    ("worker", "dense", "is_seen"),
    [
        ("vllm_doubles.PacksExpertsOnce", False, True),
        ("vllm_doubles.PacksHeadsOnce", False, True),
        ("vllm_doubles.PacksHeadsOnce", True, True),
        ("rollout.vllm_worker.WeightTaker", True, False),
    ],
)
def test_the_parity_gate_sees_what_vllm_would_keep_of_older_weights(
    tmp_path: Path, worker: str, dense: bool, is_seen: bool
) -> None:
    """With both remedies the student passes too: test_rollout_vllm.py, on its shared engine."""
    path = make_tiny_llama(tmp_path) if dense else STUDENT
    engine = VllmEngine(path, SECTION, worker=worker)
    try:
        model = load_model(path)
        weights = nudged(tensors_of(model), 1e-3)
        model.load_state_dict(weights, strict=False)
        probes = Prober(model, max_length=256, seed=0, floor=SECTION.parity_nats).measure()
        engine.load(1, weights)
        drift = drift_of(engine, probes)
        assert drift and is_within(drift, probes) is not is_seen, drift
        assert not is_seen or drift.typical > 50 * probes.typical
    finally:
        engine.close()
