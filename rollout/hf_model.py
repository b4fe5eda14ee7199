"""A transformers model in the fixed shapes of an engine: prefill prompts, decode all slots.

B rows of a score batch, S slots, T positions, V vocabulary, H hidden size.

The LM head runs in float32, as the learner's does; hidden states have the model's own dtype.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from ground.errors import DataError, SetupError
from ground.llama4 import apply_shims
from ground.model import load_model, tensors_of
from ground.packing import layer_types
from rollout.engine import Lent, Scores
from rollout.hf_cache import (
    ATTENTION,
    Masks,
    PrefixStates,
    SlotCache,
    exact_lengths,
)
from rollout.hf_weights import check_weights, own_weights, swap_weights

_PREFILL_STEP = 32
"""Prompts are padded to multiples of this: one shape, hence the same bits, per prompt."""
_ROWS = 4
"""Prompts of one prefill, or sequences of one score batch; a fixed shape again."""
_MAX_PREFIXES = 32
_SCORE_LOGITS = 1 << 24
"""Elements of the largest logits tensor that scoring builds."""
_KNOWN_LAYERS = {"full_attention", "chunked_attention"}


@dataclass(frozen=True, slots=True)
class Prefix:
    """A prompt after prefill: what a slot needs to start decoding; shared by a group's samples."""

    states: PrefixStates
    logits_V: Tensor


class SlotModel:
    """Owns the model: sets it to evaluation and to our attention, swaps its weights in place."""

    def __init__(
        self, model: PreTrainedModel, *, num_slots: int, max_length: int, pad_id: int
    ) -> None:
        _check_layers(model, max_length)
        self._model = model.eval().requires_grad_(False)
        self._model.set_attn_implementation(ATTENTION)
        apply_shims()
        self._backbone = cast(nn.Module, model.base_model)
        self._pad_id, self._max_length = pad_id, max_length
        self.vocabulary = int(self._head.shape[0])
        config, like = model.config, self._head
        self._like = like
        self._masks = Masks.of(config, like.dtype)
        self._cache = SlotCache(config.num_hidden_layers, num_slots, max_length, like)
        self._prefixes: OrderedDict[tuple[int, ...], Prefix] = OrderedDict()
        head_size = getattr(config, "head_dim", None)
        with torch.inference_mode():
            self._head_fp32_VH = like.float()
            self._lengths = exact_lengths(
                num_slots,
                config.num_attention_heads,
                config.num_key_value_heads,
                head_size or config.hidden_size // config.num_attention_heads,
                max_length,
                like,
            )
            self.logits_SV = like.new_zeros(num_slots, self.vocabulary, dtype=torch.float32)
            self._check_rows(num_slots)

    @property
    def _head(self) -> Tensor:
        head = self._model.get_output_embeddings()
        assert head is not None
        return head.weight

    def read(self, path: Path) -> Mapping[str, Tensor]:
        """The tensors of a model folder, in this model's dtype."""
        return Lent(tensors_of(load_model(path, dtype=self._like.dtype)))

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Refuse weights that do not fit; touches nothing, may run beside decoding."""
        check_weights(self._model.state_dict(keep_vars=True), weights)

    def own(self, weights: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Weights that `load` may keep: where the model is, and nobody else's."""
        return own_weights(weights, self._like.device)

    def tensors(self) -> Mapping[str, Tensor]:
        """What the model computes with."""
        return self._model.state_dict()

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Swap in checked weights of our own, forget prompts prefilled with the old ones."""
        swap_weights(self._model, weights)
        self._head_fp32_VH = self._head.float()
        self._prefixes.clear()

    def clear(self, slot: int) -> None:
        """Wipe a slot whose numbers went bad: 0 · NaN would reach its next tenant."""
        self._cache.clear(slot)

    def start(
        self, slot: int, prompt_ids: tuple[int, ...], upcoming: Iterable[tuple[int, ...]] = ()
    ) -> None:
        """Move a prompt into a slot: its cache, and the logits of its first token.

        Args:
            upcoming: prompts that will be started soon; some are prefilled on the way.
        """
        if prompt_ids not in self._prefixes:
            self._prefill(self._batch(prompt_ids, upcoming))
        self._prefixes.move_to_end(prompt_ids)
        prefix = self._prefixes[prompt_ids]
        self._cache.fill(slot, prefix.states)
        self.logits_SV[slot] = prefix.logits_V

    def decode(self, tokens_S: Tensor, positions_S: Tensor) -> None:
        """Feed every slot its last token; its next token's logits then stand in `logits_SV`."""
        device = self._like.device
        tokens_S, positions_S = tokens_S.to(device), positions_S.to(device)
        needed = int(positions_S.max()) + 1
        length = next(length for length in self._lengths if length >= needed)
        self._cache.aim(positions_S, length)
        hidden = self._backbone(
            input_ids=tokens_S[:, None],
            attention_mask=self._masks(positions_S[:, None], length),
            position_ids=positions_S[:, None],
            past_key_values=self._cache,
            use_cache=True,
            slot_positions=positions_S,
        ).last_hidden_state
        self.logits_SV = self._logits(hidden[:, 0])

    def score(self, rows: Sequence[Sequence[int]], top_k: int) -> list[Scores]:
        """Scores of one of `score_batches`, in a batch of fixed shape."""
        tokens_BT = self._padded(rows)
        width = tokens_BT.shape[1]
        hidden_BTH = self._forward(tokens_BT, None)
        step = max(_SCORE_LOGITS // (_ROWS * self.vocabulary), 1)
        parts = []
        for start in range(0, width - 1, step):
            end = min(start + step, width - 1)
            logprobs = self._logits(hidden_BTH[:, start:end]).log_softmax(-1)
            given = logprobs.gather(-1, tokens_BT[:, start + 1 : end + 1, None])[..., 0]
            parts.append((given, *logprobs.topk(top_k, dim=-1)))
        given_BT, top_BTK, ids_BTK = (
            torch.cat(part, dim=1).tolist() for part in zip(*parts, strict=True)
        )
        return [
            Scores(
                tuple(given_BT[b][: len(row) - 1]),
                tuple(map(tuple, ids_BTK[b][: len(row) - 1])) if top_k else (),
                tuple(map(tuple, top_BTK[b][: len(row) - 1])) if top_k else (),
            )
            for b, row in enumerate(rows)
        ]

    def score_batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Indices of sequences in batches that `score` takes: of one bucket, few enough."""
        buckets: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            buckets.setdefault(self.bucket(length), []).append(index)
        return [
            members[start : start + _ROWS]
            for _, members in sorted(buckets.items())
            for start in range(0, len(members), _ROWS)
        ]

    def bucket(self, length: int) -> int:
        """Padded length of a sequence; depends on its own length alone."""
        return min(-(-length // _PREFILL_STEP) * _PREFILL_STEP, self._max_length)

    def _check_rows(self, num_slots: int) -> None:
        """Equal rows must give equal bits; also allocates the cache."""
        zeros_S = torch.zeros(num_slots, dtype=torch.long)
        self.decode(zeros_S, zeros_S)
        if not bool((self.logits_SV == self.logits_SV[0]).all()):
            raise SetupError(
                f"equal rows must give equal logits, on this machine they differ in a batch of "
                f"{num_slots}",
                where="hf engine",
                why="its matrix kernels treat the last rows of a batch in another way",
                fix="set engine.num_slots to another multiple of 32, or engine.threads to 1",
            )

    def _batch(
        self, prompt_ids: tuple[int, ...], upcoming: Iterable[tuple[int, ...]]
    ) -> list[tuple[int, ...]]:
        """This prompt and new ones of the same bucket, as many as one prefill takes."""
        wanted = {prompt_ids: None}
        bucket = self.bucket(len(prompt_ids))
        for other in upcoming:
            if len(wanted) == _ROWS:
                break
            if self.bucket(len(other)) == bucket and other not in self._prefixes:
                wanted[other] = None
        return list(wanted)

    def _prefill(self, prompts: list[tuple[int, ...]]) -> None:
        """Run prompts of one bucket in a batch of fixed shape and keep what comes of each."""
        cache = DynamicCache()
        hidden_BTH = self._forward(self._padded(prompts), cache)
        last_B = torch.tensor([len(prompt) - 1 for prompt in prompts], device=self._like.device)
        rows_B = torch.arange(len(prompts), device=self._like.device)
        last_BH = hidden_BTH.new_zeros(_ROWS, hidden_BTH.shape[-1])
        last_BH[: len(prompts)] = hidden_BTH[rows_B, last_B]
        logits_BV = self._logits(last_BH)
        for row, prompt in enumerate(prompts):
            self._prefixes[prompt] = Prefix(_states(cache, row, len(prompt)), logits_BV[row])
        while len(self._prefixes) > _MAX_PREFIXES:
            self._prefixes.popitem(last=False)

    def _padded(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Rows of one bucket, padded on the right and from below to the batch of fixed shape."""
        width = self.bucket(max(len(row) for row in rows))
        padded = [[*row, *[self._pad_id] * (width - len(row))] for row in rows]
        padded += [[self._pad_id] * width] * (_ROWS - len(rows))
        return torch.tensor(padded, device=self._like.device)

    def _forward(self, tokens_BT: Tensor, cache: DynamicCache | None) -> Tensor:
        """Hidden states of right-padded rows; padding is invisible to what stands before it."""
        width = tokens_BT.shape[1]
        positions_1T = torch.arange(width, device=tokens_BT.device)[None]
        return self._backbone(
            input_ids=tokens_BT,
            attention_mask=self._masks(positions_1T, width),
            position_ids=positions_1T,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state

    def _logits(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden.float(), self._head_fp32_VH)


def _states(cache: DynamicCache, row: int, length: int) -> PrefixStates:
    """Keys and values of one row of a prefill, without its padding."""
    states: PrefixStates = []
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None and layer.values is not None
        states.append((layer.keys[row, :, :length], layer.values[row, :, :length]))
    return states


def _check_layers(model: PreTrainedModel, max_length: int) -> None:
    config = model.config
    unknown = set(layer_types(config)) - _KNOWN_LAYERS
    if unknown:
        raise DataError(
            f"layers must be of {sorted(_KNOWN_LAYERS)}, got {sorted(unknown)}",
            where=f"hf engine, model type {config.model_type}",
            fix="use a Llama or Llama 4 text model",
        )
    if max_length > config.max_position_embeddings:
        raise DataError(
            f"max_length must be at most the model's {config.max_position_embeddings} positions, "
            f"got {max_length}",
            where="hf engine",
            fix=f"set engine.max_length to {config.max_position_embeddings} or less",
        )
