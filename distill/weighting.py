"""How soft and hard targets share a token: L = (1 - a) CE(label) + a KL(teacher || student).

Every rule answers with a for each token, [B, T]; 0 where the stored targets do not support the
token's label. `aligned` alone learns: between steps it is told, per capability, what the tokens of
the last batches would have gained from more of the teacher (distill/signal.py).

B rows, T tokens, N tokens in a flat list, K knots.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
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

    def observe(self, capability: str, gains_N: Tensor, entropy_N: Tensor) -> None:
        """Learn what the last batches' tokens of a capability would gain from more of the teacher.

        Args:
            gains_N: of supported tokens, from `distill.signal.token_gains`.
            entropy_N: of the teacher at these tokens.
        """
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

    def observe(self, capability: str, gains_N: Tensor, entropy_N: Tensor) -> None:
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
    """Per capability a curve over the teacher's entropy, moved by what held-out rows can tell.

    At each knot of the curve, with the gains of the tokens near it (distill/signal.py),

        z = mean gain / its standard error
        share <- clip(share + rate * clip(z + trust, -1, 1), low, high)

    so that a share moves at full rate where the evidence is plain, whatever the gains' size, and
    towards the teacher where there is none. It is a curve and not one share, since teachers fail by
    kind of token: where they are sure of a wrong fact, or flat where there is something to know.

    Every rank must be told the same observations, or the state of one be given to all.

    Example:
        start 0.7, rate 0.1, trust 1, one knot: gains of mean -3 and standard error 1 → z = -3 → 0.6
    """

    def __init__(self, section: AlignedShare) -> None:
        self._section = section
        self._curves: dict[str, list[float]] = {}
        self._shares: dict[str, float] = {}

    @property
    def observe_every(self) -> int:
        return self._section.every

    @property
    def shares(self) -> Mapping[str, float]:
        return dict(self._shares)

    @property
    def curves(self) -> Mapping[str, Sequence[float]]:
        """Capability → share at each knot."""
        return {name: tuple(curve) for name, curve in self._curves.items()}

    def weights(
        self, step: int, capability_B: Sequence[str], entropy_BT: Tensor, supported_BT: Tensor
    ) -> Tensor:
        curve_BK = torch.tensor([self._curve(name) for name in capability_B])
        parts_BTK = parts_of(entropy_BT, self._section.knots)
        share_BT = (parts_BTK * curve_BK.to(entropy_BT.device)[:, None, :]).sum(-1)
        return share_BT * supported_BT

    def observe(self, capability: str, gains_N: Tensor, entropy_N: Tensor) -> None:
        section = self._section
        parts_NK = parts_of(entropy_N, section.knots)
        z_K = _evidence(gains_N, parts_NK)
        pushes = (z_K + section.trust).clamp(-1, 1).tolist()
        moved = [
            min(max(share + section.rate * push, section.low), section.high)
            for share, push in zip(self._curve(capability), pushes, strict=True)
        ]
        self._curves[capability] = moved
        mean_K = parts_NK.mean(0).tolist()
        self._shares[capability] = sum(a * b for a, b in zip(moved, mean_K, strict=True))

    def state_dict(self) -> dict[str, object]:
        return {"curves": {name: list(curve) for name, curve in self._curves.items()}} | {
            "shares": dict(self._shares)
        }

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        curves, shares = state["curves"], state["shares"]
        assert isinstance(curves, Mapping) and isinstance(shares, Mapping)
        self._curves = {
            str(name): [float(each) for each in curve] for name, curve in curves.items()
        }
        self._shares = {str(name): float(share) for name, share in shares.items()}

    def _curve(self, capability: str) -> list[float]:
        return self._curves.get(capability, [self._section.start] * len(self._section.knots))


def parts_of(entropy: Tensor, knots: Sequence[float]) -> Tensor:
    """How much of each knot a token has: linear between two of them, in all 1; [..., K].

    Example:
        knots (0, 1, 2.5): entropy 0.25 → (0.75, 0.25, 0), 1.75 → (0, 0.5, 0.5), 4 → (0, 0, 1)
    """
    entropy = entropy.float()
    above = [torch.ones_like(entropy)]
    for low, high in pairwise(knots):
        above.append(((entropy - low) / (high - low)).clamp(0, 1))
    above.append(torch.zeros_like(entropy))
    return torch.stack([here - beyond for here, beyond in pairwise(above)], -1)


def _evidence(gains_N: Tensor, parts_NK: Tensor) -> Tensor:
    """Mean gain at each knot over its standard error, [K]; 0 where there is nothing to go by."""
    voices_NK = gains_N.float()[:, None] * parts_NK
    error_K = voices_NK.std(0, correction=0) / math.sqrt(max(len(gains_N), 1))
    return (voices_NK.mean(0) / error_K).nan_to_num(0.0, 0.0, 0.0)
