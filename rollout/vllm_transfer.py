"""Weights that are broadcast into vLLM: both ends of vLLM's own weight transfer, by NCCL or gloo.

    sender (rank 0, a courier's) ─ one group ─▶ receivers (the ranks behind it, vLLM's workers)

NCCL goes from GPU to GPU and is vLLM's own. gloo, which vLLM has not, goes through processors: by
it everything around the group runs on machines without a GPU.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Awaitable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.utils import stateless_init_torch_distributed_process_group
from vllm.distributed.weight_transfer.base import (
    ParamMeta,
    TrainerWeightTransferEngine,
    VLLMWeightSyncClient,
    WeightSource,
)
from vllm.distributed.weight_transfer.factory import (
    WeightTransferEngineFactory,
    WeightTransferTrainerFactory,
)
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import (
    NCCLTrainerInitInfo,
    NCCLWeightTransferEngine,
    NCCLWeightTransferUpdateInfo,
)
from vllm.v1.engine.exceptions import EngineDeadError

from ground.errors import InfraError

_GROUP_SECONDS = 600.0
"""Until all have come to a group, and until a tensor has come through it; as long as an order to
vLLM may take. `fleet.publish_deadline_seconds` ends it sooner where that is less."""
_LAST_SECONDS = 5.0
"""What one end of a broadcast has to say more comes within this, after the other has failed."""
_PACKED_BYTES = 128 << 20
"""NCCL sends tensors packed into buffers of this size; some six of them are in use at a time, on
either side."""


class GlooReceiver(NCCLWeightTransferEngine):
    """vLLM's receiver of whole weights, with a gloo group in the place of NCCL's."""

    def init_transfer_engine(self, init_info: NCCLWeightTransferInitInfo) -> None:
        """Join the group."""
        assert init_info.master_address and init_info.master_port
        self._group = _gloo(
            init_info.master_address,
            init_info.master_port,
            init_info.rank_offset + self.parallel_config.rank,
            init_info.world_size,
        )

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Load what is broadcast; vLLM's own asks for an accelerator."""
        self.receive_weights(self.parse_update_info(update_info))
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: NCCLWeightTransferUpdateInfo) -> None:
        """Load tensors as they come."""
        model: Any = self.model
        model.load_weights(self._arriving(update_info))

    def _arriving(self, announced: NCCLWeightTransferUpdateInfo) -> Iterator[tuple[str, Tensor]]:
        kinds = zip(announced.names, announced.dtype_names, announced.shapes, strict=True)
        for name, dtype, shape in kinds:
            tensor = torch.empty(shape, dtype=getattr(torch, dtype))
            self._group.broadcast(_bytes_of(tensor), 0).wait()
            yield name, tensor


@dataclass
class GlooSenderInfo(NCCLTrainerInitInfo):
    """What opens a `GlooSender`: as for NCCL, and the socket that already listens."""

    backend: ClassVar[str] = "gloo"

    listening: socket.socket | None = None


class GlooSender(TrainerWeightTransferEngine[GlooSenderInfo]):
    """vLLM's sender of whole weights, with a gloo group in the place of NCCL's."""

    init_info_cls = GlooSenderInfo

    def __init__(
        self, *, client: VLLMWeightSyncClient, source: WeightSource, group: ProcessGroup
    ) -> None:
        super().__init__(client=client, source=source)
        self._group = group

    @classmethod
    def trainer_init(
        cls,
        init_info: GlooSenderInfo,
        *,
        client: VLLMWeightSyncClient,
        source: WeightSource | None = None,
    ) -> Self:
        """Open the group; returns when all have come."""
        assert source is not None
        at = init_info.master_address, init_info.master_port
        group = _gloo(*at, 0, init_info.world_size, init_info.listening)
        return cls(client=client, source=source, group=group)

    def send_weights(self) -> None:
        """Broadcast all tensors of the source."""
        assert self.source is not None
        for _, tensor in self.source:
            self._group.broadcast(_bytes_of(tensor.contiguous()), 0).wait()


class Announced(WeightSource):
    """A version's tensors under a checkpoint's names, to be sent once.

    Example:
        source = Announced(); source.tensors = form.saved(tensors); source.manifest()
    """

    def __init__(self, device: str = "cpu") -> None:
        self._device = device
        self.tensors: Mapping[str, Tensor] = {}

    def let_go(self) -> None:
        """They were sent, and are not kept for that."""
        self.tensors = {}
        if self._device != "cpu":
            torch.cuda.empty_cache()

    def metadata(self) -> list[ParamMeta]:
        """Name, type and shape of each."""
        return [ParamMeta(name, t.dtype, tuple(t.shape)) for name, t in self.tensors.items()]

    def manifest(self) -> dict[str, Any]:
        """The same as vLLM's receivers want it."""
        return {
            "names": list(self.tensors),
            "dtype_names": [str(t.dtype).removeprefix("torch.") for t in self.tensors.values()],
            "shapes": [list(t.shape) for t in self.tensors.values()],
        }

    def __iter__(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.tensors.items():
            yield name, tensor.to(self._device)


class _Unasked:
    """A sender's way to its receivers, who know by themselves: their engine drives them."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Nothing."""

    def start_weight_update(self) -> None:
        """Nothing."""

    def update_weights(self, update_info: object) -> None:
        """Nothing."""

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """Nothing."""


@dataclass
class Meeting:
    """Where a group meets: the sender listens already, so that nobody else takes the port.

    Example:
        meeting = Meeting.at("10.0.0.7", "gloo", num_receivers=2)
    """

    address: str
    backend: str
    num_ranks: int
    listening: socket.socket

    @classmethod
    def at(cls, address: str, backend: str, num_receivers: int) -> Meeting:
        """Begin to listen at an address of this machine."""
        listening = socket.create_server((address, 0))
        return cls(address, backend, 1 + num_receivers, listening)

    def invitation(self) -> dict[str, Any]:
        """What vLLM's receivers join with."""
        return {
            "master_address": self.address,
            "master_port": self._port,
            "rank_offset": 1,
            "world_size": self.num_ranks,
            "packed": True,
            "packed_buffer_size_bytes": _PACKED_BYTES,
        }

    def sender(self, source: Announced) -> TrainerWeightTransferEngine[Any]:
        """Meet them; returns when all have come."""
        port = self._port
        if self.backend == "gloo":
            info = GlooSenderInfo(
                self.address, port, self.num_ranks, rank=0, listening=self.listening
            )
        else:
            with closing(self.listening):  # vLLM listens there itself
                info = NCCLTrainerInitInfo(
                    *(self.address, port, self.num_ranks),
                    packed_buffer_size_bytes=_PACKED_BYTES,
                    rank=0,
                )
        return WeightTransferTrainerFactory.trainer_init(info, client=_Unasked(), source=source)

    @property
    def _port(self) -> int:
        return self.listening.getsockname()[1]


def transfer_config(transfer: str) -> WeightTransferConfig | None:
    """What vLLM is started with; None where its weights come through memory."""
    return None if transfer == "memory" else WeightTransferConfig(backend=transfer)


async def both_ends(
    sender: Awaitable[None], receiver: Awaitable[None], last_seconds: float = _LAST_SECONDS
) -> None:
    """Wait for both ends of a broadcast.

    When one end is lost the other fails as well, and often sooner: so after the first failure the
    other end has a moment to say more. vLLM's death counts most, then that the sender was lost.

    Raises:
        EngineDeadError: vLLM has died.
        InfraError: the sender was lost.
    """
    ends = [asyncio.ensure_future(sender), asyncio.ensure_future(receiver)]
    try:
        _, pending = await asyncio.wait(ends, return_when=asyncio.FIRST_EXCEPTION)
        if pending:
            await asyncio.wait(pending, timeout=last_seconds)
        told = [end.exception() for end in reversed(ends) if end.done() and not end.cancelled()]
    finally:
        for end in ends:
            end.cancel()
    errors = sorted(filter(None, told), key=_weight)
    if errors:
        raise errors[0]


def _weight(error: BaseException) -> int:
    """Place among the causes of a broadcast that has failed."""
    if isinstance(error, EngineDeadError):
        return 0
    return 1 if isinstance(error, InfraError) else 2


def _gloo(
    address: str, port: int, rank: int, num_ranks: int, listening: socket.socket | None = None
) -> ProcessGroup:
    group = stateless_init_torch_distributed_process_group(
        *(address, port, rank, num_ranks, "gloo"),
        listen_socket=listening,
        timeout=timedelta(seconds=_GROUP_SECONDS),
    )
    assert isinstance(group, ProcessGroup)
    return group


def _bytes_of(tensor: Tensor) -> Tensor:
    """The same memory as bytes: gloo does not know all types of numbers."""
    return tensor.reshape(-1).view(torch.uint8)


WeightTransferEngineFactory.register_engine("gloo", GlooReceiver)
WeightTransferTrainerFactory.register_engine("gloo", GlooSender)
