"""A rollout worker as its fleet sees it: a Ray actor whose failures have been sorted.

`RayMember` is that without the work: a teacher is one too (rl/teachers.py).

What leaves this module is one of our own errors: `InfraError` when the process, node or object was
lost, the worker's own error when it had one, and an error of kind CODE for all that is unknown.
Ray calls most ends a lost connection; what really ended a process of this machine the kernel tells
(ground/exits.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

import ray
from ray.actor import ActorHandle, ActorProxy
from ray.core.generated.gcs_pb2 import ActorTableData  # pyright: ignore[reportAttributeAccessIssue]
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.exceptions import OutOfMemoryError as NodeOutOfMemoryError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ground.errors import InfraError, PacktrainError
from ground.exits import ExitWatch, pid_space
from rollout.bundle import Resources, bundle_of, with_affordable_spare
from rollout.cluster import resources
from rollout.config import FleetSection
from rollout.failures import memory_kills
from rollout.judge_worker import JudgeWorker
from rollout.luggage import Luggage
from rollout.seat import OutOfMemoryError, WorkerDiedError
from rollout.task import GroupResult, GroupTask, Home, Loaded, Pong, WorkerConfig
from rollout.worker import RolloutWorker

_CLOSE_SECONDS = 3.0
_GONE_SECONDS = 5.0
_POLL_SECONDS = 0.05
_STATUS_SECONDS = 0.5
"""Until the kernel has the exit status of a process that Ray calls dead."""

Value = TypeVar("Value")


class Serves(Protocol):
    """What runs in a member's process."""

    async def prepare(self) -> Home:
        """See `RolloutWorker.prepare`."""
        ...

    async def open(self, index: int, slots_share: float = 1.0) -> None:
        """See `RolloutWorker.open`."""
        ...

    async def ping(self, incarnation: int) -> Pong:
        """See `RolloutWorker.ping`."""
        ...

    async def load(self, incarnation: int, version: int, published: Any) -> Loaded:
        """See `RolloutWorker.load`."""
        ...

    async def close(self) -> None:
        """See `RolloutWorker.close`."""
        ...


Served = TypeVar("Served", bound=Serves)


class LostMessageError(InfraError):
    """A call or its answer was lost on the way; the worker may have done it, and lives."""


class RayMember(Generic[Served]):
    """A `Member` in a process of its own, somewhere in the Ray cluster.

    Args:
        kind: what runs there.
        arguments: of its constructor.
        bundle: what Ray reserves for it.
        incarnation: of the run, which each message carries.
        avoided: nodes on which it must not be born.
    """

    def __init__(
        self,
        kind: type[Served],
        arguments: Sequence[object],
        bundle: Resources,
        incarnation: int,
        avoided: frozenset[str] = frozenset(),
    ) -> None:
        elsewhere = _elsewhere(avoided)
        self._group = _own_group(bundle, elsewhere)
        actor = ray.remote(kind).options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=_within(self._group),
            label_selector=None if self._group else elsewhere,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=1000,
            enable_task_events=False,
        )
        self._actor: ActorProxy[Served] = actor.remote(*arguments)
        self._incarnation = incarnation
        self._memory_kills = memory_kills()
        self._home: Home | None = None
        self._exit: ExitWatch | None = None

    async def prepare(self) -> None:
        """See `Worker.prepare`; remembers the process, so that it can be killed when it hangs."""
        self._home = home = await self._surely(self._actor.prepare.remote)
        if self._is_near:
            self._exit = ExitWatch(home.pid)

    async def open(self, index: int, slots_share: float = 1.0) -> None:
        """See `Worker.open`."""
        if not self._home:
            await self.prepare()
        await self._surely(lambda: self._actor.open.remote(index, slots_share))

    async def ping(self) -> Pong:
        """See `Worker.ping`."""
        pong = await self._surely(lambda: self._actor.ping.remote(self._incarnation))
        self._memory_kills = memory_kills()  # what was killed before now was somebody else
        return pong

    @property
    def pid(self) -> int | None:
        """Process id on its own node, once it has answered."""
        return self._home.pid if self._home else None

    @property
    def node(self) -> str:
        """See `Worker.node`."""
        return self._home.node if self._home else ""

    @property
    def is_placed(self) -> bool:
        """See `Worker.is_placed`."""
        state = cast(ActorHandle, self._actor)._get_local_state()
        return self._home is not None or state == ActorTableData.ALIVE

    async def load(self, version: int, weights: object) -> Loaded:
        """See `Worker.load`; `weights` are `Published`."""
        return await self._surely(
            lambda: self._actor.load.remote(self._incarnation, version, weights)
        )

    def kill(self) -> None:
        """Ray asks the process to go, which a stopped one cannot hear: so SIGKILL as well."""
        ray.kill(cast(ActorHandle, self._actor))
        if self._home and self._is_near:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._home.pid, signal.SIGKILL)
        self._give_back()

    async def close(self) -> None:
        """See `Worker.close`."""
        with contextlib.suppress(PacktrainError, TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._sorted(self._actor.close.remote())
        ray.kill(cast(ActorHandle, self._actor))
        self._give_back()
        if not await self._is_gone():
            self.kill()
            await self._is_gone()

    async def _is_gone(self) -> bool:
        """Whether its process ends within a few seconds, or is not to be seen from here."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GONE_SECONDS):
                while self._home and self._is_near and _is_running(self._home.pid):
                    await asyncio.sleep(_POLL_SECONDS)
                return True
        return False

    def _give_back(self) -> None:
        """Devices may be taken by the next worker."""
        if self._group:
            remove_placement_group(self._group)
            self._group = None

    @property
    def _is_near(self) -> bool:
        """Whether its process id means something here."""
        return self._home is not None and self._home.space == pid_space()

    async def _surely(self, ask: Callable[[], ray.ObjectRef[Value]]) -> Value:
        """The value of a call that a worker may hear twice; ends by its caller's deadline.

        The seeds of a group are part of its task, so that sampling it once more changes nothing.
        """
        while True:
            try:
                return await self._sorted(ask())
            except LostMessageError:
                await asyncio.sleep(_POLL_SECONDS)

    async def _sorted(self, ref: ray.ObjectRef[Value]) -> Value:
        """The value of a call, or its failure as one of our errors; cancelling cancels the call."""
        try:
            return await cast(Awaitable[Value], ref)
        except asyncio.CancelledError:
            ray.cancel(ref)
            raise
        except RayTaskError as error:
            raise _own_error(error) from None
        except NodeOutOfMemoryError as error:
            raise OutOfMemoryError(f"Ray ended it: {_first_sentence(error)}") from None
        except ActorUnavailableError as error:
            raise LostMessageError(_first_sentence(error)) from None
        except RayActorError as error:
            raise await self._death(error) from None
        except RayError as error:
            raise InfraError(f"{type(error).__name__}: {_first_sentence(error)}") from None

    async def _death(self, error: RayActorError) -> WorkerDiedError:
        """What ended it, as far as the kernel tells, and what Ray says of it."""
        may_be_here = self._is_near or not self._home
        if may_be_here and memory_kills() > self._memory_kills:
            return OutOfMemoryError("the kernel has ended a process for want of memory meanwhile")
        cause = await self._exit.cause(_STATUS_SECONDS) if self._exit else ""
        ended = f"ended by {cause}; " if cause else ""
        return WorkerDiedError(f"{ended}{type(error).__name__}: {_first_sentence(error)}")


class RayWorker(RayMember[RolloutWorker | JudgeWorker]):
    """A `Worker` in a process of its own.

    Args:
        kind: what runs there.
        avoided: nodes on which it must not be born.
    """

    def __init__(
        self,
        config: WorkerConfig,
        kind: type[RolloutWorker] | type[JudgeWorker] = RolloutWorker,
        avoided: frozenset[str] = frozenset(),
    ) -> None:
        luggage = Luggage.pack(config.model_path, config.reward_files)
        bundle, incarnation = worker_bundle(config), config.incarnation
        super().__init__(kind, (config, luggage), bundle, incarnation, avoided)

    async def rollout(self, task: GroupTask, attempt: int) -> GroupResult:
        """See `Worker.rollout`; a pickle each way, since Ray's own way costs several times more."""
        asked = pickle.dumps((self._incarnation, task, attempt))
        return pickle.loads(await self._surely(lambda: self._actor.rollout.remote(asked)))


def fleet_of(config: WorkerConfig) -> FleetSection:
    """The fleet of this cluster: without a spare where workers have GPUs."""
    return with_affordable_spare(config, resources())


def worker_bundle(config: WorkerConfig) -> dict[str, float]:
    """What a worker takes of one machine of this cluster."""
    return bundle_of(config.engine, config.fleet.cpus_per_worker, resources())


def _elsewhere(avoided: frozenset[str]) -> dict[str, str] | None:
    """Ray's words for any node but these."""
    return {"ray.io/node-id": f"!in({','.join(sorted(avoided))})"} if avoided else None


def _own_group(bundle: Resources, elsewhere: dict[str, str] | None) -> PlacementGroup | None:
    """A placement group of one member, if it needs more than processors."""
    if not bundle.get("GPU"):
        return None
    return placement_group(
        [dict(bundle)],
        strategy="STRICT_PACK",
        bundle_label_selector=[elsewhere] if elsewhere else None,  # pyright: ignore[reportArgumentType]
    )


def _within(group: PlacementGroup | None) -> PlacementGroupSchedulingStrategy | None:
    return PlacementGroupSchedulingStrategy(group, 0) if group else None


def _own_error(error: RayTaskError) -> PacktrainError:
    cause = error.cause
    if isinstance(cause, PacktrainError):
        return cause
    return PacktrainError(
        f"a worker process failed: {type(cause).__name__}: {cause}",
        why=str(error),
        fix="this is a defect, please report it with the traceback above",
    )


def _first_sentence(error: Exception) -> str:
    """The cause, without Ray's generalities before it and its list of what may be behind it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [""]
    told = next((line for line in lines if "exit detail:" in line or "killed" in line), lines[-1])
    return told.partition(" Some common causes")[0].rpartition("exit detail: ")[2]


def _is_running(pid: int) -> bool:
    """Whether the process is there and no zombie."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"
