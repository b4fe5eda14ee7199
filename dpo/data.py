"""Pairs as token ids, and their log-probs under a model.

B rows, T tokens a row.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ground.chat import ChatTemplate
from ground.errors import DataError
from ground.logprobs import model_logprobs
from ground.records import Message, Pair


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A pair ready for the model.

    Example:
        prompt (256, 31, 260, …), chosen (40, 260), rejected (41, 41, 260)
    """

    prompt_ids: tuple[int, ...]
    chosen_ids: tuple[int, ...]
    rejected_ids: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens of the prompt with its longer answer."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))


@dataclass(frozen=True, slots=True)
class PairLogprobs:
    """Per-token log-probs of both answers of a pair under one model."""

    chosen: Tensor
    rejected: Tensor


def encode_pairs(
    pairs: Sequence[Pair], chat: ChatTemplate, max_length: int
) -> tuple[list[EncodedPair], int]:
    """Encode pairs; returns them and how many were too long or not encodable."""
    encoded: list[EncodedPair] = []
    for pair in pairs:
        try:
            candidate = encode_pair(pair, chat)
        except DataError:
            continue
        if candidate.length <= max_length:
            encoded.append(candidate)
    return encoded, len(pairs) - len(encoded)


def encode_pair(pair: Pair, chat: ChatTemplate) -> EncodedPair:
    """The prompt as RL posed it; answers end their turn, save for one that was cut off."""
    system = (Message("system", pair.system),) if pair.system else ()
    end = (chat.end_of_turn,)
    return EncodedPair(
        prompt_ids=tuple(chat.encode_prompt((*system, *pair.prompt.messages))),
        chosen_ids=(*chat.encode_text(pair.chosen), *end),
        rejected_ids=(
            *chat.encode_text(pair.rejected),
            *(() if pair.reason == "truncated" else end),
        ),
    )


def pair_logprobs(
    model: PreTrainedModel, pairs: Sequence[EncodedPair], *, pad_id: int, rows_per_pass: int
) -> list[PairLogprobs]:
    """Log-probs of every answer's tokens, without gradient; dropout off."""
    rows = [(pair.prompt_ids, answer) for pair in pairs for answer in _answers(pair)]
    scored: list[Tensor] = []
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(rows), rows_per_pass):
            scored += _score(model, rows[start : start + rows_per_pass], pad_id)
    model.train(was_training)
    return [PairLogprobs(*both) for both in zip(scored[::2], scored[1::2], strict=True)]


def fingerprint(pairs: Sequence[EncodedPair]) -> str:
    """sha256 over all ids, in order."""
    hasher = hashlib.sha256()
    for pair in pairs:
        ids = [pair.prompt_ids, pair.chosen_ids, pair.rejected_ids]
        hasher.update(json.dumps(ids).encode())
    return hasher.hexdigest()


def _answers(pair: EncodedPair) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return pair.chosen_ids, pair.rejected_ids


def _score(
    model: PreTrainedModel, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]], pad_id: int
) -> list[Tensor]:
    """Log-probs of the answers of a few rows, each a tensor of the answer's length."""
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    tokens_BT = torch.full((len(rows), width), pad_id)
    mask_BT = torch.zeros_like(tokens_BT)
    for index, (prompt, answer) in enumerate(rows):
        ids = (*prompt, *answer)
        tokens_BT[index, : len(ids)] = torch.tensor(ids)
        mask_BT[index, : len(ids)] = 1
    device = model.device
    logprobs_BT, _ = model_logprobs(model, tokens_BT.to(device), mask_BT.to(device))
    return [
        logprobs_BT[index, len(prompt) : len(prompt) + len(answer)].cpu()
        for index, (prompt, answer) in enumerate(rows)
    ]
