"""What a fleet on two machines lives through: `python -m node_scenes SCENE FOLDER`, on the head's.

It tells what happens in lines of JSON and waits for files in the folder, by which the test says
what it has done to the machines (tests/test_rollout_nodes.py).
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray
import torch
from fleet_doubles import Births, Letters, PretendingEngine, PretendingWorker, make_task
from ray.actor import ActorProxy
from remote_keeper import RemoteKeeper

from ground.errors import InfraError
from ground.records import Group
from rollout.carriage import Carriage
from rollout.checksums import checksums
from rollout.config import EngineSection, FleetSection
from rollout.fleet import Fleet
from rollout.handover import Inbox, Outbox
from rollout.ray_machines import RayMachines
from rollout.seat import Seat
from rollout.task import Loaded, WorkerConfig
from rollout.weights import Published, WeightKeeper, start_keeper, this_node

FOLDER = Path(sys.argv[2]) if len(sys.argv) > 2 else Path()
FLEET = FleetSection(
    num_workers=2,
    cpus_per_worker=1,
    start_deadline_seconds=60,
    ping_every_seconds=0.2,
    max_restarts=10,
    spare=False,
)
LEASE_SECONDS = {"thin": 60.0, "drained": 60.0, "cut": 12.0}
TOKENS = 400
"""Of an answer: two seconds."""


def tell(what: str, **facts: object) -> None:
    print(json.dumps({"what": what, "time": time.time(), **facts}), flush=True)


async def hear(word: str) -> None:
    """Wait until the test has said it."""
    while not (FOLDER / word).exists():
        await asyncio.sleep(0.05)


class ProvenGate:
    """Takes weights as the real one does, and proves that they have arrived."""

    def __init__(self, engine: PretendingEngine) -> None:
        self._engine, self._inbox = engine, Inbox(this_node())

    @property
    def arriving(self) -> Any:
        return self._inbox.arriving

    def load(self, version: int, published: Published) -> Loaded:
        assert checksums(self._inbox.open(published)) == published.checksums
        self._engine.load(version, {})
        return Loaded(self._engine.version, {}, 0.0)


class FetchingWorker(PretendingWorker):
    """Without a model, but its weights really come to it."""

    def _open_engine(self, section: EngineSection, model: Path) -> Any:
        engine = PretendingEngine()
        return engine, Letters(), ProvenGate(engine)


class Machinery:
    """A fleet of two on two machines with one processor each, and what belongs to it."""

    def __init__(self, scene: str, megabytes: float, **deadlines: float) -> None:
        section = FLEET.model_copy(update=deadlines)
        config = WorkerConfig(
            Path("nowhere"), EngineSection(num_slots=8), section, lease_seconds=LEASE_SECONDS[scene]
        )
        self.births = Births(config, FetchingWorker)
        self.births.machines = self.machines = RayMachines({"CPU": 1.0})
        self.fleet = Fleet(section, self.births, self._note, self.machines)
        self._weights = {"a": torch.arange(int(megabytes * (1 << 18)), dtype=torch.float32)}
        self._keeper = RemoteKeeper(start_keeper())
        self._outbox = Outbox(self._keeper, this_node())
        self._asked = 0

    def _note(self, event: dict[str, object]) -> None:
        self.births.events.append(event)
        if event["kind"] != "rollout":
            tell("event", **{key: value for key, value in event.items() if key != "time"})

    async def publish(self, version: int) -> float:
        """Hand a version over; returns the seconds that this took."""
        began = time.monotonic()
        await asyncio.to_thread(self._send, version)
        await self.fleet.publish(version, self._keeper.current())
        return time.monotonic() - began

    def _send(self, version: int) -> None:
        self._outbox.send(self._outbox.pack(version, self._weights))

    async def sample(self, until: Callable[[], bool]) -> list[Group]:
        """Keep both workers busy until something is so; every group that was asked for."""
        groups: list[Group] = []

        async def keep_on() -> None:
            while not until():
                self._asked += 1
                groups.append(await self.fleet.rollout(make_task(f"n{self._asked}", TOKENS)))

        await asyncio.gather(*(keep_on() for _ in range(4)))
        assert len({group.id for group in groups}) == len(groups)
        return groups

    def events(self, kind: str) -> list[dict[str, object]]:
        return self.births.events_of(kind)

    async def until_states(self, *states: str) -> None:
        await self.fleet._roster.until(lambda: self.fleet.stats().states == states)

    @property
    def seats(self) -> list[Seat]:
        return self.fleet._roster.seats

    def num_lost(self, seat: Seat) -> int:
        return sum(event["role"] == seat.name for event in self.events("lost"))

    def num_done(self, seat: Seat) -> int:
        return sum(event["role"] == seat.name for event in self.events("rollout"))

    def check_nothing_lost(self, groups: list[Group]) -> None:
        """Each group that was asked for has come exactly once."""
        marked = [str(event["group"]) for event in self.events("rollout")]
        assert sorted(marked) == sorted(group.id for group in groups)
        assert len(groups) == self._asked


def address_of(node: str) -> str:
    """The machine's, which may have gone."""
    [address] = [n["NodeManagerAddress"] for n in ray.nodes() if n["NodeID"] == node]
    return str(address)


async def thin(parts: Machinery) -> None:
    """#33: weights of three deadlines come through, and nobody is taken for dead."""
    groups: list[Group] = []
    await parts.publish(0)
    tell("ready")
    await hear("thinned")
    publication = asyncio.create_task(parts.publish(1))
    groups += await parts.sample(publication.done)
    tell("published", seconds=await publication, groups=len(groups))
    parts.check_nothing_lost(groups)
    assert not parts.events("lost") and {w.lives for w in parts.fleet.stats().workers} == {1}


async def drained(parts: Machinery) -> None:
    """#41: the other machine's node is told to go, as by its cloud."""
    await parts.publish(0)
    tell("ready")
    groups = await parts.sample(lambda: bool(parts.events("drained")))
    parts.check_nothing_lost(groups)
    assert not parts.events("lost") and parts.fleet.stats().retries == 0
    [gone] = [seat for seat in parts.seats if seat.is_drained]
    await parts.publish(1)
    new = parts.seats[2]
    assert gone.is_retired and not new.is_up and not new.is_leaving
    tell("left", groups=len(groups))


async def cut(parts: Machinery) -> None:
    """#31, #35: the cable is pulled, put back in time, pulled again until Ray gives the node up."""
    await parts.publish(0)
    keeper, published = await asyncio.to_thread(published_far)
    [seat] = [s for s in parts.seats if s.worker and address_of(s.worker.node) != "10.77.0.1"]
    assert seat.worker
    far = seat.worker.node
    tell("ready", far=seat.name)
    groups = await parts.sample(lambda: parts.num_lost(seat) > 0)
    assert not parts.machines.has_room and far in parts.machines.avoided
    tell("did without", seconds=await parts.publish(1))
    parts.check_nothing_lost(groups)
    await parts.until_states("healthy", "healthy")
    assert seat.worker.node == far
    tell("healed")
    lost = parts.num_lost(seat)
    groups += await parts.sample(lambda: parts.num_lost(seat) > lost)
    while any(node["NodeID"] == far and node["Alive"] for node in ray.nodes()):
        await asyncio.sleep(0.2)
    tell("given up by Ray", refused=await refused(published))
    del keeper
    await hear("node is back")
    await parts.until_states("healthy", "healthy")
    done = parts.num_done(seat)
    groups += await parts.sample(lambda: parts.num_done(seat) > done)
    parts.check_nothing_lost(groups)
    assert seat.version == 1 and seat.worker.node not in ("", far)
    tell("back")


def published_far() -> tuple[ActorProxy[WeightKeeper], Published]:
    """Weights that lie on the other machine, and their keeper."""
    here = this_node()
    options = {"num_cpus": 0, "label_selector": {"ray.io/node-id": f"!in({here})"}}
    keeper = ray.remote(WeightKeeper).options(**options).remote()
    outbox = Outbox(RemoteKeeper(keeper), here)
    outbox.send(outbox.pack(1, {"a": torch.ones(1 << 18)}))
    published = RemoteKeeper(keeper).current()
    assert published.node != here and Carriage().fetch(published)
    return keeper, published


async def refused(published: Published) -> str:
    """What is said of weights that cannot be had any more."""
    try:
        await asyncio.to_thread(Carriage().fetch, published)
    except InfraError as error:
        return str(error)
    raise AssertionError("they have come")


async def play(scene: str) -> None:
    parts = {
        "thin": lambda: Machinery(scene, 3.0, publish_deadline_seconds=5.0),
        "drained": lambda: Machinery(scene, 0.5),
        "cut": lambda: Machinery(scene, 0.5, ping_deadline_seconds=8.0),
    }[scene]()
    try:
        await parts.fleet.start()
        async with asyncio.timeout(300):
            await {"thin": thin, "drained": drained, "cut": cut}[scene](parts)
    finally:
        await parts.fleet.close()
    tell("over")


if __name__ == "__main__":
    ray.init(address=os.environ["RAY_ADDRESS"], log_to_driver=False, namespace=sys.argv[1])
    asyncio.run(play(sys.argv[1]))
