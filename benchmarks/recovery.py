"""How soon a rollout worker that was killed is missed, and how soon it serves again.

    python -m benchmarks.recovery [--quick]

Everything is real: a fleet of two workers as Ray actors with the student of the tiny herd in the hf
engine, busy all the time with groups of eight. One of them gets SIGKILL at a moment that has
nothing to do with pings. It is missed when the fleet declares its life over, and back when it has
acknowledged the current weights and is given groups again. Each group must come back exactly once.

Two ways back: with the spare process that a fleet keeps by default, and without. A kill comes only
when the spare is ready; `double` is a second kill straight after the first, which finds none.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import numpy as np
import ray

from benchmarks.harness import ROOT, Figure, Report, run_benchmark
from ground.model import load_model, tensors_of
from ground.records import Message, Prompt
from rollout.cluster import system_config
from rollout.config import EngineSection, FleetSection, SamplingSection
from rollout.fleet import Fleet
from rollout.handover import Outbox
from rollout.ray_worker import RayWorker
from rollout.roster import Event
from rollout.seeds import sample_seed
from rollout.task import GroupTask, WorkerConfig
from rollout.weights import WeightKeeper, this_node

_MODEL = ROOT / "recipes" / "tiny" / "herd" / "student"
_SEED = 0
_KILLS, _QUICK_KILLS = 20, 5
_SECONDS = 90.0
_NOTICED_GOAL, _BACK_GOAL = 3.0, 8.0


@dataclass
class Killing:
    """A fleet under work, and what was seen of each kill."""

    fleet: Fleet
    workers: list[RayWorker]
    events: list[Event]
    noticed: list[float] = field(default_factory=list)
    back: list[float] = field(default_factory=list)

    async def kill(self, index: int) -> float:
        """SIGKILL the worker of a seat; returns when."""
        process = self._pid(index)
        os.kill(process, signal.SIGKILL)
        return time.time()

    async def see(self, index: int, killed: float) -> None:
        """Wait until it serves again, and note how long both took."""
        role = f"worker {index}"
        lost = await self._event("lost", role, killed)
        restart = await self._event("restart", role, killed)
        current = max(worker.version for worker in self.fleet.stats().workers)
        assert self.fleet.stats().workers[index].version == current
        self.noticed.append(lost - killed)
        self.back.append(restart - killed)

    async def spare_ready(self) -> None:
        """Wait until the next loss would find a spare."""
        async with asyncio.timeout(_SECONDS):
            while not self.fleet._roster._spare.is_ready:
                await asyncio.sleep(0.05)

    def _pid(self, index: int) -> int:
        worker = self.fleet._roster.seats[index].worker
        assert isinstance(worker, RayWorker) and worker.pid
        return worker.pid

    async def _event(self, kind: str, role: str, since: float) -> float:
        async with asyncio.timeout(_SECONDS):
            while True:
                for event in self.events:
                    end = float(str(event["end"]))
                    if (event["kind"], event["role"]) == (kind, role) and end >= since:
                        return end
                await asyncio.sleep(0.02)


@asynccontextmanager
async def busy_fleet(spare: bool) -> AsyncIterator[Killing]:
    """Two workers that always have something to do."""
    section = FleetSection(num_workers=2, cpus_per_worker=0.5, spare=spare, max_restarts=9)
    config = WorkerConfig(_MODEL, EngineSection(num_slots=16, max_length=128), section)
    keeper, workers, events = WeightKeeper(), list[RayWorker](), list[Event]()

    def spawn() -> RayWorker:
        workers.append(RayWorker(config))
        return workers[-1]

    fleet = Fleet(section, spawn, events.append)
    outbox = Outbox(keeper, this_node())
    outbox.send(outbox.pack(0, tensors_of(load_model(_MODEL))))
    asked: list[str] = []
    try:
        await fleet.start()
        await fleet.publish(0, keeper.current()[1])
        working = [asyncio.create_task(_work(fleet, asked, number)) for number in range(4)]
        yield Killing(fleet, workers, events)
        for task in working:
            task.cancel()
        for outcome in await asyncio.gather(*working, return_exceptions=True):
            if isinstance(outcome, Exception):
                raise outcome
        done = [event["group"] for event in events if event["kind"] == "rollout"]
        assert len(done) == len(set(done)) and set(done) <= set(asked)
    finally:
        await fleet.close()


async def _work(fleet: Fleet, asked: list[str], number: int) -> None:
    for turn in range(1_000_000):
        task = _task(f"{17 + number}+{turn}=?")
        asked.append(task.id)
        assert (await fleet.rollout(task)).id == task.id


def _task(text: str) -> GroupTask:
    prompt = Prompt.make((Message("user", text),), capability="sums", reward="exact", answer="1")
    seeds = tuple(sample_seed(_SEED, prompt.id, 0, sample) for sample in range(8))
    return GroupTask(f"{prompt.id}.0", prompt, "", SamplingSection(max_new_tokens=64), seeds)


async def kill_again_and_again(spare: bool, kills: int) -> tuple[list[float], list[float]]:
    """Seconds to notice and to serve again, for each kill."""
    chance = random.Random(_SEED)
    async with busy_fleet(spare) as killing:
        for number in range(kills):
            if spare:
                await killing.spare_ready()
            await asyncio.sleep(chance.uniform(0.5, 1.5))
            await killing.see(number % 2, await killing.kill(number % 2))
        return killing.noticed, killing.back


async def kill_both() -> list[float]:
    """Both at once: one finds the spare, the other does not."""
    async with busy_fleet(True) as killing:
        await killing.spare_ready()
        killed = [await killing.kill(index) for index in (0, 1)]
        await asyncio.gather(*(killing.see(index, killed[index]) for index in (0, 1)))
        return killing.back


def measure(quick: bool) -> Report:
    """Kill with and without a spare; returns percentiles."""
    kills = _QUICK_KILLS if quick else _KILLS
    ray.init(
        num_cpus=4,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=128 << 20,
        _system_config=system_config(),
    )
    try:
        noticed, back = asyncio.run(kill_again_and_again(True, kills))
        noticed_bare, back_bare = asyncio.run(kill_again_and_again(False, kills))
        double = asyncio.run(kill_both())
    finally:
        with suppress(Exception):
            ray.shutdown()
    figures = [
        Figure("noticed, p95", _p95(noticed + noticed_bare), "s", _NOTICED_GOAL, "lower", 1.5),
        Figure("serving again, p95", _p95(back), "s", _BACK_GOAL, "lower", 3.0),
        Figure("serving again, median", float(np.median(back)), "s", better="lower"),
        Figure("serving again without a spare, p95", _p95(back_bare), "s", better="lower"),
        Figure("both killed at once, the later one", max(double), "s", better="lower"),
    ]
    details = {
        "kills": 2 * kills + 2,
        "noticed_seconds": [round(each, 3) for each in noticed + noticed_bare],
        "back_seconds": [round(each, 3) for each in back],
        "back_without_spare_seconds": [round(each, 3) for each in back_bare],
        "both_seconds": [round(each, 3) for each in double],
    }
    return Report(figures, details)


def _p95(values: list[float]) -> float:
    return float(np.percentile(values, 95))


if __name__ == "__main__":
    sys.exit(run_benchmark("recovery", measure, seeds=[_SEED]))
