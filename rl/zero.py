"""An update behind DeepSpeed's ZeRO: ranks hold parts of the moments, with stage 3 of the weights.

The one place that knows DeepSpeed's optimizers; held to what we assume by tests/test_rl_ranks.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rl.guards import Check
from rl.snapshot import MOMENTS, require_moments, restore


class _Split(Protocol):
    """What ZeRO-3 makes of a parameter."""

    ds_tensor: Tensor
    """This rank's part, filled up to the length of the other ranks'."""


class _Optimizer(Protocol):
    """What we use of DeepSpeed's ZeRO optimizers."""

    optimizer: torch.optim.Optimizer
    """AdamW over this rank's parts."""
    param_groups: list[dict[str, object]]
    overflow: bool
    """The last step was left out, because the norm was not finite."""
    single_partition_of_fp32_groups: Sequence[Tensor]
    """This rank's parts of all weights, strung together; stages 1 and 2."""
    fp32_partitioned_groups_flat: Sequence[Tensor]
    """The same of stage 3."""

    def refresh_fp32_params(self) -> None: ...
    def _lazy_init_hp_params_optimizer_state(self) -> None: ...


class ZeroUpdate:
    """DeepSpeed's engine, driven pass by pass instead of through accelerate.

    accelerate's wrapper updates inside its last backward pass, before anybody could say no; here
    `apply` is a call of its own. The engine itself leaves all weights alone when the norm of the
    gradient is not finite.
    """

    splits_moments = True

    def __init__(
        self, engine: nn.Module, model: PreTrainedModel, trained: Sequence[nn.Parameter]
    ) -> None:
        from deepspeed import DeepSpeedEngine

        assert isinstance(engine, DeepSpeedEngine)
        self.module: nn.Module = engine
        self._engine, self._model, self._trained = engine, model, trained
        self._zero = cast(_Optimizer, engine.optimizer)
        self.splits_weights = engine.zero_optimization_stage() == 3

    def stepping(self) -> AbstractContextManager[object]:
        """The engine drops its gradients itself."""
        return nullcontext()

    @contextmanager
    def passing(self, *, is_last: bool) -> Iterator[None]:
        """See `Update.passing`."""
        self._engine.set_gradient_accumulation_boundary(is_boundary=is_last)
        yield

    def backward(self, loss: Tensor) -> None:
        """See `Update.backward`."""
        self._engine.backward(loss, scale_wrt_gas=False)

    def apply(self, rate: Callable[[], float], check: Check) -> float:
        """See `Update.apply`."""
        check(None)
        learning_rate = rate()
        for group in self._zero.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        norm = (
            math.inf if self._zero.overflow else float(self._engine.get_global_grad_norm() or 0.0)
        )
        check(norm)
        return norm

    def whole(self) -> AbstractContextManager[object]:
        """See `Update.whole`."""
        import deepspeed

        if not self.splits_weights:
            return nullcontext()
        return deepspeed.zero.GatheredParameters(list(self._model.parameters()))

    def moments(self) -> dict[str, Tensor]:
        """See `Update.moments`."""
        from deepspeed.utils import safe_get_full_optimizer_state

        state = self._zero.optimizer.state
        if not state:
            return {}
        step = next(iter(state.values()))["step"]
        tensors: dict[str, Tensor] = {}
        for number, parameter in enumerate(self._trained):
            tensors[f"{number}.step"] = step.detach().to("cpu", copy=True)
            for name in MOMENTS:
                full = cast(Tensor, safe_get_full_optimizer_state(parameter, name))
                tensors[f"{number}.{name}"] = full.detach().to("cpu", copy=True)
        return tensors

    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """See `Update.load`."""
        require_moments(moments, len(self._trained))
        self._load_weights(weights)
        if not moments:
            return
        for flat in self._flat_parts():
            zeros = {name: torch.zeros_like(flat) for name in MOMENTS}
            self._zero.optimizer.state[flat] = {"step": moments["0.step"].clone(), **zeros}
        if not self.splits_weights:
            self._zero._lazy_init_hp_params_optimizer_state()
        for number, parameter in enumerate(self._trained):
            for name in MOMENTS:
                self._set(parameter, moments[f"{number}.{name}"], name)

    def _load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """The weights, and the copies of them that the optimizer works on."""
        import deepspeed

        if not self.splits_weights:
            restore(self._model, weights)
            self._zero.refresh_fp32_params()
            return
        parameters = list(self._model.parameters())
        with deepspeed.zero.GatheredParameters(parameters, modifier_rank=0):
            restore(self._model, weights)
            for parameter in self._trained:
                self._set(parameter, parameter.detach())

    def _set(self, parameter: nn.Parameter, value: Tensor, name: str | None = None) -> None:
        """Put this rank's part of a whole tensor into the optimizer's weight or moment."""
        from deepspeed import utils

        if not self.splits_weights:
            utils.safe_set_full_optimizer_state(parameter, value.to(parameter.device), name)
            return
        own = cast(_Split, parameter).ds_tensor
        part = _part(value.to(parameter.device), own.numel())
        if name is None:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, name)

    def _flat_parts(self) -> list[Tensor]:
        """This rank's parts of all weights, strung together, as the optimizer knows them."""
        if self.splits_weights:
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)


def _part(value: Tensor, size: int) -> Tensor:
    """This rank's equal share of a tensor; the last rank's is filled up with zeros."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    flat = value.flatten()
    padded = torch.cat([flat, flat.new_zeros(size * num_ranks - flat.numel())])
    return padded[rank * size : (rank + 1) * size]
