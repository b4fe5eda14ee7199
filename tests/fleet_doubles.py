"""Fleets of real Ray workers for tests, with the tiny model or with an engine that only pretends.

Importing torch is most of a worker's start, and what a fleet does with workers hangs on it nowhere.
"""

from __future__ import annotations

import asyncio
import fcntl
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ground import faults
from ground.records import Group, Message, Prompt
from rollout.config import EngineSection, SamplingSection
from rollout.fake_engine import FakeEngine
from rollout.fleet import Fleet
from rollout.machines import Machines, StillMachines
from rollout.ray_worker import RayWorker
from rollout.roster import Event
from rollout.seeds import sample_seed
from rollout.task import GroupTask, Loaded, WorkerConfig
from rollout.worker import RolloutWorker


def make_task(name: str, tokens: int = 16, size: int = 3, system: str = "") -> GroupTask:
    messages = (Message("user", f"say {name}"),)
    prompt = Prompt.make(messages, capability="c", reward="exact", answer="x")
    seeds = tuple(sample_seed(0, prompt.id, 0, sample) for sample in range(size))
    return GroupTask(
        f"{prompt.id}.0", prompt, system, SamplingSection(max_new_tokens=tokens), seeds
    )


class PretendingEngine(FakeEngine):
    """Tokens follow from the request's seed, one every few milliseconds; passes `gen.mid`."""

    def __init__(self) -> None:
        super().__init__(
            lambda request: [(request.seed * 7 + n * 13) % 26 + 97 for n in range(64)],
            seconds=lambda request: 0.005 * request.max_new_tokens,
        )

    def _advance(self, now: float) -> list[Any]:
        if self._playing:
            faults.point("gen.mid")
        return super()._advance(now)


class Letters:
    """A chat template whose tokens are letters."""

    stop_ids: tuple[int, ...] = ()

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        return [ord(letter) % 128 for letter in str(messages[-1].content)]

    def decode(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))


class OpenGate:
    """Lets every version through."""

    arriving = None

    def __init__(self, engine: PretendingEngine) -> None:
        self.engine = engine

    def load(self, version: int, published: object) -> Loaded:
        assert published == f"weights {version}"
        faults.point("weights.fetch")
        faults.point("weights.load")
        self.engine.load(version, {})
        return Loaded(self.engine.version, {}, 0.0)


class PretendingWorker(RolloutWorker):
    """A rollout worker without a model: everything else is real."""

    def _import_libraries(self) -> None:
        return

    def _open_engine(self, section: EngineSection, model: Path) -> Any:
        engine = PretendingEngine()
        return engine, Letters(), OpenGate(engine)


class Births:
    """Spawns workers in processes and remembers them, so that a test can find them."""

    def __init__(self, config: WorkerConfig, kind: type[RolloutWorker] = PretendingWorker) -> None:
        self.config, self.kind = config, kind
        self.machines: Machines = StillMachines()
        self.workers: list[RayWorker] = []
        self.events: list[Event] = []

    def __call__(self) -> RayWorker:
        self.workers.append(RayWorker(self.config, self.kind, self.machines.avoided))
        return self.workers[-1]

    def publish(self, version: int) -> object:
        """What is handed over as that version."""
        return f"weights {version}"

    def pids(self) -> list[int]:
        return [worker.pid for worker in self.workers if worker.pid]

    def events_of(self, kind: str) -> list[Event]:
        return [event for event in self.events if event["kind"] == kind]


class RealBirths(Births):
    """The same with the model of the config."""

    def __init__(self, config: WorkerConfig) -> None:
        super().__init__(config, RolloutWorker)
        from weight_doubles import Post  # it brings torch, which no pretending worker needs

        self.post = Post()

    def publish(self, version: int) -> object:
        return self.post.publish_model(version, self.config.model_path)


def run_fleet(births: Births, scenario: Callable[[Fleet], Coroutine[None, None, None]]) -> None:
    """Run with a fleet, close it, and see to it that no process is left within ten seconds."""

    async def main() -> None:
        fleet = Fleet(births.config.fleet, births, births.events.append, births.machines)
        try:
            async with asyncio.timeout(270):
                await scenario(fleet)
        except TimeoutError as error:
            raise AssertionError(f"{fleet.stats()} after {births.events}") from error
        finally:
            closing = time.monotonic()
            await fleet.close()
        ends_by = closing + 10
        while left := [pid for pid in births.pids() if is_running(pid)]:
            assert time.monotonic() < ends_by, f"{left} still run"
            await asyncio.sleep(0.05)
        assert time.monotonic() < ends_by

    asyncio.run(main())


@contextmanager
def one_at_a_time(name: str) -> Iterator[None]:
    """Of all tests of this machine, other pytest processes' too."""
    with (Path(tempfile.gettempdir()) / f"packtrain-tests-{name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def answers(groups: list[Group]) -> list[object]:
    """Tokens, log-probs and verdicts; what must not depend on who sampled it."""
    return [(group.id, group.prompt_ids, group.rollouts) for group in groups]
