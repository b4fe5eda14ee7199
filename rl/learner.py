"""The optimizer's side of the loop: one plan in, one step of the weights, numbers out.

N trained tokens of the whole step, over all micro-batches and ranks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from transformers import PreTrainedModel

from ground.errors import DivergedError
from ground.logprobs import LogprobModel
from ground.model import tensors_of
from rl.batch import Row, collate, micro_batches, rows_of, token_ages
from rl.books import Plan
from rl.config import RlSection
from rl.loss import aipo, mismatch
from rl.snapshot import restore

_NO_TOKEN = -(10**9)
"""Fills up the shorter ranks' numbers when they are gathered; no log-prob is as low."""


class Learner:
    """A model and its optimizer on accelerate.

    The loss is divided once by the global number of trained tokens, so that neither the
    micro-batch split nor a split of the rows over ranks changes the update. The stage starts one
    rank (rl/supervisor.py).
    """

    def __init__(
        self, model: PreTrainedModel, accelerator: Accelerator, section: RlSection, pad_id: int
    ) -> None:
        self.model, self._accelerator, self._section = model, accelerator, section
        self._pad_id = pad_id
        settings = section.optimizer
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=settings.learning_rate,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        module, wrapped = accelerator.prepare(LogprobModel(model.train()), optimizer)
        self._module = cast(nn.Module, module)
        self._optimizer = cast(torch.optim.Optimizer, wrapped)

    def step(self, plan: Plan) -> dict[str, float]:
        """Take one optimizer step on a plan's groups; without groups nothing moves.

        Raises:
            DivergedError: loss or gradient is not finite; the weights are left as they were.
        """
        rows = [row for group in plan.groups for row in rows_of(group)]
        num_tokens = sum(row.num_trained for row in rows)
        if not num_tokens:
            return {}
        # One whole step: unless told so, accelerate skips it when another trainer of this process
        # was stopped between two of its passes.
        with self._accelerator.accumulate(self._module):
            loss, measured = self._accumulate(rows, num_tokens)
        grad_norm = self._clipped_grad_norm()
        if not math.isfinite(loss + grad_norm):
            self._optimizer.zero_grad()
            raise DivergedError(
                f"loss and gradient must be finite, got {loss:g} and a gradient norm {grad_norm:g}",
                where=f"rl, step {plan.step}",
                why=f"{len(rows)} rollouts were kept in the stage's diverged/ folder",
                fix="lower rl.optimizer.learning_rate, or look at the saved rollouts",
            )
        self._set_learning_rate(plan.step)
        self._optimizer.step()
        self._optimizer.zero_grad()
        ages = list(token_ages(plan.groups, plan.step))
        return {
            "loss": loss,
            "grad_norm": grad_norm,
            "trained_tokens": num_tokens,
            **measured,
            **_staleness(ages),
        }

    def model_tensors(self) -> dict[str, Tensor]:
        """CPU copies of the weights."""
        return tensors_of(self.model)

    def optimizer_tensors(self) -> dict[str, Tensor]:
        """CPU copies of AdamW's moments, `<parameter number>.<name>`, and torch's RNG state."""
        state = self._optimizer.state_dict()["state"]
        tensors = {
            f"{number}.{name}": value.detach().to("cpu", copy=True)
            for number, moments in state.items()
            for name, value in moments.items()
        }
        return {**tensors, "rng": torch.get_rng_state()}

    def load(self, model: dict[str, Tensor], optimizer: dict[str, Tensor]) -> None:
        """Go back to saved weights, moments and RNG state."""
        restore(self.model, model)
        torch.set_rng_state(optimizer.pop("rng"))
        state: dict[int, dict[str, Tensor]] = {}
        for key, value in optimizer.items():
            number, name = key.split(".", 1)
            state.setdefault(int(number), {})[name] = value
        groups = self._optimizer.state_dict()["param_groups"]
        self._optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _accumulate(self, rows: Sequence[Row], num_tokens: int) -> tuple[float, dict[str, float]]:
        """Backward over this rank's rows; returns the global loss and mismatch."""
        accelerator, world = self._accelerator, self._accelerator.num_processes
        own = sorted(rows, key=lambda row: -len(row.tokens))[accelerator.process_index :: world]
        seen: list[Tensor] = []
        for part in micro_batches(own, self._section.micro_batch_tokens):
            batch = collate(part, self._pad_id).to(accelerator.device)
            logprobs_BT, entropy_BT = self._module(
                batch.tokens_BT,
                batch.mask_BT,
                batch.loss_mask_BT,
                self._section.sampling.temperature,
            )
            mask_BT = batch.loss_mask_BT
            logprobs_N, behavior_N = logprobs_BT[mask_BT], batch.behavior_logprobs_BT[mask_BT]
            loss_N = aipo(
                logprobs_N, behavior_N, batch.advantages_BT[mask_BT], self._section.loss.rho_max
            )
            accelerator.backward(loss_N.sum() * (world / num_tokens))
            numbers = (loss_N, logprobs_N, behavior_N, entropy_BT[mask_BT])
            seen.append(torch.stack([number.detach() for number in numbers]))
        loss_N, logprobs_N, behavior_N, entropy_N = self._gathered(torch.cat(seen, dim=1))
        measured = mismatch(logprobs_N, behavior_N, self._section.loss.rho_max)
        measured["entropy"] = entropy_N.mean().item()
        return loss_N.sum().item() / num_tokens, measured

    def _gathered(self, numbers_4N: Tensor) -> Tensor:
        """The numbers of all ranks' tokens side by side."""
        if self._accelerator.num_processes == 1:
            return numbers_4N
        padded = self._accelerator.pad_across_processes(numbers_4N.T, pad_index=_NO_TOKEN)
        gathered = cast(Tensor, self._accelerator.gather(padded))
        return gathered[gathered[:, 1] > _NO_TOKEN].T

    def _clipped_grad_norm(self) -> float:
        limit = self._section.optimizer.max_grad_norm
        norm = self._accelerator.clip_grad_norm_(self._module.parameters(), limit)
        return float(cast(Tensor, norm))

    def _set_learning_rate(self, step: int) -> None:
        settings = self._section.optimizer
        share = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
        for group in self._optimizer.param_groups:
            group["lr"] = settings.learning_rate * share


def _staleness(ages: Sequence[tuple[int, int]]) -> dict[str, float]:
    """Versions between sampling and training: mean over tokens, newest, oldest, share above 0."""
    total = sum(count for _, count in ages)
    return {
        "staleness_mean": sum(age * count for age, count in ages) / total,
        "staleness_min": min(age for age, _ in ages),
        "staleness_max": max(age for age, _ in ages),
        "stale_share": sum(count for age, count in ages if age > 0) / total,
    }
