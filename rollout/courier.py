"""The second way of weights into an engine: broadcast by whom they are kept beside.

    Courier (a Ray actor on the keeper's machine) ─ opens what is published ─┐
    vLLM's workers, wherever they are ◀─ NCCL or gloo, one group for each engine ─┘

Each worker has a courier of its own, and a group with nobody else in it, so that whoever is lost
costs one worker: a courier ends with its worker, and a worker that loses its courier is replaced.
Nothing else changes: versions are published, kept, proven and acknowledged as ever.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Collection, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import ray
from ray.actor import ActorProxy
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ground import faults
from ground.errors import InfraError, SetupError
from ground.imports import without_collection
from ground.roles import enter_role
from rollout.config import EngineSection
from rollout.failures import sort_failure, sorted_failures
from rollout.luggage import Luggage
from rollout.network import transport
from rollout.weights import Published, this_node

if TYPE_CHECKING:
    from rollout.vllm_engine import VllmEngine


class Courier:
    """Sends published weights to one engine; runs on the machine that keeps them.

        meet → join (while vLLM joins) → for each version: take → send (while vLLM receives)

    It keeps nothing of a version that it has sent. With NCCL it uses a GPU of its machine that its
    worker has not: NCCL takes no two members of a group on one.
    """

    def __init__(self, luggage: Luggage, backend: str) -> None:
        enter_role("courier")
        self._luggage, self._backend = luggage, backend

    def meet(self, num_receivers: int, taken: Collection[str]) -> dict[str, Any]:
        """Begin to listen; returns what vLLM joins with.

        Args:
            taken: GPUs of this machine that the receivers have, as Ray names them.

        Raises:
            SetupError: NCCL is asked for and this machine has no GPU besides.
        """
        with sorted_failures("opening a broadcast group"), without_collection():
            device = _device(self._backend, taken)
            from rollout.handover import Inbox
            from rollout.vllm_transfer import Announced, Meeting
            from rollout.vllm_weights import CheckpointForm

            os.environ.update(transport())
            files = self._luggage.unpack()
            self._form, self._inbox = CheckpointForm(files.model), Inbox(this_node())
            files.remove()
            self._announced = Announced(device)
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
            self._announced.tensors = faults.corrupted("weights.taken", self._form.saved(tensors))
            return self._announced.manifest()

    def send(self) -> None:
        """Broadcast what was taken."""
        faults.point("weights.send")
        with sorted_failures("broadcasting weights"):
            self._sender.send_weights()
            self._announced.let_go()
            self._inbox.let_go()


class Lane:
    """A worker's end: its courier, and the engine that it sends to.

    It waits without deadlines of its own: a worker that takes longer for a version than
    `fleet.publish_deadline_seconds` is replaced, and its courier ends with it.

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
        taken = [str(each) for each in ray.get_gpu_ids()] if node == this_node() else []
        invitation = _answer(courier.meet.remote(self._section.tensor_parallel, taken))
        self._engine.join(invitation, lambda: _awaited(courier.join.remote()))
        self._courier, self._node = courier, node
        return courier


def _device(backend: str, taken: Collection[str]) -> str:
    """What tensors are sent from: a GPU of its own for NCCL."""
    if backend != "nccl":
        return "cpu"
    import torch

    number = free_gpu(os.environ.get("CUDA_VISIBLE_DEVICES"), torch.cuda.device_count(), taken)
    if number is None:
        raise SetupError(
            "engine.transfer=nccl needs a GPU besides those of the engine on the machine that "
            "keeps the weights, the one on which the run was started; it has none",
            where="hand-over",
            fix="set engine.transfer=memory, or leave a GPU of that machine to the learner",
        )
    torch.cuda.set_device(number)
    return f"cuda:{number}"


def free_gpu(visible: str | None, count: int, taken: Collection[str]) -> int | None:
    """Number of the first GPU that this process sees and nobody has taken; None without one.

    Example:
        free_gpu("4,5", 2, taken=["4"]) → 1
    """
    names = visible.split(",") if visible else [str(number) for number in range(count)]
    return next((n for n, name in enumerate(names[:count]) if name not in taken), None)


def _answer(ref: ray.ObjectRef[dict[str, Any]]) -> dict[str, Any]:
    with _sorted():
        return ray.get(ref)


async def _awaited(ref: ray.ObjectRef[None]) -> None:
    with _sorted():
        await cast(Awaitable[None], ref)


@contextmanager
def _sorted() -> Iterator[None]:
    """Failures of a courier as errors of ours."""
    try:
        yield
    except RayTaskError as error:
        raise sort_failure(error.cause, "sending weights") from None
    except RayError as error:
        raise InfraError(
            f"the courier of a worker's weights was lost: {type(error).__name__}",
            where="hand-over",
            why=str(error),
        ) from None
