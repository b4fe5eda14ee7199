"""The optimizer's side of the loop: one plan in, one step of the weights, numbers out.

    rows_of ─▶ pack ─▶ this rank's micro-batches ─▶ log-probs ─▶ policy_loss ─▶ backward (each)
            ─▶ numbers of all ranks ─▶ guards ─▶ update

Where a teacher speaks (rl/lesson.py) its term is added to each pass's loss, with a denominator of
its own.

N trained tokens of the whole step, over all micro-batches and ranks.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import PreTrainedModel

from distill.student import TaughtModel
from distill.targets import TeacherTargets
from distill.word import Teaching
from ground import faults
from ground.adapter import Adapter
from ground.logprobs import LogprobModel
from ground.model import copied, live_tensors
from rl.batch import Batch, Row, Sequenced, collate, micro_batches, pack, rows_of
from rl.buffer import Plan
from rl.config import RlSection
from rl.guards import EssBrake, check_finite
from rl.lesson import Lesson
from rl.loss import effective_share, fresh_gap, mismatch, oldest_of_rows
from rl.objective import Tokens, policy_loss
from rl.routing import RouterLoad
from rl.update import make_update

_MEASURED = 9
"""Numbers of a token that are there with or without a teacher."""


class Learner:
    """A model and its optimizer on accelerate.

    The loss is divided once by the global number of trained tokens, so that neither the
    micro-batch split nor packing nor a split of the rows over ranks changes the update. Every rank
    has one and all of them are called alike (rl/ensemble.py).
    """

    def __init__(
        self,
        model: PreTrainedModel,
        accelerator: Accelerator,
        section: RlSection,
        pad_id: int,
        adapter: Adapter | None = None,
        teaching: Teaching | None = None,
    ) -> None:
        self.model, self._accelerator, self._section = model, accelerator, section
        self._pad_id, self.adapter = pad_id, adapter
        self.lesson = Lesson(section, teaching) if teaching else None
        self._reference = None
        if section.loss.reference_kl:
            self._reference = _Reference(model, accelerator, adapter)
        self._routers = RouterLoad(model)
        self.brake = EssBrake(section.ess_floor, section.max_braked_steps)
        model.train()
        module = TaughtModel(model, self.lesson.divergence) if self.lesson else LogprobModel(model)
        self.update = make_update(module, accelerator, section.optimizer, adapter)

    def step(self, plan: Plan) -> dict[str, float]:
        """Take one optimizer step on a plan's groups; without groups nothing moves.

        Raises:
            DivergedError: loss or gradient is not finite, or too many steps in a row were braked;
                the weights are left as they were.
        """
        rows = rows_of(plan.groups, self._section.advantages, plan.step, plan.words)
        num_tokens = sum(row.num_trained for row in rows)
        if not num_tokens:
            return {}
        if self.lesson:
            self.lesson.begin(rows, plan.step)
        with self.update.stepping():
            loss, measured = self._accumulate(rows, num_tokens)
            check = partial(check_finite, loss, step=plan.step, num_rows=len(rows))
            brakes: list[float] = []

            def rate() -> float:
                brakes.append(self.brake.factor(measured["ess_applied"], plan.step))
                return self._learning_rate(plan.step) * brakes[0]

            grad_norm = self.update.apply(rate, check)
        return {
            "loss": loss,
            "grad_norm": grad_norm,
            "trained_tokens": num_tokens,
            "brake": brakes[0],
            **measured,
        }

    def live_tensors(self) -> dict[str, Tensor]:
        """What is trained, itself: all weights, or A and B of the adapter."""
        return self.adapter.live() if self.adapter else live_tensors(self.model)

    def model_tensors(self) -> dict[str, Tensor]:
        """CPU copies of what is trained."""
        with self.update.whole():
            return copied(self.live_tensors())

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """CPU copies of AdamW's moments, `<parameter number>.<name>`, and torch's RNG state."""
        return {**self.update.moments(), "rng": torch.get_rng_state()}

    def load(self, model: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """Go back to saved weights, moments and RNG state."""
        torch.set_rng_state(optimizer.pop("rng"))
        self.update.load(model, optimizer)

    def _accumulate(self, rows: Sequence[Row], num_tokens: int) -> tuple[float, dict[str, float]]:
        """Backward over this rank's rows; returns the global loss and what is measured."""
        accelerator, rank = self._accelerator, self._accelerator.process_index
        shares = _shares(pack(rows, self._section.pack_tokens), accelerator.num_processes)
        cuts = [micro_batches(share, self._section.micro_batch_tokens) for share in shares]
        passes = max(map(len, cuts))
        seen: list[Tensor] = []
        for number in range(passes):
            # Every rank makes as many passes as the busiest one, and reduces in the last.
            batch, said = self._pass(cuts[rank], number, spare=cuts[0])
            with self.update.passing(is_last=number == passes - 1):
                seen.append(self._backward(batch, said, num_tokens))
        counts = [_num_trained(share) for share in shares]
        numbers = self._gathered(torch.cat(seen, dim=1), counts)
        loss, measured = numbers[0].sum().item() / num_tokens, self._measured(numbers[:_MEASURED])
        if self.lesson:
            misfits = self._added_up(torch.tensor(float(self.lesson.misfits))).item()
            measured |= self.lesson.metrics(numbers[_MEASURED:], misfits)
            loss += measured["distill_loss"]
        return loss, measured

    def _pass(
        self, cut: Sequence[list[Sequenced]], number: int, spare: Sequence[list[Sequenced]]
    ) -> tuple[Batch, TeacherTargets | None]:
        """A pass of this rank, or one without loss when its rows are through; and what the teacher
        said to its tokens."""
        is_idle, device = number >= len(cut), self._accelerator.device
        sequences = spare[-1][-1:] if is_idle else cut[number]
        batch = collate(sequences, self._pad_id).to(device)
        said = self.lesson.said(sequences, is_idle=is_idle).to(device) if self.lesson else None
        return batch.without_loss() if is_idle else batch, said

    def _backward(self, batch: Batch, said: TeacherTargets | None, num_tokens: int) -> Tensor:
        """One pass; returns the numbers of its tokens, [9, N], and where there is a teacher four
        rows more."""
        mask_BT, temperature = batch.loss_mask_BT, self._section.sampling.temperature
        inputs = (batch.tokens_BT, batch.segments_BT, mask_BT, temperature)
        faults.point("step.forward")
        with self._routers.counting((batch.segments_BT != 0) & mask_BT.any()):
            asked = inputs if said is None else (*inputs, said)
            logprobs_BT, entropy_BT, *soft = self.update.module(*asked)
        reference_N = None
        if self._reference is not None:
            reference_N = self._reference.logprobs(*inputs)[mask_BT]
        tokens = Tokens(
            logprobs_N=logprobs_BT[mask_BT],
            behavior_N=faults.corrupted("step.behavior", batch.behavior_logprobs_BT[mask_BT]),
            advantages_N=batch.advantages_BT[mask_BT],
            ages_N=batch.ages_BT[mask_BT],
            rows_N=batch.segments_BT[mask_BT] - 1,
            reference_N=reference_N,
        )
        losses = policy_loss(self._section.loss, tokens)
        faults.point("step.backward")
        num_ranks = self._accelerator.num_processes
        loss, taught = losses.loss_N.sum() * (num_ranks / num_tokens), list[Tensor]()
        if self.lesson and said is not None:
            taught_N, numbers_4N = self.lesson.term(said, soft[0], batch.capabilities_of_trained)
            loss = loss + taught_N.sum() * (num_ranks / max(self.lesson.num_taught, 1))
            taught.append(numbers_4N)
        self.update.backward(loss)
        numbers = (
            losses.loss_N,
            tokens.logprobs_N,
            tokens.behavior_N,
            entropy_BT[mask_BT],
            tokens.ages_N,
            losses.weights_N,
            losses.clipped_N,
            losses.kept_N,
            oldest_of_rows(tokens.ages_N, tokens.rows_N),
        )
        return torch.cat([torch.stack([each.detach().double() for each in numbers]), *taught])

    def _measured(self, numbers: Tensor) -> dict[str, float]:
        """The metrics of a step from the numbers of all its tokens."""
        _, logprobs_N, behavior_N, entropy_N, ages_N, *applied, oldest_N = numbers
        weights_N, clipped_N, kept_N = applied
        return {
            **mismatch(logprobs_N, behavior_N),
            **fresh_gap(logprobs_N, behavior_N, oldest_N),
            "ess_applied": effective_share(weights_N),
            "clip_share": clipped_N.mean().item(),
            "masked_share": 1 - kept_N.mean().item(),
            "entropy": entropy_N.mean().item(),
            "staleness_mean": ages_N.mean().item(),
            "staleness_min": ages_N.min().item(),
            "staleness_max": ages_N.max().item(),
            "stale_share": (ages_N > 0).double().mean().item(),
            **self._routers.gauges(self._added_up),
        }

    def _gathered(self, numbers: Tensor, counts: Sequence[int]) -> Tensor:
        """The numbers of all ranks' tokens side by side.

        Args:
            counts: trained tokens of each rank.
        """
        if self._accelerator.num_processes == 1:
            return numbers
        padded = numbers.new_zeros(max(counts), len(numbers))
        padded[: numbers.shape[1]] = numbers.T
        gathered = cast(Tensor, self._accelerator.gather(padded[None]))
        parts = [part[:count] for part, count in zip(gathered, counts, strict=True)]
        return torch.cat(parts).T

    def _added_up(self, counts: Tensor) -> Tensor:
        total = self._accelerator.reduce(counts.to(self._accelerator.device), reduction="sum")
        return cast(Tensor, total)

    def _learning_rate(self, step: int) -> float:
        settings = self._section.optimizer
        share = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
        return settings.learning_rate * share


class _Reference:
    """The stage's first model: a copy that stays as it is, or what an adapter stands on."""

    def __init__(
        self, model: PreTrainedModel, accelerator: Accelerator, adapter: Adapter | None
    ) -> None:
        self._adapter = adapter
        kept = model if adapter else copy.deepcopy(model).eval().requires_grad_(False)
        self._module = LogprobModel(kept).to(accelerator.device)

    def logprobs(self, *inputs: Any) -> Tensor:
        """As `LogprobModel` gives them, without gradient."""
        was_training = self._module.training
        self._module.eval()
        with torch.no_grad(), self._adapter.off() if self._adapter else nullcontext():
            logprobs_BT = self._module(*inputs)[0]
        self._module.train(was_training)
        return logprobs_BT


def _shares(sequences: Sequence[Sequenced], num_ranks: int) -> list[list[Sequenced]]:
    """Deal sequences to the ranks, the longest ones first, so that all have alike."""
    ordered = sorted(sequences, key=lambda sequence: -sum(map(len, sequence)))
    return [ordered[rank::num_ranks] for rank in range(num_ranks)]


def _num_trained(sequences: Sequence[Sequenced]) -> int:
    return sum(row.num_trained for sequence in sequences for row in sequence)
