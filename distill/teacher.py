"""The teacher as a local model: rows of like length share a pass, only trained tokens its LM head.

An Engine's `score` gives the likeliest tokens and no more; the tail's mass and draws need the whole
distribution, so the teacher runs here.

T trained tokens of a row, V ids of the tokenizer, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from distill.store import TokenRow
from distill.targets import TargetFormat, TeacherTargets, joined
from ground.errors import DataError
from ground.logprobs import head_weight
from ground.packing import hidden_states

LOGITS = 1 << 24
"""Elements of the largest tensor of logits that is made at once (64 MiB)."""


class Teacher:
    """Speaks to rows, and counts them.

    Example:
        for row, targets in Teacher(model, format, vocabulary=262).speak(rows): …
    """

    def __init__(
        self,
        model: PreTrainedModel,
        format: TargetFormat,
        *,
        vocabulary: int,
        pass_tokens: int = 8192,
    ) -> None:
        self._model = model.eval().requires_grad_(False)
        self._format, self._vocabulary, self._pass_tokens = format, vocabulary, pass_tokens
        self.num_rows = 0
        """Rows that a forward pass was made for, since this was built."""
        if len(head_weight(model)) < vocabulary:
            raise DataError(
                f"the teacher's LM head must have a row for each of the tokenizer's {vocabulary} "
                f"ids, it has {len(head_weight(model))}",
                where=model.name_or_path or "teacher",
                fix="use the tokenizer that belongs to the teacher",
            )

    def speak(self, rows: Sequence[TokenRow]) -> Iterator[tuple[TokenRow, TeacherTargets]]:
        """The targets of each row, shortest rows first."""
        for batch in _batches(rows, self._pass_tokens):
            with torch.inference_mode():
                hidden_BTH = self._hidden(batch)
                spoken = [self._targets(*each) for each in zip(batch, hidden_BTH, strict=True)]
            self.num_rows += len(batch)
            yield from zip(batch, spoken, strict=True)

    def _hidden(self, batch: Sequence[TokenRow]) -> Tensor:
        device, width = self._model.device, max(len(row.ids) for row in batch)
        tokens_BT = torch.zeros(len(batch), width, dtype=torch.long)
        mask_BT = torch.zeros_like(tokens_BT)
        for index, row in enumerate(batch):
            tokens_BT[index, : len(row.ids)] = torch.tensor(row.ids)
            mask_BT[index, : len(row.ids)] = 1
        return hidden_states(self._model, tokens_BT.to(device), mask_BT.to(device))

    def _targets(self, row: TokenRow, hidden_TH: Tensor) -> TeacherTargets:
        """From the hidden states before each trained token, some tokens at a time."""
        weight_VH = head_weight(self._model)[: self._vocabulary].float()
        places = torch.tensor(row.places, dtype=torch.long)
        realised_T = torch.tensor(row.ids)[places]
        generator = torch.Generator().manual_seed(int.from_bytes(row.key[:7], "big"))
        step, parts = max(LOGITS // self._vocabulary, 1), []
        for start in range(0, max(len(places), 1), step):
            part = slice(start, start + step)
            logits_TV = (hidden_TH[places[part] - 1].float() @ weight_VH.T).cpu()
            parts.append(self._format.make(logits_TV, realised_T[part], generator))
        targets = joined(parts)
        if torch.isnan(targets.entropy_T).any():
            raise DataError(
                "the teacher's log-probs must be numbers, got NaN",
                where=f"a row of {len(row.ids)} tokens that begins with {list(row.ids[:8])}",
                fix="look at the teacher's weights, and whether its dtype is wide enough for them",
            )
        return targets


def _batches(rows: Sequence[TokenRow], most: int) -> Iterator[list[TokenRow]]:
    """Rows in the order of their lengths, as many together as fit, padding counted."""
    batch: list[TokenRow] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if batch and (len(batch) + 1) * len(row.ids) > most:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch
