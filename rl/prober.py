"""The learner's side of the parity gate: token sequences and what the learner makes of them.

    random rows over the vocabulary + a long one + rollouts of the batch just trained
        → log-probs under the version that is published → cut where routing hangs on a rounding

Random tokens reach every expert of every MoE layer, and are added to until they do. Trained
rollouts hold the embeddings that this step has moved. The long row passes the position from which
Llama 4 scales its attention.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama4.modeling_llama4 import Llama4Router

from ground.logprobs import LogprobModel
from ground.records import Group
from rollout.weights import Probe, Probes

_ROWS = 8
_ROW_TOKENS = 32
_MAX_ROWS = 40
"""Random rows, with those that were added to reach an expert."""
_RECENT_ROWS = 4
_RECENT_TOKENS = 64
_BEYOND = 16
"""Tokens of the long row behind the position that it is there for."""
_FACTOR = 3.0
"""Tolerance over measured noise."""
_NOISE_EVERY = 8
"""Versions between measurements of the noise: it moves slowly and costs as much as the probes."""
_MOST_OTHERWISE = 30.0
"""Times what other kernels make of it that computing otherwise may be off. Added adapters were seen
at 7; what is farther off than roundings are is a fault, and must not become a tolerance."""
_LEAST_TYPICAL, _LEAST_WORST = 1e-6, 4e-6
"""Nats: a rounding or two of an fp32 log-prob around -8."""
_WORST_TOKEN = 10.0
"""Of an engine's floor: what its worst token may be off, where a typical probe may be off by 1."""
_TIES = {torch.float32: 1e-4, torch.float64: 1e-4}
_COARSE_TIE = 2e-2
"""Router logits nearer than this may change places by a rounding, by the model's type."""
_OTHER_ATTENTION = "eager"
"""Adds up in another order than the kernels that learner and engine use."""

logger = logging.getLogger(__name__)

Row = tuple[int, ...]
Expert = tuple[int, int]
"""MoE layer, number in it."""


@dataclass(frozen=True, slots=True)
class _Seen:
    """What the model made of a row, up to the first token that hangs on a rounding."""

    row: Row
    logprobs: tuple[float, ...]
    reached: frozenset[Expert]


class Prober:
    """Makes probes of a model, version by version.

    Example:
        probes = Prober(model, max_length=512, seed=0).measure(plan.groups)

    Args:
        model: the live one; its weights are those of the version that is published.
        max_length: tokens that an engine takes at most.
        floor: nats that a typical probe may be off in any case: the engine has other kernels.
        through: the wrapped model, where only it can run: the ranks hold parts of the weights.
        shared: makes what rank 0 has of it, where all ranks measure together. Roundings may lead
            their routers to other experts, and yet all have to make the same passes.
        otherwise: another way in which engines compute the same; its noise is theirs too. Measured
            for each version: roundings of an added adapter grow until they are those of any sum.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        max_length: int,
        seed: int,
        floor: float = 0.0,
        through: nn.Module | None = None,
        shared: Callable[[set[Expert]], set[Expert]] = lambda experts: experts,
        otherwise: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        self._shared, self._otherwise = shared, otherwise
        self._model, self._max_length = model, max_length
        self._logprobs = through or LogprobModel(model)
        self._random = np.random.default_rng([seed, 0x9A])
        self._routers = [each for each in model.modules() if isinstance(each, Llama4Router)]
        self._experts = {
            (layer, expert)
            for layer, router in enumerate(self._routers)
            for expert in range(router.num_experts)
        }
        self._rows = [self._random_row(_ROW_TOKENS) for _ in range(_ROWS)]
        self._fixed = self._long_rows()
        self._tie = _TIES.get(model.dtype, _COARSE_TIE)
        self._least = (max(_LEAST_TYPICAL, floor), max(_LEAST_WORST, _WORST_TOKEN * floor))
        self._measured, self._tolerances = 0, self._least
        self.unreached: set[Expert] = set()
        """Experts that no probe routes to: what they hold is proven by bytes alone."""

    def measure(self, groups: Sequence[Group] = ()) -> Probes:
        """Probes of the model as it is now.

        Args:
            groups: the batch that this version was trained on.
        """
        rows = [*self._rows, *self._fixed, *_recent(groups, self._max_length)]
        with _evaluating(self._model), torch.no_grad():
            seen = [*self._see(rows)]
            seen += self._see_experts(seen)
            if self._measured % _NOISE_EVERY == 0:
                with _attention(self._model, _OTHER_ATTENTION):
                    again = [*self._see([each.row for each in seen])]
                self._tolerances = _tolerances(seen, again, self._least)
            limits = self._with_otherwise(seen)
        self._measured += 1
        probes = tuple(Probe(each.row, each.logprobs) for each in seen if each.logprobs)
        return Probes(probes, *limits)

    def _with_otherwise(self, seen: Sequence[_Seen]) -> tuple[float, float]:
        """The tolerances, raised to what computing otherwise needs, but not without bounds."""
        if self._otherwise is None:
            return self._tolerances
        with self._otherwise():
            again = [*self._see([each.row for each in seen])]
        typical, worst = _tolerances(seen, again, self._tolerances)
        most = tuple(_MOST_OTHERWISE * each for each in self._tolerances)
        return min(typical, most[0]), min(worst, most[1])

    def _see_experts(self, seen: Sequence[_Seen]) -> Iterator[_Seen]:
        """More random rows, until every expert is reached or there are enough."""
        missing = self._shared(self._experts.difference(*(each.reached for each in seen)))
        while missing and len(self._rows) < _MAX_ROWS:
            self._rows.append(self._random_row(_ROW_TOKENS))
            (more,) = self._see(self._rows[-1:])
            missing = self._shared(missing - more.reached)
            yield more
        if missing - self.unreached:
            logger.warning(
                "no probe reaches experts %s (MoE layer, expert) of %d: the parity gate sees their "
                "weights by checksums alone",
                sorted(missing),
                len(self._experts),
            )
        self.unreached = missing

    def _see(self, rows: Sequence[Row]) -> Iterator[_Seen]:
        """What the model makes of rows, in batches of about equal lengths."""
        for start in range(0, len(rows), _ROWS):
            batch = rows[start : start + _ROWS]
            width = max(map(len, batch))
            tokens_BT = torch.tensor([[*row, *[0] * (width - len(row))] for row in batch])
            mask_BT = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in batch])
            device = self._model.device
            with _recorded(self._routers) as routed:
                logprobs_BT, _ = self._logprobs(tokens_BT.to(device), mask_BT.to(device))
            chosen, tied_BT = _choices(self._routers, routed, (len(batch), width), self._tie)
            for b, row in enumerate(batch):
                ties = tied_BT[b, : len(row)].nonzero()
                end = int(ties[0]) if len(ties) else len(row) - 1
                reached = frozenset(
                    (layer, int(expert))
                    for layer, ids_BTK in enumerate(chosen)
                    for expert in ids_BTK[b, :end].unique()
                )
                yield _Seen(row, tuple(logprobs_BT[b, 1 : end + 1].tolist()), reached)

    def _random_row(self, length: int) -> Row:
        length = min(length, self._max_length)
        vocabulary = self._model.config.get_text_config().vocab_size
        return tuple(self._random.integers(vocabulary, size=length).tolist())

    def _long_rows(self) -> list[Row]:
        """One row past Llama 4's threshold, where there is such a thing within reach."""
        config = self._model.config.get_text_config()
        length = getattr(config, "floor_scale", self._max_length) + _BEYOND
        is_wanted = bool(self._routers) and config.attn_temperature_tuning
        return [self._random_row(length)] if is_wanted and length <= self._max_length else []


def _recent(groups: Sequence[Group], max_length: int) -> list[Row]:
    """A rollout each of the first few groups, as long as it is cheap."""
    length = min(_RECENT_TOKENS, max_length)
    rows = [
        (*group.prompt_ids, *(id_ for part in group.rollouts[0].segments for id_ in part.token_ids))
        for group in groups[:_RECENT_ROWS]
    ]
    return [row[:length] for row in rows if len(row) > 1]


def _tolerances(
    seen: Sequence[_Seen], again: Sequence[_Seen], least: tuple[float, float]
) -> tuple[float, float]:
    """Typical and worst noise between two ways of computing the same, and some."""
    off = []
    for one, other in zip(seen, again, strict=True):
        length = min(len(one.logprobs), len(other.logprobs))
        if length:
            off.append(np.abs(np.subtract(one.logprobs[:length], other.logprobs[:length])))
    if not off:
        return least
    typical = float(np.median([np.sqrt(np.mean(each**2)) for each in off]))
    worst = max(float(each.max()) for each in off)
    return max(_FACTOR * typical, least[0]), max(_FACTOR * worst, least[1])


def _choices(
    routers: Sequence[Llama4Router], logits: Sequence[Tensor], shape: tuple[int, int], tie: float
) -> tuple[list[Tensor], Tensor]:
    """Chosen experts [B, T, K] of each layer, and tokens [B, T] whose choice is all but even."""
    chosen, tied_BT = [], torch.zeros(shape, dtype=torch.bool)
    for router, logits_NE in zip(routers, logits, strict=True):
        count = router.top_k
        top = logits_NE.float().cpu().view(*shape, -1).topk(min(count + 1, router.num_experts))
        chosen.append(top.indices[..., :count])
        if router.num_experts > count:
            tied_BT |= top.values[..., count - 1] - top.values[..., count] < tie
    return chosen, tied_BT


@contextmanager
def _recorded(routers: Sequence[Llama4Router]) -> Iterator[list[Tensor]]:
    """Router logits [N, E] of the forward pass inside, layer by layer."""
    logits: list[Tensor] = []
    hooks = [
        router.register_forward_hook(lambda _module, _input, output: logits.append(output[1]))
        for router in routers
    ]
    try:
        yield logits
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """The backbone with another attention kernel."""
    backbone = cast(PreTrainedModel, model.base_model)
    usual = backbone.config._attn_implementation
    assert usual is not None
    backbone.set_attn_implementation(name)
    try:
        yield
    finally:
        backbone.set_attn_implementation(usual)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """The model as an engine runs it: no dropout, no gradient checkpointing."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
