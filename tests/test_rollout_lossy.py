"""A fleet whose messages get lost: Ray sends them again, and every group comes once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

SCENE = """
import asyncio, json, sys
from pathlib import Path

import ray
from fleet_doubles import Births, answers, make_task, run_fleet
from rollout.config import EngineSection, FleetSection
from rollout.ray_worker import LostMessageError, RayWorker
from rollout.task import WorkerConfig

ray.init(
    address="local",
    num_cpus=2,
    include_dashboard=False,
    log_to_driver=False,
    object_store_memory=80 << 20,
    _temp_dir=sys.argv[1],
    _system_config={"worker_niceness": 0},
)
section = FleetSection(num_workers=2, cpus_per_worker=0.5, spare=False, ping_deadline_seconds=120)
births = Births(WorkerConfig(Path("nowhere"), EngineSection(num_slots=8, max_length=256), section))
told = {"lost messages": 0}
sorted_ = RayWorker._sorted

async def counted(self, ref):
    try:
        return await sorted_(self, ref)
    except LostMessageError:
        told["lost messages"] += 1
        raise

RayWorker._sorted = counted

async def scenario(fleet):
    await fleet.start()
    await fleet.publish(0, births.publish(0))
    tasks = [make_task(f"n{n}", tokens=4) for n in range(30)]
    told["answers"] = repr(answers(await asyncio.gather(*map(fleet.rollout, tasks))))

run_fleet(births, scenario)
told["groups"] = len({event["group"] for event in births.events_of("rollout")})
told["events"] = len(births.events_of("rollout"))
told["lost"] = len(births.events_of("lost"))
print(json.dumps(told))
"""
LOSSY = {
    "CoreWorkerService.grpc_client.PushTask": {
        "num_failures": 200,
        "req_failure_prob": 25,
        "resp_failure_prob": 25,
        "in_flight_failure_prob": 0,
    }
}


def play(folder: Path, environment: dict[str, str]) -> dict[str, Any]:
    clean = {name: text for name, text in os.environ.items() if not name.startswith("RAY_")}
    here = Path(__file__).parent
    clean["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent)])
    done = subprocess.run(
        [sys.executable, "-c", SCENE, str(folder)],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=170,
    )
    assert done.returncode == 0, done.stderr
    (told,) = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return json.loads(told)


def test_half_of_the_calls_lost_on_their_way_there_or_back_change_nothing(ram_path: Path) -> None:
    """#32"""
    lossy = play(ram_path / "a", {"RAY_testing_rpc_failure": json.dumps(LOSSY)})
    sound = play(ram_path / "b", {})
    assert lossy["lost messages"] >= 10 and sound["lost messages"] == 0
    assert lossy["answers"] == sound["answers"]
    assert (lossy["groups"], lossy["events"], lossy["lost"]) == (30, 30, 0)
