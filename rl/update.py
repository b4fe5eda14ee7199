"""How gradients are added up over passes and ranks and become an update, whatever wraps the model.

    passing(is_last): backward(loss) … → apply(rate, check)

Two kinds. `PlainUpdate` is torch's optimizer on one rank or behind DDP. `ZeroUpdate` is DeepSpeed's
engine: each rank keeps a part of the moments, with ZeRO-3 a part of the weights too. Both clip to
the same length, refuse what is not finite before a weight has moved, and read and write moments in
one format, so that a cut fits any number of ranks and either kind.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from ground.logprobs import LogprobModel
from rl.config import OptimizerSection
from rl.snapshot import restore

Check = Callable[[float], None]
"""Raises where loss or gradient norm is not finite."""


class Update(Protocol):
    """What the learner asks of either kind."""

    module: nn.Module
    """The wrapped model; its forward pass is the one that gradients are taken of."""
    splits_weights: bool
    """Ranks hold parts of the weights: whole ones exist only within `whole`, on all ranks."""
    splits_moments: bool
    """Ranks hold parts of the moments: `moments` is for all ranks together."""

    def stepping(self) -> AbstractContextManager[object]:
        """Around all passes of a step and `apply`; gradients are gone at its end."""
        ...

    def passing(self, *, is_last: bool) -> AbstractContextManager[object]:
        """Around a pass; ranks add up their gradients in the last one."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the pass's gradients; they are averaged over the ranks."""
        ...

    def apply(self, rate: Callable[[], float], check: Check) -> float:
        """Clip, check and update at a learning rate; returns the norm before clipping.

        Args:
            rate: asked once the numbers were found finite, and before anything has moved.
        """
        ...

    def whole(self) -> AbstractContextManager[object]:
        """While this lasts every rank has the whole weights, to read them."""
        ...

    def moments(self) -> dict[str, Tensor]:
        """CPU copies of AdamW's state, `<parameter number>.<name>`; none before the first step."""
        ...

    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Go back to saved weights and moments."""
        ...


def make_update(
    model: PreTrainedModel, accelerator: Accelerator, section: OptimizerSection
) -> Update:
    """Wrap a model as accelerate was told to."""
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=section.learning_rate,
        betas=section.betas,
        weight_decay=section.weight_decay,
    )
    plugin = accelerator.state.deepspeed_plugin
    if plugin is not None:
        plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": 1,  # our passes are of any size, and so is a step
            "gradient_accumulation_steps": 1,
            "gradient_clipping": section.max_grad_norm,
        }
    module, wrapped = accelerator.prepare(LogprobModel(model.train()), optimizer)
    if plugin is not None:
        return ZeroUpdate(module, model)
    return PlainUpdate(module, wrapped, model, accelerator, section.max_grad_norm)


class PlainUpdate:
    """torch's own optimizer; weights and moments are whole on every rank."""

    splits_weights = splits_moments = False

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        model: PreTrainedModel,
        accelerator: Accelerator,
        max_norm: float,
    ) -> None:
        self.module, self._optimizer, self._model = module, optimizer, model
        self._accelerator, self._max_norm = accelerator, max_norm

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """See `Update.stepping`."""
        try:
            # One whole step: unless told so, accelerate skips it when another trainer of this
            # process was stopped between two of its passes.
            with self._accelerator.accumulate(self.module):
                yield
        finally:
            self._optimizer.zero_grad()

    def passing(self, *, is_last: bool) -> AbstractContextManager[object]:
        """See `Update.passing`."""
        return nullcontext() if is_last else self._accelerator.no_sync(self.module)

    def backward(self, loss: Tensor) -> None:
        """See `Update.backward`."""
        self._accelerator.backward(loss)

    def apply(self, rate: Callable[[], float], check: Check) -> float:
        """See `Update.apply`."""
        norm = self._accelerator.clip_grad_norm_(self.module.parameters(), self._max_norm)
        norm = float(cast(Tensor, norm))
        check(norm)
        learning_rate = rate()
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate
        self._optimizer.step()
        return norm

    def whole(self) -> AbstractContextManager[object]:
        """They always are."""
        return nullcontext()

    def moments(self) -> dict[str, Tensor]:
        """See `Update.moments`."""
        return {
            f"{number}.{name}": value.detach().to("cpu", copy=True)
            for number, moments in self._optimizer.state_dict()["state"].items()
            for name, value in moments.items()
        }

    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """See `Update.load`."""
        restore(self._model, weights)
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": by_number(moments), "param_groups": groups})


class ZeroUpdate:
    """DeepSpeed's engine, driven pass by pass instead of through accelerate.

    accelerate's wrapper updates inside its last backward pass, before anybody could say no; here
    `apply` is a call of its own. The engine itself leaves all weights alone when the norm of the
    gradient is not finite.
    """

    splits_moments = True

    def __init__(self, engine: nn.Module, model: PreTrainedModel) -> None:
        from deepspeed import DeepSpeedEngine

        assert isinstance(engine, DeepSpeedEngine)
        self.module = self._engine = engine
        self._model, self._zero = model, engine.optimizer
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
        check(0.0)
        learning_rate = rate()
        for group in self._zero.param_groups:
            group["lr"] = learning_rate
        self._engine.step()
        norm = math.inf if self._zero.overflow else float(self._engine.get_global_grad_norm())
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
        for number, parameter in enumerate(self._model.parameters()):
            tensors[f"{number}.step"] = step.detach().to("cpu", copy=True)
            for name in ("exp_avg", "exp_avg_sq"):
                full = cast(Tensor, safe_get_full_optimizer_state(parameter, name))
                tensors[f"{number}.{name}"] = full.detach().to("cpu", copy=True)
        return tensors

    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """See `Update.load`."""
        self._load_weights(weights)
        if not moments:
            return
        for flat in self._flat_parts():
            zeros = {name: torch.zeros_like(flat) for name in ("exp_avg", "exp_avg_sq")}
            self._zero.optimizer.state[flat] = {"step": moments["0.step"].clone(), **zeros}
        if not self.splits_weights:
            self._zero._lazy_init_hp_params_optimizer_state()
        for number, parameter in enumerate(self._model.parameters()):
            for name in ("exp_avg", "exp_avg_sq"):
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
            for parameter in parameters:
                self._set(parameter, parameter.detach())

    def _set(self, parameter: nn.Parameter, value: Tensor, name: str | None = None) -> None:
        """Put this rank's part of a whole tensor into the optimizer's weight or moment."""
        from deepspeed import utils

        if not self.splits_weights:
            utils.safe_set_full_optimizer_state(parameter, value.to(parameter.device), name)
            return
        part = _part(value.to(parameter.device), parameter.ds_tensor.numel())
        if name is None:
            utils.safe_set_local_fp32_param(parameter, part)
        else:
            utils.safe_set_local_optimizer_state(parameter, part, name)

    def _flat_parts(self) -> list[Tensor]:
        """This rank's parts of all weights, strung together, as the optimizer knows them."""
        if self.splits_weights:
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)


def by_number(moments: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """`{"0.step": …}` → `{0: {"step": …}}`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    return state


def _part(value: Tensor, size: int) -> Tensor:
    """This rank's equal share of a tensor; the last rank's is filled up with zeros."""
    rank, num_ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    flat = value.flatten()
    padded = torch.cat([flat, flat.new_zeros(size * num_ranks - flat.numel())])
    return padded[rank * size : (rank + 1) * size]
