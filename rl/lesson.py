"""The soft term of a step: w KL on the tokens that the teacher spoke to, with its own denominator.

    words of the groups ─▶ targets of a pass ─▶ distances (distill/student.py) ─▶ weighed ─▶ numbers
                                                                     ▲
         new answers, their rewards ──▶ does the teacher agree? ─────┘ w (rl/agreement.py)

    L = L_rl / N_rl + (sum over taught tokens of w_d KL) / N_kd

N trained tokens of a pass, N_kd taught tokens of the whole step: those of every rank, which the
words themselves tell, so that neither split nor packing nor ranks change the loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from distill.config import AlignedWeight
from distill.loss import Divergence
from distill.reading import asked_row, read_word
from distill.targets import TeacherTargets, joined
from distill.weighting import Weighting, weighting_of
from distill.word import SaidRow, Teaching
from ground.errors import DataError
from rl.agreement import Agreement, Lead
from rl.batch import Row, Sequenced
from rl.config import RlSection


class Lesson:
    """What the learner needs of the teacher's word, from step to step.

    Example:
        lesson.begin(rows, step=3);  said = lesson.said(sequences);  …
        term_4N = lesson.term(said, distances_N, sequences)
    """

    def __init__(self, section: RlSection, teaching: Teaching) -> None:
        assert section.distill is not None
        self._section, self._settings, self._teaching = section, section.distill, teaching
        settings = self._settings
        self.divergence = Divergence(settings.divergence, settings.beta, settings.temperature)
        vocabulary = teaching.identity.vocabulary
        self._agreement: Agreement | None = None
        self._weighting: Weighting
        if isinstance(settings.weighting, AlignedWeight):
            self._weighting = self._agreement = Agreement(settings.weighting, section.steps)
        else:
            self._weighting = weighting_of(
                settings.weighting, num_steps=section.steps, vocab_size=vocabulary
            )
        self._names: list[str] = []
        self._step = self.num_taught = 0
        self._misfits = 0

    def begin(self, rows: Sequence[Row], step: int) -> None:
        """A step begins: whose word it is, and on how many tokens.

        Raises:
            DataError: a row has no word, or one of another teacher, tokenizer, template or format.
        """
        for row in rows:
            self._require_own(row)
        self._names = sorted({row.capability for row in rows})
        self._step, self._misfits = step, 0
        self.num_taught = sum(_said(row).num_tokens for row in rows)
        if self._agreement:
            self._agreement.see([self._lead(row) for row in rows])

    def said(self, sequences: Sequence[Sequenced], *, is_idle: bool = False) -> TeacherTargets:
        """The targets of all trained tokens of a pass, in the order of its mask.

        Args:
            is_idle: the pass has nothing to train, so nothing was said.
        """
        found = [self._read(row) for sequence in sequences for row in sequence]
        targets = joined([each for each, _ in found])
        if is_idle:
            return targets.slice(slice(0, 0))
        self._misfits += sum(misfits for _, misfits in found)
        return targets

    def term(
        self, said: TeacherTargets, soft_N: Tensor, capability_N: Sequence[str]
    ) -> tuple[Tensor, Tensor]:
        """The loss of each token, and its numbers for `metrics`, [4, N].

        Args:
            soft_N: distances between student and teacher.
        """
        spoken_N = said.is_supported_T
        entropy_N1, spoken_N1 = said.entropy_T[:, None], spoken_N[:, None]
        weights_N = self._weighting.weights(self._step, capability_N, entropy_N1, spoken_N1)[:, 0]
        places_N = torch.tensor([self._names.index(name) for name in capability_N])
        places_N = places_N.to(soft_N.device)
        loss_N = weights_N.to(soft_N.dtype) * soft_N
        numbers = (soft_N.detach(), weights_N, spoken_N, places_N)
        return loss_N, torch.stack([each.double() for each in numbers])

    def metrics(self, numbers: Tensor, misfits: float) -> dict[str, float]:
        """What is told of a step, from the numbers of all ranks' tokens."""
        soft_N, weights_N, spoken_N, places_N = numbers
        taught_N = spoken_N.bool()
        told = {"teacher_kl": _mean(soft_N[taught_N]), "untaught_tokens": 1 - _mean(spoken_N)}
        told |= {"distill_loss": self.loss(numbers), "distill_misfits": misfits}
        if self._agreement:
            agreement = self._agreement.by_capability
            told |= {f"teacher_agreement/{name}": agreement.get(name, 0.0) for name in self._names}
        for place, name in enumerate(self._names):
            own_N = taught_N & (places_N == place)
            told[f"teacher_kl/{name}"] = _mean(soft_N[own_N])
            told[f"distill_weight/{name}"] = _mean(weights_N[own_N])
        return told

    def loss(self, numbers: Tensor) -> float:
        """The term as a whole."""
        soft_N, weights_N, *_ = numbers
        return (weights_N * soft_N).sum().item() / max(self.num_taught, 1)

    @property
    def misfits(self) -> int:
        """Tokens of this rank's passes whose targets did not fit them, in this step."""
        return self._misfits

    def state_dict(self) -> dict[str, object]:
        """What a cut keeps."""
        return self._weighting.state_dict()

    def load_state_dict(self, state: Mapping[str, object]) -> None:
        """Go on from `state_dict()`."""
        self._weighting.load_state_dict(state)

    def _lead(self, row: Row) -> Lead:
        said, _ = self._read(row)
        behavior = [logprob for logprob, own in zip(row.behavior, row.trained, strict=True) if own]
        nats_T = said.realised_T.double() - torch.tensor(behavior, dtype=torch.float64)
        nats = nats_T[said.is_supported_T].sum().item()
        return Lead(row.capability, row.group, row.advantage, nats)

    def _read(self, row: Row) -> tuple[TeacherTargets, int]:
        vocabulary = self._teaching.identity.vocabulary
        labels = [token for token, own in zip(row.tokens, row.trained, strict=True) if own]
        return read_word(
            _said(row),
            asked_row(row.tokens, row.trained, vocabulary),
            torch.tensor(labels),
            self._settings.format,
            _name_of(row),
        )

    def _require_own(self, row: Row) -> None:
        if row.word is None:
            raise DataError(
                "a group must have its teacher's word before it is trained on, there is none",
                where=_name_of(row),
                fix="the run was begun without rl.distill: start the stage again (--from rl)",
            )
        if row.word.identity != self._teaching.identity.name:
            raise DataError(
                f"the word must be of {self._teaching.identity.teacher} as "
                f"{self._teaching.identity.name}, it is of {row.word.identity}: another teacher, "
                "tokenizer, template or format",
                where=_name_of(row),
                fix="give back the teacher that the run was begun with, or start the stage again "
                "(--from rl)",
            )


def _said(row: Row) -> SaidRow:
    assert row.word is not None, "begin has looked"
    return row.word.rows[row.index]


def _name_of(row: Row) -> str:
    return f"answer {row.index} of group {row.group}"


def _mean(values_N: Tensor) -> float:
    return values_N.mean().item() if len(values_N) else 0.0
