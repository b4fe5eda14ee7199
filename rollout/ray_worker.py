"""A rollout worker as its fleet sees it: a Ray actor whose failures have been sorted.

What leaves this module is one of our own errors: `InfraError` when the process, node or object was
lost, the worker's own error when it had one, and an error of kind CODE for all that is unknown.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import platform
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeVar, cast

import ray
from ray.actor import ActorHandle, ActorProxy
from ray.exceptions import ActorUnavailableError, RayActorError, RayError, RayTaskError
from ray.exceptions import OutOfMemoryError as NodeOutOfMemoryError

from ground.errors import InfraError, PacktrainError
from rollout.failures import memory_kills
from rollout.luggage import Luggage
from rollout.seat import OutOfMemoryError, WorkerDiedError
from rollout.task import GroupResult, GroupTask, Loaded, Pong, WorkerConfig
from rollout.worker import RolloutWorker

_CLOSE_SECONDS = 3.0
_GONE_SECONDS = 5.0
_POLL_SECONDS = 0.05

Value = TypeVar("Value")


class LostMessageError(InfraError):
    """A call or its answer was lost on the way; the worker may have done it, and lives."""


class RayWorker:
    """A `Worker` in a process of its own, somewhere in the Ray cluster.

    Args:
        kind: what runs there.
    """

    def __init__(self, config: WorkerConfig, kind: type[RolloutWorker] = RolloutWorker) -> None:
        actor = ray.remote(kind).options(
            num_cpus=config.fleet.cpus_per_worker,
            max_restarts=0,
            max_task_retries=0,
            max_concurrency=1000,
            enable_task_events=False,
        )
        luggage = Luggage.pack(config.model_path, config.reward_files)
        self._actor: ActorProxy[RolloutWorker] = actor.remote(config, luggage)
        self._incarnation = config.incarnation
        self._memory_kills = memory_kills()
        self._process: tuple[str, int] | None = None

    async def prepare(self) -> None:
        """See `Worker.prepare`; remembers the process, so that it can be killed when it hangs."""
        self._process = await self._surely(self._actor.prepare.remote)

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

    async def close(self) -> None:
        """See `Worker.close`."""
        with contextlib.suppress(PacktrainError, TimeoutError):
            async with asyncio.timeout(_CLOSE_SECONDS):
                await self._sorted(self._actor.close.remote())
        ray.kill(cast(ActorHandle, self._actor))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_GONE_SECONDS):
                while self._is_near and self._process and _is_running(self._process[1]):
                    await asyncio.sleep(_POLL_SECONDS)
                return
        self.kill()

    @property
    def _is_near(self) -> bool:
        """Whether its process id means something on this machine."""
        return self._process is not None and self._process[0] == platform.node()

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
            raise self._death(error) from None
        except RayError as error:
            raise InfraError(f"{type(error).__name__}: {_first_sentence(error)}") from None

    def _death(self, error: RayActorError) -> WorkerDiedError:
        """Ray calls many ends a lost connection; the kernel counts those for want of memory."""
        if memory_kills() > self._memory_kills:
            return OutOfMemoryError("the kernel has ended a process for want of memory meanwhile")
        return WorkerDiedError(f"{type(error).__name__}: {_first_sentence(error)}")


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
