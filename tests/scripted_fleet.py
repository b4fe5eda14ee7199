"""Workers of a fleet that do as a test says, on a virtual clock and without Ray."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass, field

from ground.records import Group, Message, Prompt, Rollout, Segment, Span
from rollout.config import FleetSection, SamplingSection
from rollout.fleet import Event, Fleet
from rollout.machines import Machines
from rollout.simulation import run_virtual
from rollout.task import Arriving, GroupResult, GroupTask, Loaded, Pong

SECTION = FleetSection(
    num_workers=2,
    start_deadline_seconds=0.5,
    rollout_deadline_seconds=0.5,
    publish_deadline_seconds=0.5,
    ping_every_seconds=0.02,
    ping_deadline_seconds=0.1,
    max_restarts=2,
    backoff_seconds=0.01,
    max_attempts=3,
    spare=False,
)
Call = Callable[["ScriptedWorker"], Awaitable[None]]


def loop_time() -> float:
    """Seconds on the clock of the loop, which goes on only while everybody waits."""
    return asyncio.get_running_loop().time()


async def forever(worker: ScriptedWorker) -> None:
    await asyncio.sleep(60)


async def at_once(worker: ScriptedWorker) -> None:
    return


def failing(error: Exception) -> Call:
    async def fail(worker: ScriptedWorker) -> None:
        raise error

    return fail


@dataclass
class ScriptedWorker:
    """Does what it is told at each call; all lives are listed in `Script.born`."""

    number: int
    preparing: Call = at_once
    opening: Call = at_once
    pinging: Call = at_once
    loading: Call = at_once
    sampling: Call = at_once
    killed: bool = False
    slots_share: float = 0.0
    loads: list[int] = field(default_factory=list)
    tasks: list[tuple[str, int]] = field(default_factory=list)
    ack_lag: int = 0
    seconds_sampled: Callable[[], dict[str, float]] = dict
    scoring: tuple[str, ...] = ()
    other_answer: bool = False
    arriving: Callable[[], Arriving | None] = lambda: None
    node: str = ""
    is_placed: bool = True

    async def prepare(self) -> None:
        await self.preparing(self)

    async def open(self, index: int, slots_share: float = 1.0) -> None:
        self.slots_share = slots_share
        await self.opening(self)

    async def ping(self) -> Pong:
        await self.pinging(self)
        verdicts = {"texts": 2, "reward_timeout": 1}
        return Pong(self.seconds_sampled(), self.scoring, verdicts, self.arriving())

    async def load(self, version: int, weights: object) -> Loaded:
        assert weights == f"weights {version}"
        await self.loading(self)
        self.loads.append(version)
        return Loaded(version - self.ack_lag, {"load": 0.5}, drift=0.0)

    async def rollout(self, task: GroupTask, attempt: int) -> GroupResult:
        self.tasks.append((task.id, attempt))
        await self.sampling(self)
        version = self.loads[-1]
        segment = Segment("policy", (5, 2), (-0.1, -0.2), (Span(version, 2),))
        rollouts = tuple(Rollout(n, (segment,), f"{self.number}") for n in range(len(task.seeds)))
        return GroupResult(
            Group(task.id, task.prompt, (1,), rollouts),
            0.0,
            1.0,
            2.0,
            4,
            attempt - self.other_answer,
        )

    def kill(self) -> None:
        self.killed = True

    async def close(self) -> None:
        self.killed = True


class Script:
    """Makes workers; `plans[n]` prepares the n-th one born, counted over all seats."""

    def __init__(self, **plans: Callable[[ScriptedWorker], None]) -> None:
        self.plans = plans
        self.born: list[ScriptedWorker] = []
        self.events: list[Event] = []

    def __call__(self) -> ScriptedWorker:
        worker = ScriptedWorker(len(self.born))
        self.plans.get(f"worker{worker.number}", self.plans.get("others", lambda worker: None))(
            worker
        )
        self.born.append(worker)
        return worker


def having(**attributes: object) -> Callable[[ScriptedWorker], None]:
    def apply(worker: ScriptedWorker) -> None:
        for name, value in attributes.items():
            setattr(worker, name, value)

    return apply


def task_of(name: str) -> GroupTask:
    prompt = Prompt.make((Message("user", name),), capability="c", reward="exact", answer="")
    return GroupTask(name, prompt, "", SamplingSection(), (1, 2))


def play(
    script: Script,
    scenario: Callable[[Fleet], Coroutine[None, None, None]],
    section: FleetSection = SECTION,
    machines: Machines | None = None,
    most_each: float = math.inf,
) -> None:
    async def main() -> None:
        fleet = Fleet(section, script, script.events.append, machines, most_each=most_each)
        try:
            async with asyncio.timeout(200):
                await scenario(fleet)
        finally:
            await fleet.close()
        assert all(worker.killed for worker in script.born)

    run_virtual(main())


async def begin(fleet: Fleet) -> None:
    await fleet.start()
    await fleet.publish(0, "weights 0")


async def pause(worker: ScriptedWorker) -> None:
    await asyncio.sleep(0.05)
