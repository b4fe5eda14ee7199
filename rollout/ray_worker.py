"""A rollout worker as its fleet sees it: a Ray actor whose failures have been sorted.

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
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar, cast

import ray
from ray.actor import ActorHandle, ActorProxy
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.exceptions import OutOfMemoryError as NodeOutOfMemoryError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ground.errors import InfraError, PacktrainError
from ground.exits import ExitWatch, pid_space
from rollout.bundle import Resources, bundle_of, with_affordable_spare
from rollout.config import FleetSection
from rollout.failures import memory_kills
from rollout.luggage import Luggage
from rollout.seat import OutOfMemoryError, WorkerDiedError
from rollout.task import GroupResult, GroupTask, Loaded, Pong, WorkerConfig
from rollout.worker import RolloutWorker

_CLOSE_SECONDS = 3.0
_GONE_SECONDS = 5.0
_POLL_SECONDS = 0.05
_STATUS_SECONDS = 0.5
"""Until the kernel has the exit status of a process that Ray calls dead."""

Value = TypeVar("Value")


class LostMessageError(InfraError):
    """A call or its answer was lost on the way; the worker may have done it, and lives."""


class RayWorker:
    """A `Worker` in a process of its own, somewhere in the Ray cluster.

    Args:
        kind: what runs there.
    """

    def __init__(self, config: WorkerConfig, kind: type[RolloutWorker] = RolloutWorker) -> None:
        luggage = Luggage.pack(config.model_path, config.reward_files)
        self._group = _own_group(config)
        actor = ray.remote(kind).options(
            num_cpus=config.fleet.cpus_per_worker,
            num_gpus=self._group.bundle_specs[0]["GPU"] if self._group else 0,
            scheduling_strategy=_within(self._group),
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=1000,
            enable_task_events=False,
        )
        self._actor: ActorProxy[RolloutWorker] = actor.remote(config, luggage)
        self._incarnation = config.incarnation
        self._memory_kills = memory_kills()
        self._process: tuple[str, int] | None = None
        self._exit: ExitWatch | None = None

    async def prepare(self) -> None:
        """See `Worker.prepare`; remembers the process, so that it can be killed when it hangs."""
        self._process = process = await self._surely(self._actor.prepare.remote)
        if self._is_near:
            self._exit = ExitWatch(process[1])

    async def open(self, index: int, slots_share: float = 1.0) -> None:
        """See `Worker.open`."""
        if not self._process:
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
        return self._process[1] if self._process else None

    async def load(self, version: int, weights: object) -> Loaded:
        """See `Worker.load`; `weights` are `Published`."""
        return await self._surely(
            lambda: self._actor.load.remote(self._incarnation, version, weights)
        )

    async def rollout(self, task: GroupTask, attempt: int) -> GroupResult:
        """See `Worker.rollout`; a pickle each way, since Ray's own way costs several times more."""
        asked = pickle.dumps((self._incarnation, task, attempt))
        return pickle.loads(await self._surely(lambda: self._actor.rollout.remote(asked)))

    def kill(self) -> None:
        """Ray asks the process to go, which a stopped one cannot hear: so SIGKILL as well."""
        ray.kill(cast(ActorHandle, self._actor))
        if self._is_near and self._process:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._process[1], signal.SIGKILL)
        self._give_back()

    async def close(self) -> None:
        """See `Worker.close`."""
        with contextlib.suppress(PacktrainError, TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._sorted(self._actor.close.remote())
        ray.kill(cast(ActorHandle, self._actor))
        self._give_back()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GONE_SECONDS):
                while self._is_near and self._process and _is_running(self._process[1]):
                    await asyncio.sleep(_POLL_SECONDS)
                return
        self.kill()

    def _give_back(self) -> None:
        """Devices may be taken by the next worker."""
        if self._group:
            remove_placement_group(self._group)
            self._group = None

    @property
    def _is_near(self) -> bool:
        """Whether its process id means something here."""
        return self._process is not None and self._process[0] == pid_space()

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
        may_be_here = self._is_near or not self._process
        if may_be_here and memory_kills() > self._memory_kills:
            return OutOfMemoryError("the kernel has ended a process for want of memory meanwhile")
        cause = await self._exit.cause(_STATUS_SECONDS) if self._exit else ""
        ended = f"ended by {cause}; " if cause else ""
        return WorkerDiedError(f"{ended}{type(error).__name__}: {_first_sentence(error)}")


def fleet_of(config: WorkerConfig) -> FleetSection:
    """The fleet of this cluster: without a spare where workers have GPUs."""
    return with_affordable_spare(config, _machines())


def _machines() -> list[Resources]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _own_group(config: WorkerConfig) -> PlacementGroup | None:
    """A placement group of one worker, if it needs more than processors."""
    bundle = bundle_of(config.engine, config.fleet.cpus_per_worker, _machines())
    return placement_group([bundle], strategy="STRICT_PACK") if "GPU" in bundle else None


def _within(group: PlacementGroup | None) -> PlacementGroupSchedulingStrategy | None:
    return PlacementGroupSchedulingStrategy(group, 0) if group else None


def _own_error(error: RayTaskError) -> PacktrainError:
    cause = error.cause
    if isinstance(cause, PacktrainError):
        return cause
    return PacktrainError(
        f"a rollout worker failed: {type(cause).__name__}: {cause}",
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
