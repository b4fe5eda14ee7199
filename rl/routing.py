"""How evenly a mixture of experts is used: a gauge against routers that collapse.

The policy loss has no balancing term: RL moves a router little, and what it does is to be seen.
E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.models.llama4.modeling_llama4 import Llama4Router


class RouterLoad:
    """Counts the tokens that each expert of each layer gets while it is told to.

    Example:
        load = RouterLoad(model)
        with load.counting(is_token_BT):
            model(tokens_BT)
        load.gauges() == {"experts_idle": 0, "expert_share_max": 0.31}
    """

    def __init__(self, model: nn.Module) -> None:
        routers = [module for module in model.modules() if isinstance(module, Llama4Router)]
        self._counts = [torch.zeros(router.num_experts, dtype=torch.long) for router in routers]
        self._mask_N: Tensor | None = None
        for layer, router in enumerate(routers):
            router.register_forward_hook(self._hook(layer))

    @contextmanager
    def counting(self, is_token_BT: Tensor) -> Iterator[None]:
        """Count the tokens of the forward passes within; padding is left out."""
        self._mask_N = is_token_BT.flatten()
        try:
            yield
        finally:
            self._mask_N = None

    def gauges(self, add_up: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Experts without a token, and the largest share of a layer's tokens; begins anew.

        Args:
            add_up: sums a tensor over the ranks.
        """
        if not self._counts:
            return {}
        layers = [add_up(counts_E) for counts_E in self._counts]
        for counts_E in self._counts:
            counts_E.zero_()
        shares = [float(counts_E.max() / counts_E.sum().clamp(min=1)) for counts_E in layers]
        return {
            "experts_idle": sum(int((counts_E == 0).sum()) for counts_E in layers),
            "expert_share_max": max(shares),
        }

    def _hook(self, layer: int) -> Callable[[nn.Module, object, tuple[Tensor, Tensor]], None]:
        def count(module: nn.Module, given: object, result: tuple[Tensor, Tensor]) -> None:
            del module, given
            if self._mask_N is not None:
                # A sigmoid of -inf is exactly 0: that is how the router says "not chosen".
                chosen_NE = result[0].detach() > 0
                counts_E = chosen_NE[self._mask_N].sum(0)
                self._counts[layer] = self._counts[layer].to(counts_E.device) + counts_E

        return count
