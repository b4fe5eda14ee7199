"""What both light stages need around a transformers Trainer: finite numbers, metrics, safe saves.

    fit:  resume from the newest sound checkpoint → steps (log, save) → done
          signal → finish the step, save, raise Interrupted
          NaN   → DivergedError before the weights are touched

The Trainer writes its own checkpoint folder to a scratch place; from there the files are committed
with hashes (ground.checkpoints), because the Trainer itself would load a damaged folder in silence.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ground.adapter import Adapter
from ground.checkpoints import Checkpoints, step_of
from ground.console import progress
from ground.errors import DivergedError
from ground.launch import Launch
from ground.metrics import Metrics
from ground.model import load_model
from ground.ranks import Ranks, lost_ranks
from ground.row_stream import RowStream
from ground.signals import Interrupted, Pending, held_signals
from ground.trainer_config import TrainerSection

_LEFT_OUT = ("training_args.bin", "README.md", "zero_to_fp32.py", "zero_to_torch.py")
"""Files of the Trainer that resuming does not need: a pickle, a card, scripts of DeepSpeed's."""
_ALONE = Ranks(Launch(), 0.0)


@dataclass(frozen=True)
class Fit:
    """Where a training run keeps what it writes.

    Example:
        Fit(directory=runs/tiny/sft, metrics=stage.metrics, checkpoints=…, max_seconds=None)
    """

    directory: Path
    metrics: Metrics
    checkpoints: Checkpoints
    max_seconds: float | None = None
    ranks: Ranks = _ALONE
    adapter: Adapter | None = None
    """What is trained of the model, if that is not all of it."""

    @property
    def scratch(self) -> Path:
        """Where the Trainer writes before a commit."""
        return scratch_of(self.directory)


def scratch_of(directory: Path) -> Path:
    """Folder beside the checkpoints, on the same file system, so that a commit can rename."""
    return directory / "checkpoints" / ".scratch"


def trainer_arguments(
    section: TrainerSection, *, num_rows: int, ranks: Ranks, seed: int, scratch: Path
) -> dict[str, object]:
    """Arguments of TrainingArguments (and of TRL's SFTConfig and DPOConfig) for a section.

    Raises:
        RecipeError: the ranks cannot share a step evenly.
    """
    num_steps, num_processes = section.num_steps(num_rows), ranks.num_ranks
    section.require_divisible(num_processes)
    return {
        "output_dir": str(scratch),
        "per_device_train_batch_size": section.pass_size(num_processes),
        "gradient_accumulation_steps": section.passes_per_step(num_processes),
        "max_steps": num_steps,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": section.schedule
        if section.schedule != "constant"
        else "constant_with_warmup",
        "warmup_steps": math.ceil(section.warmup * num_steps) if section.warmup else 0,
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "router_aux_loss_coef": section.router_balance,
        "logging_steps": section.log_every,
        "logging_first_step": True,
        "logging_nan_inf_filter": False,
        "save_strategy": "steps",
        "save_steps": section.save_every,
        "seed": seed % 2**32,
        "data_seed": seed % 2**32,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": not torch.cuda.is_available(),
        "ddp_backend": ranks.backend,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


@dataclass(frozen=True)
class Fitted:
    """What training left.

    Example:
        Fitted(steps=300)
        Fitted(steps=300, weights={"lm_head.weight": …})  # rank 0 where ranks hold parts of a model
    """

    steps: int
    weights: Mapping[str, Tensor] | None = None
    adapter: Adapter | None = None

    def whole(self, model: PreTrainedModel, base: Path) -> PreTrainedModel:
        """The trained model as one piece; called on rank 0.

        Args:
            model: what was trained, in parts where `weights` is set.
            base: what it was loaded from.
        """
        if self.adapter is not None:
            return self.adapter.merged()
        if self.weights is None:
            return model
        unset_hf_deepspeed_config()  # or the plain one would be split among the ranks too
        plain = load_model(base)
        plain.load_state_dict(dict(self.weights))
        return plain


def fit(trainer: FiniteLoss, where: Fit, *, resume: bool) -> Fitted:
    """Train to the end, or from the newest sound checkpoint on.

    Raises:
        DivergedError: a loss or gradient was not finite; the weights of the last checkpoint stand.
        Interrupted: a signal came to any rank; the step was finished and saved.
        InfraError: another rank is gone.
    """
    ranks = trainer.ranks = where.ranks
    trainer.adapter = where.adapter
    latest = where.checkpoints.latest() if resume and ranks.is_main else None
    latest = ranks.shared(latest)
    where.metrics.rewind(0 if latest is None else step_of(latest))
    trainer.remove_callback(PrinterCallback)
    with held_signals() as pending, lost_ranks(ranks.launch, "train on", ranks.seconds):
        watch = _Watch(trainer, where, pending)
        trainer.add_callback(watch)
        trainer.train(resume_from_checkpoint=None if latest is None else str(latest))
        weights = None if watch.stopped_by else _gathered(trainer)
    if watch.stopped_by:
        raise Interrupted(watch.stopped_by)
    if ranks.is_main:
        shutil.rmtree(where.scratch, ignore_errors=True)
    return Fitted(trainer.state.global_step, weights, where.adapter)


def _gathered(trainer: FiniteLoss) -> Mapping[str, Tensor] | None:
    """Whole weights on rank 0 where the ranks hold parts; all ranks must ask together."""
    if trainer.ranks.launch.kind not in ("zero3", "fsdp2"):
        return None
    return cast(
        Mapping[str, Tensor] | None, trainer.accelerator.get_state_dict(trainer.model_wrapped)
    )


class FiniteLoss(Trainer):
    """A trainer over a RowStream that stops at the first loss that is not finite.

    Stands first among the bases. All ranks stop at a loss that is not finite on one of them.
    """

    ranks = _ALONE
    adapter: Adapter | None = None

    def __init__(self, *, args: TrainingArguments, **kwargs: object) -> None:
        args._n_gpu = min(args.n_gpu, 1)  # or a step would have its rows once for each GPU in sight
        if args.deepspeed_plugin is not None:  # or no model could be made of ZeRO-3's parts
            zero = args.deepspeed_plugin.deepspeed_config["zero_optimization"]
            zero["stage3_gather_16bit_weights_on_model_save"] = True
        super().__init__(args=args, **kwargs)  # pyright: ignore[reportArgumentType]

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> RowStream:
        args, rows = self.args, cast(Dataset, train_dataset or self.train_dataset)
        passes = args.max_steps * args.gradient_accumulation_steps
        wanted = passes * args.per_device_train_batch_size * args.world_size
        return RowStream(len(rows), wanted, args.seed)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        """Of a model with an adapter a checkpoint holds the adapter alone."""
        if self.adapter is None:
            super()._save(output_dir, state_dict)
            return
        folder = Path(output_dir or str(self.args.output_dir))
        folder.mkdir(parents=True, exist_ok=True)
        self.adapter.write(folder)

    def _load_from_checkpoint(
        self, resume_from_checkpoint: str, model: nn.Module | None = None
    ) -> None:
        if self.adapter is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        self.adapter.load(Path(resume_from_checkpoint))

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> object:
        """The loss of the trainer next in line, checked before its backward pass."""
        result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        loss = result[0] if isinstance(result, tuple) else result
        is_finite = bool(torch.isfinite(loss).all())
        if self.ranks.any(not is_finite):
            got = "that of another rank is not" if is_finite else f"got {loss.item()}"
            raise _diverged(f"the loss must be finite, {got}", self.state.global_step)
        return result


class _Watch(TrainerCallback):
    """Hears what the Trainer does and writes it down our way."""

    def __init__(self, trainer: FiniteLoss, where: Fit, pending: Pending) -> None:
        self._trainer = trainer
        self._where = where
        self._pending = pending
        self._began = time.monotonic()
        self.stopped_by = 0
        """The signal that all ranks have stopped for, whichever of them it came to."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """The model is wrapped now: as it was asked for?"""
        ranks = self._where.ranks
        ranks.check(args.world_size, cast(nn.Module, self._trainer.model_wrapped))

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Stop before a gradient that is not finite reaches the weights.

        DeepSpeed has stepped already when this is called, unless the norm was not finite: then it
        has left the weights alone.
        """
        if self._where.ranks.launch.is_zero:
            is_finite = not self._trainer.accelerator.optimizer_step_was_skipped
        else:
            gradients = [p.grad for p in model.parameters() if p.grad is not None] if model else []
            is_finite = not gradients or bool(torch.isfinite(nn.utils.get_total_norm(gradients)))
        if not is_finite:
            raise _diverged("the gradient must be finite, got NaN or infinity", state.global_step)

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """End early, with a checkpoint, on a signal or when the time is up."""
        limit = self._where.max_seconds
        out_of_time = limit is not None and time.monotonic() - self._began > limit
        self.stopped_by, is_late = self._where.ranks.greatest(
            self._pending.number or 0, int(out_of_time)
        )
        if self.stopped_by or is_late:
            control.should_save = True
            control.should_training_stop = True

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, object] | None = None,
        **kwargs: object,
    ) -> None:
        """A record of metrics and a line of progress; the Trainer's closing summary is left out."""
        numbers = {k: v for k, v in (logs or {}).items() if isinstance(v, int | float)}
        if "loss" not in numbers or not state.is_world_process_zero:
            return
        self._where.metrics.log(state.global_step, numbers)
        progress(
            self._where.directory, state.global_step, state.max_steps, loss=float(numbers["loss"])
        )

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: object,
    ) -> None:
        """Commit what the Trainer has just written, once every rank has written its part."""
        self._trainer.accelerator.wait_for_everyone()
        if state.is_world_process_zero:
            written = self._where.scratch / f"checkpoint-{state.global_step}"
            self._where.checkpoints.commit(
                state.global_step, lambda folder: _move(written, folder), {}
            )
            shutil.rmtree(self._where.scratch, ignore_errors=True)
        self._trainer.accelerator.wait_for_everyone()


def _move(written: Path, folder: Path) -> None:
    for file in sorted(written.iterdir()):
        if file.name not in _LEFT_OUT:
            file.rename(folder / file.name)


def _diverged(what: str, step: int) -> DivergedError:
    return DivergedError(
        what,
        where=f"step {step + 1}",
        why="the weights were not touched by it; the last checkpoint is sound",
        fix="lower trainer.learning_rate, or look for broken rows, and start the stage again",
    )
