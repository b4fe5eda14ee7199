"""What the rewards of new answers say of the teacher: would its targets raise them?

The step's answers are new to the student, so the policy's gradient on them is one that it has not
learned by heart yet: it stands where SFT has held-out rows. For each token the LM head answers: had
the student taken a step on this token's soft target alone, by how much would the policy's loss
-rho A log pi have fallen over all tokens of the capability (distill/signal.py)? A teacher who likes
what was rewarded gains; one who likes what failed loses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.signal import Gains, HeadTokens, SoftTokens, token_gains
from distill.targets import TeacherTargets, joined
from distill.weighting import Weighting
from ground.logprobs import head_weight, token_logprobs
from ground.packing import hidden_states
from rl.batch import Batch, Row, collate, micro_batches
from rl.config import RlSection

MAX_TOKENS = 1024
"""Tokens of a capability that are compared, evenly chosen; the work is their square."""
_RHO_MAX = 4.0
"""Truncation of pi / mu in the policy's gradient, as aipo's by default."""


@torch.no_grad()
def observe(
    model: PreTrainedModel,
    rows: Sequence[Row],
    read: Callable[[Row], TeacherTargets],
    weighting: Weighting,
    *,
    step: int,
    section: RlSection,
) -> None:
    """Tell the weighting what each capability's targets gain, from a few of its rows.

    Rows are read one to a sequence whatever the packing, so that all ranks find the same.

    Args:
        read: gives the targets of a row's trained tokens.
    """
    assert section.distill is not None
    for name in sorted({row.capability for row in rows}):
        own = _spread([row for row in rows if row.capability == name], section.distill.signal_rows)
        tokens = _tokens(model, own, section)
        targets = joined([read(row) for row in tokens.rows])
        chosen_N = _chosen(targets.is_supported_T)
        if not len(chosen_N):
            continue
        there_N = chosen_N.to(model.device)
        trained = HeadTokens(tokens.hidden_NH[there_N], tokens.labels_N[there_N])
        temperature = section.sampling.temperature
        heldout = HeadTokens(
            trained.hidden_NH / temperature, trained.labels_N, tokens.scales_N[there_N]
        )
        soft = SoftTokens.of(targets, chosen_N, section.distill.temperature, model.device)
        gains = token_gains(heldout, trained, soft, head_weight(model))
        gains = Gains(gains.soft_N, torch.zeros_like(gains.hard_N))
        weighting.observe(step, name, gains, targets.entropy_T[chosen_N])


@dataclass(frozen=True, slots=True)
class _Tokens:
    """The trained tokens of some rows, as the LM head sees them.

    Example:
        rows of 3 and 2 trained tokens → hidden_NH of 5
    """

    rows: list[Row]
    """In the order of the tokens."""
    hidden_NH: Tensor
    labels_N: Tensor
    scales_N: Tensor
    """rho A of each."""


def _tokens(model: PreTrainedModel, rows: Sequence[Row], section: RlSection) -> _Tokens:
    ordered, hidden, labels, scales = list[Row](), [], [], []
    for sequences in micro_batches([[row] for row in rows], section.micro_batch_tokens):
        batch = collate(sequences, pad_id=0).to(model.device)
        hidden_NH, labels_N = _hidden(model, batch)
        logprobs_N, _ = token_logprobs(
            hidden_NH, head_weight(model), labels_N, section.sampling.temperature
        )
        behavior_N = batch.behavior_logprobs_BT[batch.loss_mask_BT]
        rho_N = (logprobs_N - behavior_N).exp().clamp(max=_RHO_MAX)
        ordered += [row for (row,) in sequences]
        hidden.append(hidden_NH)
        labels.append(labels_N)
        scales.append((rho_N * batch.advantages_BT[batch.loss_mask_BT]).float())
    return _Tokens(ordered, torch.cat(hidden), torch.cat(labels), torch.cat(scales))


def _hidden(model: PreTrainedModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of the trained tokens: the hidden state before each, and the token."""
    hidden_BTH = hidden_states(model, batch.tokens_BT, batch.segments_BT)
    trained_BT = batch.loss_mask_BT[:, 1:]
    return hidden_BTH[:, :-1][trained_BT], batch.tokens_BT[:, 1:][trained_BT]


def _chosen(is_spoken_N: Tensor) -> Tensor:
    """Indices of tokens that the teacher knows, evenly chosen."""
    known = is_spoken_N.nonzero()[:, 0]
    count = min(len(known), MAX_TOKENS)
    return known[torch.linspace(0, max(len(known) - 1, 0), count).round().long()]


def _spread(rows: Sequence[Row], most: int) -> list[Row]:
    """At most so many of the rows, from all over the step."""
    count = min(len(rows), most)
    return [rows[place * len(rows) // count] for place in range(count)]
