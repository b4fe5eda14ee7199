"""How gradients are added up over passes and ranks and become an update, whatever wraps the model.

    passing(is_last): backward(loss) … → apply(rate, check)

Two kinds. `PlainUpdate` is torch's optimizer on one rank or behind DDP. `ZeroUpdate` (rl/zero.py)
is DeepSpeed's engine: each rank keeps a part of the moments, with ZeRO-3 of the weights too. Both
clip to the same length, refuse what is not finite before a weight has moved, and read and write
moments in one format, so that a cut fits any number of ranks and either kind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Protocol, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ground.adapter import Adapter
from ground.logprobs import LogprobModel
from ground.model import freeze_unreached
from rl.config import OptimizerSection
from rl.guards import Check
from rl.snapshot import require_moments, restore
from rl.zero import ZeroUpdate


class Update(Protocol):
    """What the learner asks of either kind."""

    @property
    def module(self) -> nn.Module:
        """The wrapped model; its forward pass is the one that gradients are taken of."""
        ...

    @property
    def splits_weights(self) -> bool:
        """Ranks hold parts of the weights: whole ones exist only within `whole`, on all ranks."""
        ...

    @property
    def splits_moments(self) -> bool:
        """Ranks hold parts of the moments: `moments` is for all ranks together."""
        ...

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
            rate: asked once, after the first check and before anything has moved.
            check: told the norm once it is known, and None before it where an update of this kind
                measures it only as it updates. A norm that is not finite moves nothing either way.
        """
        ...

    def whole(self) -> AbstractContextManager[object]:
        """While this lasts every rank has the whole weights, to read them."""
        ...

    def moments(self) -> dict[str, Tensor]:
        """CPU copies of AdamW's state, `<number>.<name>`; none before the first step.

        Numbers count the parameters that are trained, in the model's order, from 0.
        """
        ...

    def load(self, weights: Mapping[str, Tensor], moments: Mapping[str, Tensor]) -> None:
        """Go back to saved weights and moments.

        Raises:
            DataError: they are not of what this model trains.
        """
        ...


def make_update(
    logprobs: LogprobModel,
    accelerator: Accelerator,
    section: OptimizerSection,
    adapter: Adapter | None = None,
) -> Update:
    """Wrap a model as accelerate was told to; only what is not frozen has moments.

    Args:
        logprobs: the model as it is trained; whatever of it text does not reach is frozen here.
        adapter: what is trained of it, if that is not all.
    """
    model = logprobs.model
    freeze_unreached(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        trained,
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
    module, wrapped = accelerator.prepare(logprobs, optimizer)
    if plugin is not None:
        return ZeroUpdate(module, model, trained)
    back = adapter.restore if adapter else partial(restore, model)
    return PlainUpdate(module, wrapped, trained, back, accelerator, section.max_grad_norm)


class PlainUpdate:
    """torch's own optimizer; weights and moments are whole on every rank."""

    splits_weights = splits_moments = False

    def __init__(
        self,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        trained: Sequence[nn.Parameter],
        restore: Callable[[Mapping[str, Tensor]], None],
        accelerator: Accelerator,
        max_norm: float,
    ) -> None:
        self.module, self._optimizer, self._restore = module, optimizer, restore
        self._trained = trained
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
        require_moments(moments, len(self._trained))
        self._restore(weights)
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": by_number(moments), "param_groups": groups})


def by_number(moments: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """`{"0.step": …}` → `{0: {"step": …}}`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in moments.items():
        number, name = key.split(".", 1)
        state.setdefault(int(number), {})[name] = value
    return state
