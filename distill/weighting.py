"""How soft and hard targets share a token: L = (1 - a) CE(label) + a KL(teacher || student).

In RL there is no hard target, and a is the weight of the soft loss beside the policy's
(rl/agreement.py has the rule that learns there).

Every rule answers with a for each token, [B, T]; 0 where the stored targets do not support the
token's label. In SFT `aligned` alone learns: between steps it is told, per capability, what the
tokens of the last batches gain from either target (distill/signal.py).

B rows, T tokens, N tokens in a flat list, K knots.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from distill.signal import Gains


class Weighting(Protocol):
    """The share of the soft target, or its weight."""

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

    def state_dict(self) -> dict[str, object]:
        """What a checkpoint keeps."""
        ...

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from `state_dict()`."""
        ...


class HeldoutWeighting(Weighting, Protocol):
    """One that held-out rows may be asked for."""

    @property
    def observe_every(self) -> int:
        """Steps between two observations; 0 never asks for any."""
        ...

    @property
    def shares(self) -> Mapping[str, float]:
        """Share per capability as it stands, for the log; empty where none is kept."""
        ...

    def observe(self, step: int, capability: str, gains: Gains, entropy_N: Tensor) -> None:
        """Learn what the last batches' tokens of a capability gain from their targets.

        Args:
            step: steps taken so far.
            gains: of supported tokens, from `distill.signal.token_gains`.
            entropy_N: of the teacher at these tokens.
        """
        ...


def weighting_of(section: WeightingSection, *, num_steps: int, vocab_size: int) -> HeldoutWeighting:
    """The rule that a recipe names, for a run of `num_steps` steps."""
    match section:
        case StaticShare():
            return Static(section)
        case ScheduleShare():
            return Schedule(section, num_steps)
        case EntropyShare():
            return Entropy(section, vocab_size)
        case AlignedShare():
            return Aligned(section, num_steps)
        case _:
            assert_never(section)


class _Unlearned:
    """A rule that follows from step and token alone."""

    observe_every = 0

    @property
    def shares(self) -> Mapping[str, float]:
        return {}

    def observe(self, step: int, capability: str, gains: Gains, entropy_N: Tensor) -> None:
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

    At each knot of the curve, with the gains (distill/signal.py) of the tokens near it, in S steps:

        x = mean of (soft gain - w * hard gain), w from `labels_from` at step 0 to 1 at step S
        evidence = average of x / root of average of x squared      both decaying with `memory`
        share <- clip(share + rate * clip(evidence + trust, -1, 1), low, high)

    *Teacher first.* In the beginning the teacher has the word for as long as it lowers the held-out
    loss at all, in the end only where it lowers it more than the labels do. What labels can teach
    they teach in a few late steps as well; given early and often they are learned by heart, which
    the gradients see only when it has happened.

    The evidence is between -1 and 1 whatever the size of the gains, and near 0 where they change
    sign from one observation to the next. It is a curve and not one share since teachers fail by
    kind of token: where they are sure of a wrong fact, or flat where there is something to know.

    Rule and defaults were frozen before the worlds of benchmarks/distill_worlds.py were drawn that
    they are judged by.

    Every rank must be told the same observations, or be given the state of one.

    Example:
        start 0.7, rate 0.2, trust 0.3, one knot, at step 0: soft gains of mean -3 and no spread →
        evidence -1 → share 0.56
    """

    def __init__(self, section: AlignedShare, num_steps: int) -> None:
        self._section, self._num_steps = section, num_steps
        self._seen: dict[str, _Seen] = {}
        nothing = (0.0,) * len(section.knots)
        self._fresh = _Seen((section.start,) * len(nothing), section.start, nothing, nothing, 0.0)

    @property
    def observe_every(self) -> int:
        return self._section.every

    @property
    def shares(self) -> Mapping[str, float]:
        return {name: seen.share for name, seen in self._seen.items()}

    @property
    def curves(self) -> Mapping[str, Sequence[float]]:
        """Capability → share at each knot."""
        return {name: seen.curve for name, seen in self._seen.items()}

    def weights(
        self, step: int, capability_B: Sequence[str], entropy_BT: Tensor, supported_BT: Tensor
    ) -> Tensor:
        curve_BK = torch.tensor([self._of(name).curve for name in capability_B])
        curve_BK = curve_BK.reshape(len(capability_B), len(self._section.knots))
        parts_BTK = parts_of(entropy_BT, self._section.knots)
        share_BT = (parts_BTK * curve_BK.to(entropy_BT.device)[:, None, :]).sum(-1)
        return share_BT * supported_BT

    def observe(self, step: int, capability: str, gains: Gains, entropy_N: Tensor) -> None:
        if not len(entropy_N):
            return
        section, seen = self._section, self._of(capability)
        parts_NK = parts_of(entropy_N, section.knots).to(gains.soft_N.device)
        labels_from = section.labels_from
        labels = labels_from + (1 - labels_from) * min(step / self._num_steps, 1)
        gain_NK = (gains.soft_N - labels * gains.hard_N)[:, None] * parts_NK
        mean_K = gain_NK.mean(0)
        square_K = mean_K.square() + gain_NK.var(0, correction=0) / len(gain_NK)
        if not square_K.isfinite().all():
            return
        seen = seen.with_observation(mean_K.tolist(), square_K.tolist(), section.memory)
        curve = [
            min(max(share + section.rate * push, section.low), section.high)
            for share, push in zip(seen.curve, seen.pushes(section), strict=True)
        ]
        share = sum(a * b for a, b in zip(curve, parts_NK.mean(0).tolist(), strict=True))
        self._seen[capability] = replace(seen, curve=tuple(curve), share=share)

    def state_dict(self) -> dict[str, object]:
        return {name: asdict(seen) for name, seen in self._seen.items()}

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        self._seen = {name: _Seen.read(fields) for name, fields in state.items()}

    def _of(self, capability: str) -> _Seen:
        return self._seen.get(capability, self._fresh)


@dataclass(frozen=True, slots=True)
class _Seen:
    """A capability's curve and the decaying sums behind it.

    Example:
        one knot, after a mean gain of -3 without spread and memory 0.8:
        sums (-0.6,), squares (1.8,), mass 0.2
    """

    curve: tuple[float, ...]
    share: float
    """Mean of the tokens that were observed last."""
    sums: tuple[float, ...]
    squares: tuple[float, ...]
    mass: float
    """Weight of all observations in the sums."""

    @classmethod
    def read(cls, fields: object) -> _Seen:
        """From what a checkpoint keeps."""
        assert isinstance(fields, Mapping)
        curve, sums, squares = (tuple(fields[name]) for name in ("curve", "sums", "squares"))
        return cls(curve, float(fields["share"]), sums, squares, float(fields["mass"]))

    def with_observation(
        self, means: Sequence[float], squares: Sequence[float], memory: float
    ) -> _Seen:
        """The sums a step further."""
        new = 1 - memory
        return replace(
            self,
            sums=tuple(memory * a + new * b for a, b in zip(self.sums, means, strict=True)),
            squares=tuple(memory * a + new * b for a, b in zip(self.squares, squares, strict=True)),
            mass=memory * self.mass + new,
        )

    def pushes(self, section: AlignedShare) -> Iterator[float]:
        """Where the share of each knot should go, from -1 to 1."""
        for total, square in zip(self.sums, self.squares, strict=True):
            evidence = total / math.sqrt(square * self.mass) if square > 0 else 0.0
            yield min(max(evidence + section.trust, -1.0), 1.0)


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
