"""Hand-over to real workers in processes of their own: a damaged engine is never admitted."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from fleet_doubles import RealBirths, make_task, run_fleet

from ground.errors import WorkersLostError
from ground.faults import Faults
from ground.strikes import corrupt, kill9
from rollout.config import EngineSection, FleetSection
from rollout.fleet import Fleet
from rollout.task import WorkerConfig

pytestmark = [pytest.mark.usefixtures("ray_local"), pytest.mark.slow]

Arm = Callable[[Faults], Faults]
ENGINE = EngineSection(num_slots=8, max_length=256)
FLEET = FleetSection(
    num_workers=2,
    cpus_per_worker=0.5,
    ping_every_seconds=0.2,
    ping_deadline_seconds=60,
    max_restarts=1,
    backoff_seconds=0.1,
    spare=False,
)
PHASES = ("reserve", "copy", "probe", "fetch", "load", "bytes", "probes")


async def healthy_again(fleet: Fleet, lives: tuple[int, ...]) -> None:
    """Wait until every worker serves, in these lives."""
    await fleet._roster.until(
        lambda: (
            set(fleet.stats().states) == {"healthy"}
            and tuple(worker.lives for worker in fleet.stats().workers) == lives
        )
    )


def test_82_an_engine_with_other_weights_is_replaced_and_others_go_on(
    tiny_model: Path, tmp_path: Path, armed: Arm
) -> None:
    plan = armed(Faults(tmp_path).at("rollout/0", "weights.loaded", 2).do(corrupt("scale")))
    births = RealBirths(WorkerConfig(tiny_model, ENGINE, FLEET))

    async def scenario(fleet: Fleet) -> None:
        await fleet.start()
        await fleet.publish(0, births.publish(0))
        assert (await fleet.rollout(make_task("a"))).versions == {0}
        await fleet.publish(1, births.publish(1))
        await healthy_again(fleet, (2, 1))
        assert [worker.version for worker in fleet.stats().workers] == [1, 1]
        assert (await fleet.rollout(make_task("b"))).versions == {1}

    run_fleet(births, scenario)
    assert len(plan.fired()) == 1
    [lost] = births.events_of("lost")
    assert lost["role"] == "worker 0"
    assert "weights of version 1, 1 of 45 tensors are others: " in str(lost["cause"])
    handed = births.events_of("handover")
    assert sorted((event["role"], event["version"]) for event in handed) == [
        ("worker 0", 0),
        ("worker 0", 1),
        ("worker 1", 0),
        ("worker 1", 1),
    ]
    assert all(float(str(event[f"{phase}_seconds"])) >= 0 for event in handed for phase in PHASES)


def test_82_when_every_engine_has_other_weights_the_run_ends_and_names_the_tensor(
    tiny_model: Path, tmp_path: Path, armed: Arm
) -> None:
    broken = corrupt("scale", "layers.1.self_attn.o_proj")
    armed(Faults(tmp_path).at("rollout/*", "weights.loaded").do(broken, times=99))
    births = RealBirths(WorkerConfig(tiny_model, ENGINE, FLEET))

    async def scenario(fleet: Fleet) -> None:
        await fleet.start()
        with pytest.raises(WorkersLostError) as caught:
            await fleet.publish(0, births.publish(0))
        assert caught.value.exit_code == 6
        assert "model.layers.1.self_attn.o_proj.weight (off by " in caught.value.why

    run_fleet(births, scenario)
    assert len(births.workers) == 4


def test_03_a_worker_killed_as_it_loads_comes_back_with_proven_weights(
    tiny_model: Path, tmp_path: Path, armed: Arm
) -> None:
    armed(Faults(tmp_path).at("rollout/0", "weights.load", 2).do(kill9))
    births = RealBirths(WorkerConfig(tiny_model, ENGINE, FLEET))

    async def scenario(fleet: Fleet) -> None:
        await fleet.start()
        await fleet.publish(0, births.publish(0))
        await fleet.publish(1, births.publish(1))
        await healthy_again(fleet, (2, 1))
        for version in range(2, 6):  # the dead reader's hold on its buffer is gone
            await fleet.publish(version, births.publish(version))
        assert len(births.post.keeper._buffers) <= 4

    run_fleet(births, scenario)
