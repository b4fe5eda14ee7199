"""The second way of weights into an engine: broadcast by whom they are kept beside.

    Courier (a Ray actor on the keeper's machine) ─ opens what is published ─┐
    vLLM's workers, wherever they are ◀─ NCCL or gloo, one group for each engine ─┘

Each worker has a courier of its own, and a group with nobody else in it, so that whoever is lost
costs one worker: a courier ends with its worker, and a worker that loses its courier is replaced.
Nothing else changes: versions are published, kept, proven and acknowledged as ever.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.actor import ActorProxy
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ground import faults
from ground.errors import InfraError, SetupError
from ground.imports import without_collection
from ground.roles import enter_role
from rollout.config import EngineSection
from rollout.failures import sort_failure, sorted_failures
from rollout.luggage import Luggage
from rollout.weights import Published, this_node

if TYPE_CHECKING:
    from rollout.vllm_engine import VllmEngine

_ANSWER_SECONDS = 120.0
"""Until a courier is born, has imported vLLM, and opens what is published."""


class Courier:
    """Sends published weights to one engine; runs on the machine that keeps them.

        meet → join (while vLLM joins) → for each version: take → send (while vLLM receives)

    With NCCL it uses the first GPU of its machine, which is the learner's.
    """

    def __init__(self, luggage: Luggage, backend: str) -> None:
        enter_role("courier")
        self._luggage, self._backend = luggage, backend

    def meet(self, num_receivers: int) -> dict[str, Any]:
        """Begin to listen; returns what vLLM joins with.

        Raises:
            SetupError: NCCL is asked for and this machine has no GPU.
        """
        os.environ.pop("CUDA_VISIBLE_DEVICES", None)  # Ray hides what it did not reserve
        with sorted_failures("opening a broadcast group"), without_collection():
            _require_device(self._backend)
            from rollout.handover import Inbox
            from rollout.vllm_transfer import Announced, Meeting
            from rollout.vllm_weights import CheckpointForm

            files = self._luggage.unpack()
            self._form, self._inbox = CheckpointForm(files.model), Inbox(this_node())
            files.remove()
            self._announced = Announced("cuda" if self._backend == "nccl" else "cpu")
            address = ray.util.get_node_ip_address()
            self._meeting = Meeting.at(address, self._backend, num_receivers)
            return self._meeting.invitation()

    def join(self) -> None:
        """Wait for vLLM's ranks."""
        with sorted_failures("opening a broadcast group"):
            self._sender = self._meeting.sender(self._announced)

    def take(self, published: Published) -> dict[str, Any]:
        """Open a version and check that it fits the model; returns names, types and shapes.

        Raises:
            DataError: the weights are of another model, or not finite.
            InfraError: they are not kept any more.
        """
        with sorted_failures(f"opening {published.title}"):
            tensors = self._inbox.open(published)
            self._form.check(tensors)
            self._announced.tensors = self._form.saved(tensors)
            return self._announced.manifest()

    def send(self) -> None:
        """Broadcast what was taken."""
        faults.point("weights.send")
        with sorted_failures("broadcasting weights"):
            self._sender.send_weights()


class Lane:
    """A worker's end: its courier, and the engine that it sends to.

    Args:
        section: the engine's; its transfer is not `memory`.
        luggage: the model folder without its weights.
    """

    def __init__(self, engine: VllmEngine, section: EngineSection, luggage: Luggage) -> None:
        self._engine, self._section, self._luggage = engine, section, luggage
        self._courier: ActorProxy[Courier] | None = None
        self._node = ""
        self._manifest: dict[str, Any] = {}

    def fetch(self, published: Published) -> None:
        """Have the courier open a version; the engine goes on meanwhile.

        Raises:
            DataError: the weights are of another model, or not finite.
            InfraError: the courier was lost, or the weights have moved to another machine.
        """
        courier = self._courier or self._hired(published.node)
        if published.node != self._node:
            raise InfraError(
                f"{published.title} must lie where the worker's courier is; its machine is another",
                where="hand-over",
            )
        self._manifest = _answer(courier.take.remote(published))

    def load(self, version: int) -> None:
        """Have what was fetched sent and swapped in; see `Engine.load`.

        Raises:
            InfraError: the courier was lost.
        """
        courier = self._courier
        assert courier
        self._engine.receive(version, self._manifest, lambda: _awaited(courier.send.remote()))

    def _hired(self, node: str) -> ActorProxy[Courier]:
        strategy = NodeAffinitySchedulingStrategy(node, soft=False)
        options = {"num_cpus": 0, "max_restarts": 0, "scheduling_strategy": strategy}
        courier = (
            ray.remote(Courier).options(**options).remote(self._luggage, self._section.transfer)
        )
        invitation = _answer(courier.meet.remote(self._section.tensor_parallel))
        self._engine.join(invitation, lambda: _awaited(courier.join.remote()))
        self._courier, self._node = courier, node
        return courier


def _require_device(backend: str) -> None:
    import torch

    if backend == "nccl" and not torch.cuda.is_available():
        raise SetupError(
            "engine.transfer=nccl needs a GPU on the machine that keeps the weights, the one on "
            "which the run was started; it has none",
            where="hand-over",
            fix="set engine.transfer=memory, or start the run on a machine with GPUs",
        )


def _answer(ref: ray.ObjectRef[dict[str, Any]]) -> dict[str, Any]:
    with _sorted():
        return ray.get(ref, timeout=_ANSWER_SECONDS)


async def _awaited(ref: ray.ObjectRef[None]) -> None:
    with _sorted():
        await cast(Awaitable[None], ref)


@contextmanager
def _sorted() -> Iterator[None]:
    """Failures of a courier as errors of ours."""
    try:
        yield
    except GetTimeoutError:
        raise InfraError(
            f"a courier of weights must answer within {_ANSWER_SECONDS:g} s", where="hand-over"
        ) from None
    except RayTaskError as error:
        raise sort_failure(error.cause, "sending weights") from None
    except RayError as error:
        raise InfraError(
            f"the courier of a worker's weights was lost: {type(error).__name__}",
            where="hand-over",
            why=str(error),
        ) from None
