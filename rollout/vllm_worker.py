"""How vLLM's workers take new weights: from memory, and also where vLLM itself would keep old ones.

Runs in vLLM's processes, mixed into its worker class (`worker_extension_cls`).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from tqdm import tqdm
from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.platforms import current_platform

import rollout.vllm_transfer  # noqa: F401  vLLM looks its backends up by name
from rollout.checksums import views
from rollout.layout import Layout, Place
from rollout.shared_memory import map_buffer

tqdm.set_lock(threading.RLock())
"""Of itself tqdm, with which vLLM loads weights, would take one between processes: a file in shared
memory that stays when vLLM's process is killed."""

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker

    Base = Worker
else:
    Base = object


class WeightTaker(Base):
    """What our engine asks of each of vLLM's workers."""

    def put_away_rendezvous(self) -> None:
        """Remove the file by which vLLM's workers have found each other; all of them have."""
        path = self.distributed_init_method
        if path.startswith("file://"):
            Path(path.removeprefix("file://")).unlink(missing_ok=True)

    def take_weights(self, path: str, size: int, places: Mapping[str, Any]) -> None:
        """Swap in the tensors that lie in somebody's memory, under a checkpoint's names.

        Args:
            path: where the memory is opened.
            places: offset, shape and type of each tensor.
        """
        layout = Layout({name: Place(*place) for name, place in places.items()}, size)
        memory = map_buffer(path, size, writable=False)
        self.forget_packed_experts()
        self.reload_weights(weights_iterator=iter(views(layout, memory).items()))
        self.pack_heads()

    def receive_weights(self, manifest: dict[str, Any]) -> None:
        """Swap in the tensors that are broadcast, under a checkpoint's names.

        Args:
            manifest: names, types and shapes, in the order in which they come.
        """
        self.forget_packed_experts()
        self.start_weight_update()
        self.update_weights(manifest)
        self.finish_weight_update()
        self.pack_heads()

    def forget_packed_experts(self) -> None:
        """Have the CPU kernel pack the experts' weights anew when they are loaded.

        vLLM 0.32 packs them when it builds the kernel, and keeps a kernel that it has: without
        this a mixture of experts goes on with the old experts and says nothing.
        """
        for method in _expert_methods(self.model_runner.get_model()):
            if method.unquantized_backend is UnquantizedMoeBackend.CPU:
                method.moe_kernel = None

    def pack_heads(self) -> None:
        """Have the CPU kernel pack the LM head anew.

        vLLM 0.32 does so when the head itself is loaded. One that is tied to the embeddings never
        is, and would go on with the old ones.
        """
        for layer in self.model_runner.get_model().modules():
            if isinstance(layer, ParallelLMHead) and current_platform.is_cpu():
                layer.quant_method.process_weights_after_loading(layer)


def _expert_methods(model: nn.Module) -> list[UnquantizedFusedMoEMethod]:
    return [
        layer.quant_method
        for layer in model.modules()
        if isinstance(layer, RoutedExperts)
        and isinstance(layer.quant_method, UnquantizedFusedMoEMethod)
    ]
