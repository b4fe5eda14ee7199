"""Teachers and students whose soft gradient is known in full, and what stored targets make of it.

    zipf    a teacher that gives its n-th likeliest of 131,072 tokens a probability in proportion to
            n^-s, and a student that puts tokens in about the same order
    herd    teacher and student of recipes/tiny on its demonstrations: 418 tokens, all real

The gradient is that of the forward KL by the student's hidden states [T, H], and that by the
weights of a linear layer below the head, where a batch's tokens are summed up [H, H]. Errors are
relative: the distance from the gradient of `full`, over its length. Targets are taken through the
half precision of the store.

T tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.harness import ROOT
from distill.loss import Divergence, token_losses
from distill.shard import StoredRow
from distill.targets import TargetFormat, TeacherTargets
from ground.chat import ChatTemplate
from ground.config import Data
from ground.herd.config import HerdSection
from ground.herd.files import data_files
from ground.logprobs import head_weight
from ground.model import load_model, load_tokenizer
from ground.packing import hidden_states
from ground.records import Demonstration
from ground.tables import read_demonstrations
from ground.training_rows import IGNORED, TrainingRow, encode_demonstrations

ZIPF_VOCABULARY, ZIPF_HIDDEN = 1 << 17, 64
HERD = ROOT / "recipes" / "tiny" / "herd"
_COPIES = 128
"""Draws whose gradients are taken together."""


@dataclass(frozen=True, slots=True)
class Words:
    """What a teacher says in full in place of some tokens, and a student that hears it.

    Example:
        Words.zipf(1.5, 128).token_error(stored)
    """

    logits_TV: Tensor
    """The teacher's."""
    labels_T: Tensor
    hidden_TH: Tensor
    """The student's, at the head."""
    weight_VH: Tensor
    """Of the student's head."""

    @classmethod
    def zipf(cls, exponent: float, num_tokens: int) -> Words:
        """Tokens whose order is common to all contexts in part, as unigrams are, and else new."""
        dice = torch.Generator().manual_seed(round(10 * exponent))
        weight_VH = torch.randn(ZIPF_VOCABULARY, ZIPF_HIDDEN, generator=dice) / 4
        weight_VH[:, 0] = -exponent * torch.arange(1, ZIPF_VOCABULARY + 1).log()
        hidden_TH = torch.randn(num_tokens, ZIPF_HIDDEN, generator=dice) / 2
        hidden_TH[:, 0] = 1
        student_TV = hidden_TH @ weight_VH.T
        order_TV = student_TV + torch.randn(student_TV.shape, generator=dice)
        ranks_TV = order_TV.argsort(-1, descending=True).argsort(-1) + 1
        logits_TV = -exponent * ranks_TV.float().log()
        labels_T = torch.multinomial(logits_TV.softmax(-1), 1, generator=dice)[:, 0]
        return cls(logits_TV, labels_T, hidden_TH, weight_VH)

    @classmethod
    def herd(cls, num_tokens: int) -> Words:
        """The first trained tokens of the herd's demonstrations."""
        teacher, student = (load_model(HERD / name) for name in ("teacher", "student"))
        logits, hidden, labels = [], [], []
        with torch.no_grad():
            for row in training_rows():
                ids_1T = torch.tensor([row.input_ids])
                places = [at for at, label in enumerate(row.labels) if label != IGNORED]
                before = [place - 1 for place in places]
                spoken_TH, heard_TH = (
                    hidden_states(model, ids_1T, torch.ones_like(ids_1T))[0, before]
                    for model in (teacher, student)
                )
                logits.append(spoken_TH @ head_weight(teacher).T)
                hidden.append(heard_TH)
                labels.append(ids_1T[0, places])
                if sum(map(len, labels)) >= num_tokens:
                    break
        weight_VH = head_weight(student).detach()
        return cls(torch.cat(logits), torch.cat(labels), torch.cat(hidden), weight_VH).first(
            num_tokens
        )

    @property
    def vocabulary(self) -> int:
        """V."""
        return self.logits_TV.shape[1]

    def first(self, num_tokens: int) -> Words:
        """The first of the tokens."""
        part = slice(0, num_tokens)
        return replace(
            self,
            logits_TV=self.logits_TV[part],
            labels_T=self.labels_T[part],
            hidden_TH=self.hidden_TH[part],
        )

    def repeated(self, times: int) -> Words:
        """The tokens several times over, one after the other."""
        return replace(
            self,
            logits_TV=self.logits_TV.repeat(times, 1),
            labels_T=self.labels_T.repeat(times),
            hidden_TH=self.hidden_TH.repeat(times, 1),
        )

    def full(self) -> Tensor:
        """The gradient that is aimed at, [T, H]: (q - t) W."""
        student_TV = (self.hidden_TH @ self.weight_VH.T).softmax(-1)
        return (student_TV - self.logits_TV.softmax(-1)) @ self.weight_VH

    def stored(self, format: TargetFormat, seed: int = 0) -> Tensor:
        """The gradient of the product's loss on targets that were kept so, [T, H]."""
        dice = torch.Generator().manual_seed(seed)
        targets = format.make(self.logits_TV, self.labels_T, dice)
        return self._gradient(StoredRow.of(b"", targets).targets(format.kind))

    def renormalised(self, width: int) -> Tensor:
        """What a cache gives that keeps the likeliest tokens and forgets the rest, [T, H]."""
        top = self.logits_TV.topk(min(width, self.vocabulary), dim=-1)
        probs_TK = top.values.softmax(-1)
        student_TV = (self.hidden_TH @ self.weight_VH.T).softmax(-1)
        student_TV.scatter_add_(1, top.indices, -probs_TK)
        return student_TV @ self.weight_VH

    def mean_of_draws(self, format: TargetFormat, draws: int) -> Tensor:
        """The mean gradient over so many draws of every token, [T, H]."""
        many, total = self.repeated(_COPIES), torch.zeros_like(self.hidden_TH)
        for seed in range(draws // _COPIES):
            gradient = many.stored(format, seed + 1).reshape(_COPIES, *total.shape)
            total += gradient.mean(0)
        return total / (draws // _COPIES)

    def token_error(self, gradient_TH: Tensor) -> float:
        """Over all tokens, each counting for itself."""
        full_TH = self.full()
        return float((gradient_TH - full_TH).norm() / full_TH.norm())

    def batch_error(self, gradient_TH: Tensor) -> float:
        """Of the sum over the tokens that a layer's weights receive."""
        full_HH = self.full().T @ self.hidden_TH
        return float((gradient_TH.T @ self.hidden_TH - full_HH).norm() / full_HH.norm())

    def _gradient(self, targets: TeacherTargets) -> Tensor:
        hidden_TH = self.hidden_TH.clone().requires_grad_()
        soft_T = token_losses(hidden_TH, self.weight_VH, self.labels_T, targets, Divergence())[1]
        return torch.autograd.grad(soft_T.sum(), hidden_TH)[0]


def demonstrations() -> list[Demonstration]:
    """What the herd's student is fine-tuned on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sft.jsonl"
        path.write_text(data_files(HerdSection.model_validate({}), seed=0)[path.name])
        return read_demonstrations(path, Data())


def training_rows() -> Sequence[TrainingRow]:
    """The same as token ids."""
    chat = ChatTemplate(load_tokenizer(HERD / "student"))
    return encode_demonstrations(demonstrations(), chat, 256).rows
