"""How soft and hard targets share a token: L = (1 - a) CE(label) + a KL(teacher || student).

Every rule answers with a for each token, [B, T]; 0 where the stored targets do not support the
token's label. `aligned` alone learns: between steps it is told, per capability, how the held-out
gradient stands to the change that the teacher brings (distill/signal.py).

B rows, T tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Protocol, assert_never

import torch
from torch import Tensor

from distill.config import (
    AlignedShare,
    EntropyShare,
    ScheduleShare,
    StaticShare,
    WeightingSection,
)


class Weighting(Protocol):
    """The share of the soft target, and what it learns from."""

    @property
    def observe_every(self) -> int:
        """Steps between two observations; 0 never asks for any."""
        ...

    @property
    def shares(self) -> Mapping[str, float]:
        """Share per capability as it stands, for the log; empty where none is kept."""
        ...

    def weights(
        self, step: int, capability_B: Sequence[str], entropy_BT: Tensor, supported_BT: Tensor
    ) -> Tensor:
        """Share of the soft target of each token, [B, T] in float32.

        Args:
            step: steps taken so far, from 0.
            capability_B: whose share a row follows.
            entropy_BT: of the teacher's distribution, in nats.
            supported_BT: whether the stored targets know the realised token.
        """
        ...

    def observe(self, capability: str, cosine: float) -> None:
        """Learn from cos(held-out gradient, change of the gradient per unit of the share)."""
        ...

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint keeps."""
        ...

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from `state_dict()`."""
        ...


def weighting_of(section: WeightingSection, *, num_steps: int, vocab_size: int) -> Weighting:
    """The rule that a recipe names, for a run of `num_steps` steps."""
    match section:
        case StaticShare():
            return Static(section)
        case ScheduleShare():
            return Schedule(section, num_steps)
        case EntropyShare():
            return Entropy(section, vocab_size)
        case AlignedShare():
            return Aligned(section)
        case _:
            assert_never(section)


class _Unlearned:
    """A rule that follows from step and token alone."""

    observe_every = 0

    @property
    def shares(self) -> Mapping[str, float]:
        return {}

    def observe(self, capability: str, cosine: float) -> None:
        """Nothing is learned."""

    def state_dict(self) -> dict[str, object]:
        return {}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """There is no state."""


class Static(_Unlearned):
    """One share for all tokens.

    Example:
        share 0.5, supported [yes, no] → [0.5, 0]
    """

    def __init__(self, section: StaticShare) -> None:
        self._share = section.share

    def weights(
        self, step: int, capability_B: Sequence[str], entropy_BT: Tensor, supported_BT: Tensor
    ) -> Tensor:
        return self._share * supported_BT.float()


class Schedule(_Unlearned):
    """A trapezium over the run.

    Example:
        peak 0.9, warmup 0.1, decay 0.3 of 100 steps → 0 at step 0, 0.45 at 5, 0.9 from 10 to 70,
        0.45 at 85, 0 at 100
    """

    def __init__(self, section: ScheduleShare, num_steps: int) -> None:
        self._section = section
        self._num_steps = num_steps

    def weights(
        self, step: int, capability_B: Sequence[str], entropy_BT: Tensor, supported_BT: Tensor
    ) -> Tensor:
        return self.share(step) * supported_BT.float()

    def share(self, step: int) -> float:
        """The share that all tokens of a step have."""
        section, done = self._section, step / self._num_steps
        rise = done / section.warmup if section.warmup else 1.0
        fall = (1 - done) / section.decay if section.decay else 1.0
        return section.peak * max(0.0, min(1.0, rise, fall))


class Entropy(_Unlearned):
    """Shares in proportion to the teacher's entropy over that of the uniform distribution.

    Example:
        peak 0.9, vocabulary 16: entropy log 4 → 0.45
    """

    def __init__(self, section: EntropyShare, vocab_size: int) -> None:
        self._scale = section.peak / math.log(vocab_size)

    def weights(
        self, step: int, capability_B: Sequence[str], entropy_BT: Tensor, supported_BT: Tensor
    ) -> Tensor:
        return self._scale * entropy_BT.float() * supported_BT


class Aligned:
    """Per capability: share ← clip(share + rate · cosine).

    A positive cosine says that a step with more of the teacher lowers the held-out loss more.

    Example:
        start 0.7, rate 0.1: cosine 0.5 → 0.75; then -1 → 0.65; a capability never seen → 0.7
    """

    def __init__(self, section: AlignedShare) -> None:
        self._section = section
        self._shares: dict[str, float] = {}

    @property
    def observe_every(self) -> int:
        return self._section.every

    @property
    def shares(self) -> Mapping[str, float]:
        return dict(self._shares)

    def weights(
        self, step: int, capability_B: Sequence[str], entropy_BT: Tensor, supported_BT: Tensor
    ) -> Tensor:
        shares_B = [self._shares.get(name, self._section.start) for name in capability_B]
        return torch.tensor(shares_B, device=entropy_BT.device)[:, None] * supported_BT

    def observe(self, capability: str, cosine: float) -> None:
        section = self._section
        moved = self._shares.get(capability, section.start) + section.rate * cosine
        self._shares[capability] = min(max(moved, section.low), section.high)

    def state_dict(self) -> dict[str, object]:
        return {"shares": dict(self._shares)}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        shares = state["shares"]
        assert isinstance(shares, Mapping)
        self._shares = {str(name): float(share) for name, share in shares.items()}
