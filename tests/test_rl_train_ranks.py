"""The learner's ranks as workers of Ray Train: same numbers, and what is lost with one of them."""

from __future__ import annotations

import errno
import json
import shutil
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from launching import free_port, needs_deepspeed, rank_environment
from ray.train import ControllerError, WorkerGroupError
from ray.util import placement_group, remove_placement_group
from ray_jobs import HIDDEN, Job, project
from ray_nodes import Nodes, two_nodes
from rl_runs import RL, Run, nothing_left, wait_until

from distill.config import RolloutDistillSection
from ground.config import JudgeSettings
from ground.errors import InfraError, PacktrainError, SetupError
from ground.faults import Faults
from ground.launch import Launch, launch_of
from ground.metrics import read_metrics
from ground.roll import Roll
from ground.strikes import delay
from rl.cluster import Others, free_machines, machines, seats_beside
from rl.config import RlSection
from rl.ray_train import own_error
from rl.seats import Machine
from rl.speaker import error_of
from rl.train_ranks import (
    Order,
    told_home,
    wanted_and_free,
)
from rollout.judge_source import JudgeSource
from rollout.luggage import Luggage
from rollout.network import interface_of, transport
from rollout.places import PlacementError
from rollout.preflight import ClusterStartError

STEPS = 8
ONE: dict[str, object] = RL | {
    "steps": STEPS,
    "max_staleness": 0,
    "groups_per_step": 2,
    "micro_batch_tokens": 1,
    "loss": {"kind": "aipo", "reference_kl": 0.1},
    "fleet": {"spare": False, "cpus_per_worker": 0.25, "backoff_seconds": 0.1},
}
"""The reference is the stage's first model: a rank that read others' weights would show."""
NUMBERS = ("loss", "grad_norm", "reward", "entropy", "ess_applied", "staleness_mean")
SAME = 1e-6
BUSY = 600
"""Seconds until something is given up: a life begins with a dozen Python processes."""


def two(spread: str = "ddp", **more: object) -> dict[str, object]:
    """The same on two ranks, of which a node with one processor holds one."""
    return ONE | {"learner": {"num_ranks": 2, "cpus_per_rank": 0.6, "spread": spread, **more}}


def numbers(stage: Path) -> list[list[float]]:
    records = [r for r in read_metrics(stage / "metrics.jsonl") if "loss" in r]
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    return [[float(str(record[name])) for name in NUMBERS] for record in records]


def test_ranks_speak_over_the_network_that_ray_speaks_over() -> None:
    addresses = {"lo": ["127.0.0.1"], "eth0": ["172.17.0.2"], "ib0": ["fe80::1", "10.0.0.7"]}
    assert interface_of("10.0.0.7", addresses) == "ib0"
    assert interface_of("10.0.0.8", addresses) == ""


@pytest.mark.parametrize(
    ("set_before", "ip", "wanted"),
    [
        ({}, "127.0.0.1", {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}),
        (
            {"NCCL_SOCKET_IFNAME": "ib0"},
            "127.0.0.1",
            {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "ib0"},
        ),
        ({"GLOO_SOCKET_IFNAME": "eth9"}, "192.0.2.99", {"GLOO_SOCKET_IFNAME": "eth9"}),
        ({}, "192.0.2.99", {}),
    ],
)
def test_what_the_user_has_set_of_the_network_stays(
    set_before: dict[str, str], ip: str, wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in set_before.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("ray.util.get_node_ip_address", lambda: ip)
    given = {"GLOO_SOCKET_IFNAME": "", "NCCL_SOCKET_IFNAME": "", **transport()}
    assert {name: value for name, value in given.items() if value} == wanted


DEVICES = "CUDA_VISIBLE_DEVICES"


@pytest.mark.parametrize(
    ("num_ranks", "has_gpus", "alone", "devices"),
    [(1, True, True, "3"), (1, False, True, ""), (2, True, False, "3"), (2, False, False, "")],
)
def test_a_rank_sees_its_own_devices_alone_and_one_rank_is_a_process_like_any_other(
    num_ranks: int, has_gpus: bool, alone: bool, devices: str
) -> None:
    """Device 3 of the machine is number 0 to its rank; without GPUs none is to be seen."""
    luggage = Luggage(Path("model"), {}, {})
    launch = Launch("ddp", 0, num_ranks)
    order = Order(launch, "10.0.0.7", 40123, life=5, luggage=luggage, has_gpus=has_gpus)
    leader, last = order.of_leader("3"), order.environment(num_ranks - 1, "3")
    assert leader[DEVICES] == last[DEVICES] == devices
    assert launch_of(leader) == (Launch() if alone else launch)
    assert launch_of(last) == Launch("ddp", num_ranks - 1, num_ranks)
    assert (last["LOCAL_RANK"], last["MASTER_ADDR"], last["MASTER_PORT"]) == (
        *("0", "10.0.0.7", "40123"),
    )
    assert last["TORCHELASTIC_RESTART_COUNT"] == "5", "words of another life are not for this one"
    assert leader.items() <= last.items() or not alone


def test_ranks_workers_teachers_and_judges_all_need_a_place_at_once() -> None:
    """Two machines of two processors hold two ranks and two workers, and nobody else."""
    here = [Machine("a", {"CPU": 2.0}), Machine("b", {"CPU": 2.0})]
    section = RlSection.model_validate(
        {"steps": 1, "learner": {"num_ranks": 2}, "fleet": {"num_workers": 2}}
    )
    judge = JudgeSource(settings=JudgeSettings(replicas=1), model=Path("judge"), seed=0)
    assert seats_beside(Others(None, None), section, {"CPU": 1.0}, here) == ["a", "b"]
    for others in (Others(None, judge), Others(RolloutDistillSection(), None)):
        with pytest.raises(PlacementError) as refused:
            seats_beside(others, section, {"CPU": 1.0}, here)
        assert others.fewer in refused.value.fix
    larger = [*here, Machine("c", {"CPU": 1.0})]
    assert seats_beside(Others(None, judge), section, {"CPU": 1.0}, larger) == ["a", "b"]


def test_a_start_that_failed_says_what_others_have_left() -> None:
    free = [Machine("a", {"CPU": 0.5}), Machine("b", {"CPU": 16, "GPU": 7})]
    said = wanted_and_free({"CPU": 1, "GPU": 1}, free)
    assert said == (
        "a rank wants 1 CPU and 1 GPU, free are now, this machine first: "
        "0.5 CPU and 0 GPU; 16 CPU and 7 GPU"
    )


def test_what_somebody_has_taken_of_a_machine_is_not_free(ray_local: None) -> None:
    (whole,) = machines()
    taken = placement_group([{"CPU": 0.5}])
    try:
        assert taken.wait(60)
        most = whole.resources["CPU"] - 0.5
        wait_until(lambda: free_machines()[0].resources["CPU"] <= most, 60, "half a processor less")
        assert [machine.id for machine in free_machines()] == [whole.id]
    finally:
        remove_placement_group(taken)


def test_what_ray_train_says_is_a_lost_attempt_and_a_start_that_failed_costs_no_life() -> None:
    lost = own_error(WorkerGroupError("the actor died", {1: RuntimeError("killed")}))
    assert type(lost) is InfraError and lost.what.startswith("rank 1 must go on")
    assert lost.why == "the actor died"
    late = own_error(ControllerError(TimeoutError("no places within 30 s")))
    assert type(late) is ClusterStartError and late.why == "no places within 30 s"


def traced(error: Exception) -> str:
    """What Ray Train says of an exception in a worker of rank 1."""
    text = "".join(traceback.format_exception(error))
    return f"[Rank 1 Error Snippet]:\n{text}"


def test_what_would_be_so_again_is_no_lost_attempt_and_says_what_to_do() -> None:
    full = SetupError("the disk is full", where="rank 1", fix="free space")
    assert own_error(WorkerGroupError(traced(full), {1: full})) is full
    gone = InfraError("rank 0 must go on", why="it is silent", fix="continue with --resume")
    lost = own_error(WorkerGroupError(traced(gone), {1: gone}))
    assert type(lost) is InfraError and lost.what.startswith("rank 1 must go on")
    assert lost.why == "ground.errors.InfraError: rank 0 must go on"
    bare = ControllerError(RuntimeError(traced(ModuleNotFoundError("No module named 'rl'"))))
    missing = own_error(bare)
    assert type(missing) is SetupError and "as a Ray job" in missing.fix
    assert missing.why == "ModuleNotFoundError: No module named 'rl'"


@pytest.mark.parametrize(
    ("error", "wanted"),
    [
        (SetupError("the disk is full", fix="free space"), (4, "rank 1", "free space")),
        (InfraError("rank 0 must go on"), None),
        (OSError(errno.ENOSPC, "No space left on device"), None),
        (ValueError("a defect"), (1, "rank 1", "this is a defect")),
    ],
)
def test_a_worker_tells_rank_0_what_would_end_the_next_life_as_well(
    error: Exception, wanted: tuple[int, str, str] | None
) -> None:
    """Whatever is the machine's is left to Ray Train to say: another attempt may succeed."""
    port = free_port()
    first, second = (Roll(rank_environment("ddp", rank, port)) for rank in range(2))
    with pytest.raises(PacktrainError), told_home(second, life=3):
        raise error
    word = first.heard("lost/3/1")
    if wanted is None:
        assert word is None
        return
    assert word
    told = error_of(json.loads(word))
    assert (told.exit_code, told.where) == wanted[:2] and told.fix.startswith(wanted[2])


@pytest.fixture(scope="module")
def alone(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[list[float]]:
    """The numbers of one process."""
    folder = tmp_path_factory.mktemp("alone")
    with nothing_left(Run(folder, tiny_model, rl=ONE)) as run:
        output = run.finish()
        assert run.process.returncode == 0, output
    return numbers(run.stage)


@pytest.mark.slow
@pytest.mark.timeout(4 * BUSY)
@needs_deepspeed
def test_the_learner_s_share_changes_at_cuts_by_advice_and_by_hand_and_the_numbers_stay(
    tmp_path: Path, tiny_model: Path, alone: list[list[float]]
) -> None:
    """One rank → two of ZeRO, because its passes are slow → stopped → one process."""
    slow = Faults(tmp_path).at("learner*", "step.forward").do(delay(0.3), times=300)
    even = {"num_workers": 1, "max_workers": 2, "cpus_per_worker": 0.5, "spare": False}
    bounds = {"max_ranks": 2, "cpus_per_rank": 0.5, "spread": "zero2"}
    rl = ONE | {"fleet": even, "learner": bounds}
    with nothing_left(Run(tmp_path, tiny_model, rl=rl, faults=slow)) as run:
        wait_until(lambda: run.version >= 1, BUSY, "step 1", run.process)
        wait_until(lambda: bool(run.events("share")), BUSY, "another share", run.process)
        (event,) = run.events("share")
        before = run.version
        wait_until(lambda: run.version > before, BUSY, "a step of two ranks", run.process)
        assert event["cause"] == "from 1 to 2 learner ranks" and event["workers"] == 1
        assert not run.restarts(), "nothing was lost for it"
        run.process.terminate()
        output = run.finish()
        assert "continue it with --resume" in output, output
        assert run.version < STEPS
        recipe = run.directory / "recipe.yaml"
        recipe.write_text(json.dumps(json.loads(recipe.read_text()) | {"rl": ONE}))
        run.start("--resume")
        output = run.finish()
        assert run.process.returncode == 0, output
    for got, want in zip(numbers(run.stage), alone, strict=True):
        assert got == pytest.approx(want, rel=SAME, abs=SAME)
    assert (tmp_path / "run" / "log" / "rl.learner.rank1.log").is_file(), "brought home"


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    """Two nodes, of which the second sees nothing of the test's files and of our code."""
    with two_nodes(hidden=[tmp_path, *HIDDEN]) as nodes:
        yield nodes


def titles(nodes: Nodes) -> str:
    """What runs on both nodes; Ray's actors have their class as their title."""
    found = list[str]()
    for node in (nodes.head, nodes.other):
        assert node
        for process in psutil.Process(node.pid).children(recursive=True):
            with suppress(psutil.Error):
                found += process.cmdline()[:1]
    return " ".join(found)


def second_rank(nodes: Nodes) -> psutil.Process:
    """Rank 1's learner, on the second node."""
    assert nodes.other
    (found,) = [
        each
        for each in psutil.Process(nodes.other.pid).children(recursive=True)
        if "rl.learn" in each.cmdline()
    ]
    assert found.environ()["RANK"] == "1"
    return found


@pytest.mark.slow
@pytest.mark.timeout(4 * BUSY)
def test_a_rank_on_another_node_is_lost_then_its_node_and_the_numbers_stay_those_of_one_process(
    tmp_path: Path, tiny_model: Path, nodes: Nodes, alone: list[list[float]]
) -> None:
    shutil.copytree(tiny_model, tmp_path / "model")
    work = project(tmp_path / "work", tmp_path / "model", two(room_seconds=BUSY))
    job = Job(work, tmp_path / "runs" / "toy")
    process = job.submit(nodes)
    wait_until(lambda: job.version >= 2, BUSY, "step 2", process)
    running = titles(nodes)
    assert running.count("ray::RayTrainWorker") == 2
    for helper in ("Coordinator", "Cleaner", "DatasetManager", "Preemption"):
        assert helper not in running, "others share it, or it outlives us (rl/ray_train.py)"
    second_rank(nodes).kill()
    wait_until(lambda: len(job.events("restart")) == 1, BUSY, "the next life", process)
    wait_until(lambda: job.version >= 4, BUSY, "step 4", process)
    assert nodes.other
    nodes.end(nodes.other)
    nodes.join()
    nodes.wait_for_other()
    output, _ = process.communicate(timeout=BUSY)
    assert process.returncode == 0, output + nodes.logs()
    job.check_finished(STEPS)
    for got, want in zip(numbers(job.stage), alone, strict=True):
        assert got == pytest.approx(want, rel=SAME, abs=SAME)
