"""The controller's process against real Ray workers that answer without a model.

Everything between a worker's answer and the learner's plan is real: Ray's calls, pickles, fleet,
books, ledger, timeline, pings once a second. What a worker costs is not measured, but the whole of
this process is, the threads of Ray's core among them; and the plans are pickled as for the learner.
Beside it stands what Ray takes for the same calls in a process that does nothing else.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import platform
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import ray

from ground.records import Segment, Span
from rl.config import RlSection
from rl.controller import Controller
from rl.journal import Journal
from rl.simulate import make_books, make_pool, make_section
from rollout.cluster import system_config
from rollout.config import FleetSection, SamplingSection
from rollout.fleet import Fleet
from rollout.ray_worker import RayWorker
from rollout.simulation import group_of
from rollout.systems import SystemInstruction
from rollout.task import GroupResult, GroupTask, Home, Loaded, Pong, WorkerConfig
from rollout.weights import Published, this_node
from rollout.worker import RolloutWorker

RATE = 1000
"""Rollouts a second that the workers answer with, together."""
TOKENS = 500
"""Of a rollout."""
_STEPS, _GROUPS, _SIZE = 7, 256, 8


class CannedWorker(RolloutWorker):
    """Sleeps for a group's time and gives the same tokens to everybody; half of them are right."""

    seconds = 1.0

    async def prepare(self) -> Home:
        """It has no libraries to import."""
        return Home(platform.node(), os.getpid(), this_node())

    async def open(self, index: int, slots_share: float = 1.0) -> None:
        """It has no model to load."""

    async def ping(self, incarnation: int) -> Pong:
        """It lives."""
        return Pong()

    async def load(self, incarnation: int, version: int, published: Published) -> Loaded:
        """Take on a version."""
        tokens, logprobs = tuple(range(TOKENS)), (-0.5,) * TOKENS
        self._segment = Segment("policy", tokens, logprobs, (Span(version, TOKENS),))
        return Loaded(version, {}, 0.0)

    async def _rollout(self, task: GroupTask, attempt: int) -> GroupResult:
        began = time.time()
        await asyncio.sleep(self.seconds * (0.5 + (task.seeds[0] % 1000) / 1000))
        rewards = [float(number % 2) for number in range(_SIZE)]
        group = group_of(task, [self._segment] * _SIZE, rewards)
        now = time.time()
        return GroupResult(group, began, now, now, _SIZE * TOKENS, attempt)


@dataclass(frozen=True, slots=True)
class Share:
    """Of a core, at `RATE` rollouts a second.

    Example:
        Share(controller=0.29, bare=0.14, rate=982.0)
    """

    controller: float
    """The controller's process, with all that Ray does in it."""
    bare: float
    """A process that makes the same calls to the same workers and forgets the answers."""
    rate: float
    """Rollouts a second that were measured."""


def controller_share(workers: int) -> Share:
    """What so many workers cost whoever asks them, as the controller and barely."""
    ray.init(
        num_cpus=workers,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=256 << 20,
        _system_config=system_config(),
    )
    try:
        section = _section(workers)
        in_flight = min(section.groups_in_flight, 2 * _GROUPS)
        kind = type("Canned", (CannedWorker,), {"seconds": in_flight * _SIZE / RATE})
        config = WorkerConfig(Path("none"), section.engine, section.fleet, lease_seconds=3600)
        crew = [RayWorker(config, kind) for _ in range(workers)]
        bare = asyncio.run(_call(crew, in_flight))
        controller, rate = asyncio.run(_play(section, in_flight, lambda: RayWorker(config, kind)))
        return Share(controller, bare, rate)
    finally:
        with suppress(Exception):
            ray.shutdown()


def _section(workers: int) -> RlSection:
    section = make_section(
        steps=_STEPS,
        groups_per_step=_GROUPS,
        group_size=_SIZE,
        workers=workers,
        slots=64,
        staleness=1,
    )
    return section.model_copy(update={"fleet": FleetSection(num_workers=workers, spare=False)})


async def _call(crew: Sequence[RayWorker], in_flight: int) -> float:
    """The calls of `_play` without a controller: as many at a time, of the same size."""
    for index, worker in enumerate(crew):
        await worker.open(index)
        await worker.load(0, "weights")
    [prompt] = make_pool(1)
    turns, meter = iter(range(_STEPS * _GROUPS)), _Meter()

    async def calls(worker: RayWorker) -> None:
        for turn in turns:
            if turn == _GROUPS:  # all before is warming up
                meter.start(turn)
            task = GroupTask(f"g{turn}", prompt, "", SamplingSection(), (turn * 97,) * _SIZE)
            asked = pickle.dumps((0, task, 0))
            await cast(Awaitable[bytes], worker._actor.rollout.remote(asked))

    await asyncio.gather(*(calls(crew[number % len(crew)]) for number in range(in_flight)))
    share, _ = meter.stop(_STEPS * _GROUPS)
    await asyncio.gather(*(worker.close() for worker in crew))
    return share


class _Meter:
    """Processor share and rate between two counts of groups."""

    def start(self, groups: int) -> None:
        """From now on, so many being done already."""
        self._groups, self._clock, self._cpu = groups, time.monotonic(), time.process_time()

    def stop(self, groups: int) -> tuple[float, float]:
        """Share of a core at `RATE`, and rollouts a second that were seen."""
        rollouts = (groups - self._groups) * _SIZE
        spent, seconds = time.process_time() - self._cpu, time.monotonic() - self._clock
        return spent / rollouts * RATE, rollouts / seconds


async def _play(
    section: RlSection, in_flight: int, spawn: Callable[[], RayWorker]
) -> tuple[float, float]:
    """A run's share and rate."""
    with tempfile.TemporaryDirectory() as folder:
        ledger = Journal(Path(folder) / "ledger", buffered=True)
        events = Journal(Path(folder) / "events")
        crew = Fleet(section.fleet, spawn, events.append)
        controller = Controller(
            make_books(section, make_pool(5000), 0, ledger),
            crew,
            section,
            seed=0,
            validation=[],
            system_of=lambda prompt, pass_: SystemInstruction(),
            in_flight=in_flight,
            note=events.append,
        )
        await crew.start()
        await controller.begin(0, "weights")
        meter = _Meter()
        for step in range(_STEPS):
            if step == 1:
                meter.start(crew.stats().groups)
            plan, _ = await controller.next_batch(step)
            pickle.dumps(plan)
            await controller.publish(step + 1, "weights")
        share, rate = meter.stop(crew.stats().groups)
        await controller.close("end")
        await crew.close()
        ledger.close()
        events.close()
    return share, rate
