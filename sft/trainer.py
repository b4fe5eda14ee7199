"""The one place that knows TRL's SFTTrainer; held to what we assume by tests/test_sft_trainer.py.

TRL gets rows that are tokenised and labelled already. Its loss comes from hidden states in chunks,
so that no [B, T, V] tensor exists, and is divided by the trained tokens of the whole step, so that
it does not depend on how a step is split into passes. With a teacher the loss is ours
(distill/loss.py), over the same hidden states and the same denominator.

B rows of a pass, T predicted tokens of a row, N trained tokens of the pass, H hidden size.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import cast

from datasets import Dataset, Features, Sequence, Value
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from distill.loss import Divergence, distill_loss, token_losses
from distill.targets import TeacherTargets
from ground.logprobs import head_weight
from ground.ranks import Ranks
from ground.row_stream import RowStream
from ground.stage_export import config_kept
from ground.trainer_config import TrainerSection
from ground.training import FiniteLoss, Fit, Fitted, fit, trainer_arguments
from ground.training_rows import TrainingRow, TrainingRows
from sft.signals import Signals
from sft.soft import (
    Plain,
    Soft,
    SoftCollator,
    Stopwatch,
    Tally,
    capabilities,
    shares_of,
    trained_mask,
    unpacked,
)

_FEATURES = Features(
    {
        "input_ids": Sequence(Value("int64")),
        "labels": Sequence(Value("int64")),
        "row": Value("int64"),
    }
)
_WEIGHTING = "weighting.json"
"""What a checkpoint keeps of the shares."""


def run_sft(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    rows: TrainingRows,
    section: TrainerSection,
    where: Fit,
    *,
    seed: int,
    resume: bool,
    soft: Soft | None = None,
) -> Fitted:
    """Train `model` in place, on the rows alone or on the teacher's word as well."""
    arguments = trainer_arguments(
        section,
        num_rows=len(rows.rows),
        ranks=where.ranks,
        seed=seed,
        scratch=where.scratch,
    )
    given = {"model": model, "train_dataset": _dataset(rows), "processing_class": tokenizer}
    with config_kept(model):
        args = SFTConfig(
            **arguments,  # pyright: ignore[reportArgumentType]
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=soft is None,
        )
        if soft is None:
            return fit(_Sft(args=args, **given), where, resume=resume)
        trainer = _DistilledSft(args=args, soft=soft, rows=rows.rows, ranks=where.ranks, **given)
        return fit(trainer, where, resume=resume)


class _Sft(FiniteLoss, SFTTrainer):
    """SFTTrainer that stops at the first loss that is not finite."""


class _Soft(SFTTrainer):
    """SFTTrainer whose loss mixes label and teacher, token by token."""

    def __init__(
        self, *, soft: Soft, rows: tuple[TrainingRow, ...], ranks: Ranks, **kwargs: object
    ) -> None:
        super().__init__(**kwargs)  # pyright: ignore[reportArgumentType]
        self._soft, self._rows, self._ranks = soft, rows, ranks
        self._names = capabilities(rows)
        plain = cast(Plain, self.data_collator)
        self._collator = SoftCollator(plain, soft.store, rows)
        self.data_collator = self._collator
        self._tally, self._watch = Tally(self._names), Stopwatch()
        self._signals = Signals(
            soft.heldout,
            self._collator.read,
            heldout_at_once=soft.section.signal_heldout,
            temperature=soft.divergence.temperature,
            rows_per_pass=self.args.per_device_train_batch_size,
        )
        self._observed = 0
        model = cast(PreTrainedModel, self.model)
        model.forward = _soft_forward(model, soft.divergence)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: object) -> object:
        """As the base does; a resumed run goes on with the shares that it had."""
        if isinstance(resume_from_checkpoint, str):
            state = json.loads((Path(resume_from_checkpoint) / _WEIGHTING).read_bytes())
            self._soft.weighting.load_state_dict(state)
        return super().train(resume_from_checkpoint, **kwargs)  # pyright: ignore[reportArgumentType]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Tensor:
        """(1 - share) CE + share KL of each trained token, over the tokens of the whole step."""
        self._observe()
        targets = unpacked(inputs, self._soft.store.kind)
        capability_B = inputs.pop("capability_B")
        trained_BT = trained_mask(inputs["labels"])
        hard_N, soft_N, balance = model(**inputs, targets=targets, balanced=self.aux_loss_enabled)
        names = [self._names[index] for index in capability_B.tolist()]
        shares_N = shares_of(
            self._soft.weighting, self.state.global_step, names, targets, trained_BT
        )
        capability_N = capability_B[:, None].expand_as(trained_BT)[trained_BT]
        self._tally.add(hard_N, soft_N, shares_N, targets, capability_N)
        count = trained_BT.sum() if num_items_in_batch is None else num_items_in_batch
        loss = distill_loss(hard_N, soft_N, shares_N, count)
        if num_items_in_batch is not None:  # of all ranks, whose gradients are averaged
            loss = loss * self.accelerator.num_processes
        if balance is not None:
            loss = (
                loss
                + self.router_aux_loss_coef * balance / self.current_gradient_accumulation_steps
            )
        return loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """A line of metrics, with what the tally of all ranks says."""
        if "loss" in logs:
            self._tally.add_misfits(self._collator.take_misfits())
            sums = self.accelerator.reduce(self._tally.sums.to(self.args.device), reduction="sum")
            logs.update(self._tally.metrics(cast(Tensor, sums).cpu()))
            if self._soft.weighting.observe_every:
                logs["signal_share"] = self._watch.share()
            self._tally.clear()
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: object) -> None:
        super()._save_checkpoint(model, trial)
        if self.is_world_process_zero():
            folder = Path(str(self.args.output_dir)) / f"checkpoint-{self.state.global_step}"
            state = json.dumps(self._soft.weighting.state_dict(), sort_keys=True)
            (folder / _WEIGHTING).write_text(state, encoding="utf-8")

    def _observe(self) -> None:
        """Before every so manieth step, once: the weighting learns from held-out rows."""
        step, every = self.state.global_step, self._soft.weighting.observe_every
        if not every or step == self._observed or step % every:
            return
        self._observed = step
        args = self.args
        rows_per_step = args.gradient_accumulation_steps * args.per_device_train_batch_size
        end = step * rows_per_step * args.world_size
        begin = max(end - self._soft.section.signal_rows, 0)
        with self._watch:
            last = list(islice(cast(RowStream, self._get_train_sampler()), begin, end))
            model = cast(PreTrainedModel, self.accelerator.unwrap_model(self.model))
            rows = [self._rows[row] for row in last]
            self._signals.observe(model, rows, self._soft.weighting, step=step)
        state = self._ranks.shared(self._soft.weighting.state_dict())
        self._soft.weighting.load_state_dict(state)


class _DistilledSft(FiniteLoss, _Soft):
    """The same, stopping at the first loss that is not finite."""


def _soft_forward(model: PreTrainedModel, divergence: Divergence) -> Callable[..., object]:
    """A forward pass for wrappers to hook into: hard and soft loss of each trained token.

    Without targets it is the model's own.
    """
    own = model.forward

    def forward(
        *args: object,
        targets: TeacherTargets | None = None,
        balanced: bool = False,
        **inputs: object,
    ) -> object:
        if targets is None:
            return own(*args, **inputs)
        labels_BT = cast(Tensor, inputs.pop("labels"))
        wanted = {"output_router_logits": True} if balanced else {}
        backbone = cast(PreTrainedModel, model.base_model)
        output = backbone(**inputs, use_cache=False, **wanted)
        trained_BT = trained_mask(labels_BT)
        hidden_NH = output.last_hidden_state[:, :-1][trained_BT]
        labels_N = labels_BT[:, 1:][trained_BT]
        losses = token_losses(hidden_NH, head_weight(model), labels_N, targets, divergence)
        return (*losses, _balance(model, output, inputs["attention_mask"]) if balanced else None)

    return forward


def _balance(model: PreTrainedModel, output: BaseModelOutput, mask_BT: object) -> Tensor:
    """The router's balancing loss, as TRL computes it for a plain SFT."""
    config = model.config.get_text_config()
    loss = load_balancing_loss_func(
        output.router_logits,  # pyright: ignore[reportAttributeAccessIssue]
        config.num_experts,
        config.num_experts_per_tok,
        cast(Tensor, mask_BT),
    )
    return cast(Tensor, loss)


def _dataset(rows: TrainingRows) -> Dataset:
    columns = {
        "input_ids": [list(row.input_ids) for row in rows.rows],
        "labels": [list(row.labels) for row in rows.rows],
        "row": list(range(len(rows.rows))),
    }
    return Dataset.from_dict(columns, features=_FEATURES)
