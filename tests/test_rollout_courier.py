"""Weights that are broadcast into a real vLLM by a courier: the same answers, and whoever is lost.

By gloo, between processes of this machine; NCCL needs GPUs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import psutil
import pytest
import ray
import torch
from fleet_doubles import RealBirths, is_running, make_task, run_fleet
from ray.actor import ActorHandle
from ray.exceptions import RayTaskError
from test_ground_exits import tells_ends
from test_rollout_vllm import NATS, STUDENT, nudged
from torch import Tensor
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.v1.engine.exceptions import EngineDeadError

from ground.errors import InfraError, SetupError
from ground.faults import Faults
from ground.model import load_model, tensors_of
from ground.records import Group, Segment
from ground.strikes import corrupt, kill9, stop
from rl.prober import Prober
from rollout.config import EngineSection, FleetSection
from rollout.courier import Courier, free_gpu
from rollout.fleet import Fleet
from rollout.luggage import Luggage
from rollout.task import WorkerConfig
from rollout.vllm_transfer import Announced, GlooReceiver, Meeting, both_ends
from rollout.weights import Published

MEMORY = EngineSection(kind="vllm", num_slots=4, max_length=256)
GLOO = MEMORY.model_copy(update={"transfer": "gloo"})
FLEET = FleetSection(
    num_workers=1,
    cpus_per_worker=0.5,
    start_deadline_seconds=300,
    max_restarts=2,
    spare=False,
)


class ProvenBirths(RealBirths):
    """Publishes the student, moved a little with each version, and what the learner makes of it."""

    def publish(self, version: int) -> Published:
        model = load_model(STUDENT)
        tensors = nudged(tensors_of(model), 1e-3 * version)
        model.load_state_dict(tensors, strict=False)
        prober = Prober(model, max_length=128, seed=0, floor=MEMORY.parity_nats)
        return self.post.publish(version, tensors, prober.measure)


def couriers() -> list[psutil.Process]:
    """Those of this session's cluster; Ray names its processes after what runs there."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            found += [process] if "ray::Courier" in " ".join(process.cmdline()) else []
    return found


def gone_within(seconds: float, processes: list[psutil.Process]) -> bool:
    deadline = time.monotonic() + seconds
    while any(is_running(each.pid) for each in processes):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def segments(group: Group) -> list[Segment]:
    return [rollout.segments[0] for rollout in group.rollouts]


class Collected:
    """A model that keeps what it is given."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.tensors = dict(weights)


def test_bytes_of_any_type_arrive_at_all_ranks_of_a_group() -> None:
    source = Announced()
    source.tensors = {
        "half": torch.tensor([[1.5, -2.0], [0.25, float("inf")]], dtype=torch.bfloat16),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "number": torch.tensor(7, dtype=torch.int64),
    }
    assert source.manifest() == {
        "names": ["half", "turned", "number"],
        "dtype_names": ["bfloat16", "float32", "int64"],
        "shapes": [[2, 2], [3, 2], []],
    }
    meeting = Meeting.at("127.0.0.1", "gloo", num_receivers=2)
    models = [Collected(), Collected()]

    def receive(rank: int) -> None:
        config: Any = SimpleNamespace(parallel_config=SimpleNamespace(rank=rank), model_config=None)
        receiver = GlooReceiver(
            WeightTransferConfig(backend="gloo"),
            config,
            torch.device("cpu"),
            cast(torch.nn.Module, models[rank]),
        )
        receiver.init_transfer_engine(receiver.parse_init_info(meeting.invitation()))
        for _ in range(2):
            receiver.update_weights(source.manifest())

    with ThreadPoolExecutor(2) as pool:
        receiving = [pool.submit(receive, rank) for rank in (0, 1)]
        sender = meeting.sender(source)
        for _ in range(2):
            sender.send_weights()
        for each in receiving:
            each.result(30)
    for model in models:
        assert list(model.tensors) == list(source.tensors)
        for name, tensor in source.tensors.items():
            assert model.tensors[name].dtype == tensor.dtype
            assert torch.equal(model.tensors[name], tensor)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.usefixtures("ray_local")
def test_nccl_from_a_machine_without_a_gpu_is_refused_with_the_fix() -> None:
    courier = ray.remote(Courier).options(num_cpus=0).remote(Luggage.pack(STUDENT), "nccl")
    with pytest.raises(RayTaskError) as raised:
        ray.get(courier.meet.remote(1, []), timeout=60)
    ray.kill(cast(ActorHandle, courier))
    error = raised.value.cause
    assert isinstance(error, SetupError)
    assert "needs a GPU besides those of the engine" in error.what
    assert "engine.transfer=memory" in error.fix


def test_a_courier_takes_no_gpu_of_its_own_engine() -> None:
    assert free_gpu(None, 2, taken=[]) == 0
    assert free_gpu(None, 2, taken=["0"]) == 1
    assert free_gpu("4,5", 2, taken=["4"]) == 1
    assert free_gpu("4,5", 2, taken=["4", "5"]) is None
    assert free_gpu("", 0, taken=[]) is None


@pytest.mark.parametrize("first", ["sender", "receiver"])
@pytest.mark.parametrize(
    ("sender", "receiver", "told"),
    [
        pytest.param(InfraError("lost"), RuntimeError("closed"), "lost", id="sender lost"),
        pytest.param(RuntimeError("closed"), EngineDeadError(), "EngineCore", id="vLLM dead"),
        pytest.param(None, RuntimeError("no such tensor"), "no such", id="receiver alone"),
        pytest.param(InfraError("lost"), None, "lost", id="sender alone"),
    ],
)
def test_of_two_ends_that_fail_the_one_with_the_cause_is_heard(
    sender: Exception | None, receiver: Exception | None, told: str, first: str
) -> None:
    """Whichever fails first; who is left alone hangs until it is broken off."""

    async def end(error: Exception | None, is_first: bool) -> None:
        if error is None:
            await asyncio.Event().wait()
        await asyncio.sleep(0 if is_first else 0.05)
        assert error
        raise error

    async def both() -> None:
        ends = end(sender, first == "sender"), end(receiver, first == "receiver")
        await both_ends(*ends, last_seconds=0.2)

    with pytest.raises((InfraError, RuntimeError, EngineDeadError), match=told):
        asyncio.run(both())


@pytest.mark.slow
@pytest.mark.usefixtures("ray_local")
def test_what_is_sampled_does_not_depend_on_the_way_of_the_weights() -> None:
    """Two versions each, every one proven by the learner's probes; then nothing is left."""
    sampled: list[list[Group]] = []
    for section in (MEMORY, GLOO):
        births, groups = ProvenBirths(WorkerConfig(STUDENT, section, FLEET)), list[Group]()
        hired: list[psutil.Process] = []

        async def scenario(
            fleet: Fleet,
            births: ProvenBirths = births,
            groups: list[Group] = groups,
            hired: list[psutil.Process] = hired,
        ) -> None:
            await fleet.start()
            for version in (0, 1):
                await fleet.publish(version, births.publish(version))
                groups.append(await fleet.rollout(make_task(f"v{version}", tokens=24)))
            hired += couriers()

        run_fleet(births, scenario)
        assert len(hired) == (section is GLOO) and gone_within(10, hired)
        assert not births.events_of("lost")
        sampled.append(groups)
    by_memory, by_gloo = sampled
    for one, other in zip(by_gloo, by_memory, strict=True):
        for ours, theirs in zip(segments(one), segments(other), strict=True):
            assert ours.token_ids == theirs.token_ids and ours.versions == theirs.versions
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=NATS)
    assert [segments(group)[0].versions[0].version for group in by_gloo] == [0, 1]


KILLED = "ended by SIGKILL; " if tells_ends() else "connection"
LOST = "courier of a worker's weights was lost"
FAULTS = {
    "sending": ("courier", "weights.send", kill9, LOST),
    "hanging": ("courier", "weights.send", stop, "must be done within"),
    "wrong bytes": ("courier", "weights.taken", corrupt("scale", "layers.1"), "must compute as"),
    "worker": ("rollout/0", "weights.load", kill9, KILLED),
}
"""What happens when version 1 is handed over: whose fault it is, where, which, and what is told."""


@pytest.mark.slow
@pytest.mark.parametrize("fault", [*FAULTS, "idle"])
def test_who_is_lost_costs_one_worker_and_leaves_nothing(
    tmp_path: Path, armed: Callable[[Faults], Faults], fault: str
) -> None:
    """And what arrives wrong is not sampled with. `idle`: the courier ends between versions."""
    told = LOST
    if fault in FAULTS:
        role, point, action, told = FAULTS[fault]
        armed(Faults(tmp_path).at(role, point, nth=2).do(action))
    patience = 60 if fault == "hanging" else 120
    settings = FLEET.model_copy(update={"publish_deadline_seconds": patience})
    births = ProvenBirths(WorkerConfig(STUDENT, GLOO, settings))
    hired: list[psutil.Process] = []

    async def scenario(fleet: Fleet) -> None:
        await fleet.start()
        await fleet.publish(0, births.publish(0))
        hired.extend(couriers())
        if fault == "idle":
            hired[0].kill()
        await fleet.publish(1, births.publish(1))
        group = await fleet.rollout(make_task("later", tokens=8))
        assert {span.version for each in segments(group) for span in each.versions} == {1}
        assert fleet.stats().restarts == 1
        hired.extend(each for each in couriers() if each not in hired)

    run_fleet(births, scenario)
    [event] = births.events_of("lost")
    assert told in str(event["cause"]), event
    assert len(hired) == 2 and gone_within(10, hired)
