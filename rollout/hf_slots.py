"""Bookkeeping of sequences in slots, vectorised over slots, and the draw of the next token.

    free → taken (take) → a token per step (record) → free (release)

S slots, V vocabulary, T tokens recorded, K stop ids.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ground.records import Finish, Segment
from rollout.engine import Request, spans_of
from rollout.seeds import uniforms

_NO_TOKEN = -1


class Slots:
    """Which request sits where and what it has sampled so far. Everything is [S] or [S, T]."""

    def __init__(self, num_slots: int, max_length: int) -> None:
        self.requests: list[Request | None] = [None] * num_slots
        self.is_taken_S = np.zeros(num_slots, dtype=bool)
        self.counts_S = np.zeros(num_slots, dtype=np.int64)
        """Tokens sampled."""
        self.positions_S = np.zeros(num_slots, dtype=np.int64)
        """Position of the token sampled last, which the next step feeds."""
        self.last_S = np.zeros(num_slots, dtype=np.int64)
        self._limits_S = np.ones(num_slots, dtype=np.int64)
        self._seeds_S = np.zeros(num_slots, dtype=np.uint64)
        self._temperatures_S = np.ones(num_slots, dtype=np.float32)
        self._stops_SK = np.full((num_slots, 1), _NO_TOKEN, dtype=np.int64)
        self._tokens_ST = np.zeros((num_slots, max_length), dtype=np.int64)
        self._logprobs_ST = np.zeros((num_slots, max_length), dtype=np.float32)
        self._versions_ST = np.zeros((num_slots, max_length), dtype=np.int64)

    def take(self, request: Request) -> int:
        """Put a request into the lowest free slot; there must be one."""
        slot = int(np.argmin(self.is_taken_S))
        assert not self.is_taken_S[slot]
        self.requests[slot] = request
        self.is_taken_S[slot] = True
        self.counts_S[slot] = 0
        self.positions_S[slot] = len(request.prompt_ids) - 1
        self._limits_S[slot] = request.max_new_tokens
        self._seeds_S[slot] = request.seed % (1 << 64)
        self._temperatures_S[slot] = request.temperature
        self._set_stops(slot, request.stop_ids)
        return slot

    def draw(self, logits_SV: Tensor, rows_S: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Next token and its log-prob [S] for every row; meaningful where `rows_S`.

        A row's number depends on its seed and on how many tokens it has, on nothing else.
        """
        uniforms_S = uniforms(self._seeds_S, self.counts_S.astype(np.uint64))
        greedy_S = self._temperatures_S == 0
        temperatures_S = np.where(greedy_S, np.float32(1), self._temperatures_S)
        device = logits_SV.device
        tokens_S, logprobs_S = sample(
            logits_SV,
            torch.from_numpy(temperatures_S).to(device),
            torch.from_numpy(uniforms_S).to(device),
            torch.from_numpy(greedy_S).to(device) if (greedy_S & rows_S).any() else None,
        )
        return tokens_S.cpu().numpy(), logprobs_S.cpu().numpy()

    def record(
        self, rows_S: np.ndarray, tokens_S: np.ndarray, logprobs_S: np.ndarray, version: int
    ) -> np.ndarray:
        """Append a token to each of these rows; returns the rows [n] that are finished by it."""
        rows = np.flatnonzero(rows_S)
        at = self.counts_S[rows]
        self._tokens_ST[rows, at] = tokens_S[rows]
        self._logprobs_ST[rows, at] = logprobs_S[rows]
        self._versions_ST[rows, at] = version
        self.last_S[rows] = tokens_S[rows]
        self.counts_S[rows] += 1
        self.positions_S[rows] += 1
        stopped = (self._stops_SK[rows] == tokens_S[rows, None]).any(axis=1)
        return rows[stopped | (self.counts_S[rows] >= self._limits_S[rows])]

    def release(self, slot: int) -> tuple[Segment, Finish]:
        """Free a slot; returns what it sampled and whether a stop id ended it."""
        count = int(self.counts_S[slot])
        segment = Segment(
            "policy",
            tuple(self._tokens_ST[slot, :count].tolist()),
            tuple(self._logprobs_ST[slot, :count].tolist()),
            spans_of(self._versions_ST[slot, :count].tolist()),
        )
        stopped = count > 0 and segment.token_ids[-1] in self._stops_SK[slot]
        self.requests[slot] = None
        self.is_taken_S[slot] = False
        self.positions_S[slot] = self.last_S[slot] = 0
        self._temperatures_S[slot] = 1
        return segment, "stop" if stopped else "length"

    def _set_stops(self, slot: int, stop_ids: tuple[int, ...]) -> None:
        missing = len(stop_ids) - self._stops_SK.shape[1]
        if missing > 0:
            self._stops_SK = np.pad(
                self._stops_SK, ((0, 0), (0, missing)), constant_values=_NO_TOKEN
            )
        self._stops_SK[slot] = _NO_TOKEN
        self._stops_SK[slot, : len(stop_ids)] = stop_ids


def sample(
    logits_SV: Tensor, temperatures_S: Tensor, uniforms_S: Tensor, greedy_S: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Draw from softmax(logits / temperature) by inverting its distribution function.

    Args:
        logits_SV: float32.
        uniforms_S: float64 in [0, 1), see `seeds.uniforms`.
        greedy_S: rows that take the likeliest token instead; None when there are none.

    Returns:
        Tokens [S] and their log-probs [S] under the distribution that was drawn from; NaN where
        a row's logits are not finite.
    """
    logprobs_SV = torch.log_softmax(logits_SV / temperatures_S[:, None], dim=-1)
    cumulative_SV = torch.cumsum(logprobs_SV.exp(), dim=-1, dtype=torch.float64)
    targets_S1 = (uniforms_S * cumulative_SV[:, -1])[:, None]
    tokens_S1 = torch.searchsorted(cumulative_SV, targets_S1, right=True)
    tokens_S1 = tokens_S1.clamp_(max=logits_SV.shape[1] - 1)
    if greedy_S is not None:
        tokens_S1 = torch.where(greedy_S[:, None], logits_SV.argmax(-1, keepdim=True), tokens_S1)
    return tokens_S1[:, 0], logprobs_SV.gather(1, tokens_S1)[:, 0]
