"""What `aligned` is told every so many steps: held-out rows look at the teacher of the last ones.

held-out rows, and the last rows that were trained ── hidden states, no gradient ──▶ gains at the
LM head, capability by capability ──▶ weighting

All ranks look at the same rows and do the same work, so that what is found does not depend on how
many there are; rank 0's state is then everybody's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.signal import HeadTokens, SoftTokens, token_gains
from distill.targets import TeacherTargets
from distill.weighting import HeldoutWeighting
from ground.logprobs import head_weight
from ground.packing import hidden_states
from ground.training_rows import IGNORED, TrainingRow

MAX_TOKENS = 1024
"""Tokens of a capability that the LM head and the gains look at on either side, evenly chosen:
that work is their product, and so many tell a sign from noise. The backbone reads all held-out and
signal rows whole, whatever their length."""


class Signals:
    """Observes for a weighting.

    Example:
        signals = Signals(
            heldout, collator.read, heldout_at_once=32, temperature=1.0, rows_per_pass=16
        )
        signals.observe(model, last, weighting, step=20)
    """

    def __init__(
        self,
        heldout: Sequence[TrainingRow],
        read: Callable[[Sequence[TrainingRow]], TeacherTargets],
        *,
        heldout_at_once: int,
        temperature: float,
        rows_per_pass: int,
    ) -> None:
        self._heldout, self._read = heldout, read
        self._part = min(heldout_at_once / max(len(heldout), 1), 1.0)
        self._temperature, self._rows_per_pass = temperature, rows_per_pass

    @torch.no_grad()
    def observe(
        self,
        model: PreTrainedModel,
        last: Sequence[TrainingRow],
        weighting: HeldoutWeighting,
        *,
        step: int,
    ) -> None:
        """Tell the weighting what it learns of each capability that both sides have rows of."""
        names = {row.capability for row in self._heldout} & {row.capability for row in last}
        turn = step // weighting.observe_every
        for name in sorted(names):
            own = [row for row in self._heldout if row.capability == name]
            own = in_turn(own, max(round(self._part * len(own)), 1), turn)
            rows = [row for row in last if row.capability == name]
            heldout, _ = self._tokens(model, own)
            trained, chosen_N = self._tokens(model, rows)
            targets = self._read(rows)
            soft = SoftTokens.of(targets, chosen_N, self._temperature, model.device)
            gains = token_gains(heldout, trained, soft, head_weight(model))
            is_known_N = targets.is_supported_T[chosen_N]
            if is_known_N.any():
                entropy_N = targets.entropy_T[chosen_N][is_known_N]
                there_N = is_known_N.to(gains.soft_N.device)
                weighting.observe(step, name, gains.pick(there_N), entropy_N)

    def _tokens(
        self, model: PreTrainedModel, rows: Sequence[TrainingRow]
    ) -> tuple[HeadTokens, Tensor]:
        """The trained tokens of some rows as the LM head sees them, and which of all these are."""
        hidden, labels = [], []
        for start in range(0, len(rows), self._rows_per_pass):
            found = _hidden(model, rows[start : start + self._rows_per_pass])
            hidden.append(found[0])
            labels.append(found[1])
        hidden_NH, labels_N = torch.cat(hidden), torch.cat(labels)
        count = min(len(labels_N), MAX_TOKENS)
        chosen_N = torch.linspace(0, len(labels_N) - 1, count).round().long()
        there = chosen_N.to(hidden_NH.device)
        return HeadTokens(hidden_NH[there], labels_N[there]), chosen_N


def in_turn(rows: Sequence[TrainingRow], count: int, turn: int) -> list[TrainingRow]:
    """As many rows as asked for, those after the ones that had the turn before.

    Example:
        2 of rows a b c: turn 0 a b, turn 1 c a, turn 2 b c
    """
    return [rows[(turn * count + place) % len(rows)] for place in range(count)]


def _hidden(model: PreTrainedModel, rows: Sequence[TrainingRow]) -> tuple[Tensor, Tensor]:
    width = max(len(row.input_ids) for row in rows)
    tokens_BT = torch.zeros(len(rows), width, dtype=torch.long)
    labels_BT, mask_BT = torch.full_like(tokens_BT, IGNORED), torch.zeros_like(tokens_BT)
    for index, row in enumerate(rows):
        length = len(row.input_ids)
        tokens_BT[index, :length] = torch.tensor(row.input_ids)
        labels_BT[index, :length] = torch.tensor(row.labels)
        mask_BT[index, :length] = 1
    hidden_BTH = hidden_states(model, tokens_BT.to(model.device), mask_BT.to(model.device))
    trained_BT = (labels_BT[:, 1:] != IGNORED).to(model.device)
    return hidden_BTH[:, :-1][trained_BT], labels_BT[:, 1:].to(model.device)[trained_BT]
