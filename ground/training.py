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
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
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

from ground.checkpoints import Checkpoints, step_of
from ground.console import progress
from ground.entry import S, Stage
from ground.errors import DivergedError
from ground.manifest import digest
from ground.metrics import Metrics
from ground.signals import Pending, held_signals
from ground.trainer_config import TrainerSection

_LEFT_OUT = ("training_args.bin", "README.md")
"""Files of the Trainer that resuming does not need, the first of them a pickle."""


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

    @property
    def scratch(self) -> Path:
        """Where the Trainer writes before a commit."""
        return scratch_of(self.directory)


def scratch_of(directory: Path) -> Path:
    """Folder beside the checkpoints, on the same file system, so that a commit can rename."""
    return directory / "checkpoints" / ".scratch"


def trainer_arguments(
    section: TrainerSection, *, num_rows: int, num_processes: int, seed: int, scratch: Path
) -> dict[str, object]:
    """Arguments of TrainingArguments (and of TRL's SFTConfig and DPOConfig) for a section."""
    num_steps = section.num_steps(num_rows)
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
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }


def fit(trainer: Trainer, where: Fit, *, resume: bool) -> int:
    """Train to the end, or from the newest sound checkpoint on; returns the steps done.

    Raises:
        DivergedError: a loss or gradient was not finite; the weights of the last checkpoint stand.
        Interrupted: a signal came; the step was finished and saved.
    """
    latest = where.checkpoints.latest() if resume else None
    where.metrics.rewind(0 if latest is None else step_of(latest))
    trainer.remove_callback(PrinterCallback)
    with held_signals() as pending:
        trainer.add_callback(_Watch(trainer, where, pending))
        trainer.train(resume_from_checkpoint=None if latest is None else str(latest))
    shutil.rmtree(where.scratch, ignore_errors=True)
    return trainer.state.global_step


class FiniteLoss(Trainer):
    """Stops a trainer at the first loss that is not finite; stands first among the bases."""

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
        if not torch.isfinite(loss).all():
            raise _diverged(f"the loss must be finite, got {loss.item()}", self.state.global_step)
        return result


def stage_card(stage: Stage[S], base: Path) -> dict[str, object]:
    """What the model card of every stage tells first: where the model comes from."""
    return {
        "stage": stage.name,
        "run": stage.head.name,
        "base": f"{base.parent.name}/{base.name}",
        "recipe_sha256": digest(stage.run.path / "recipe.resolved.yaml").sha256,
        "seed": stage.head.seed,
    }


@contextmanager
def config_kept(model: PreTrainedModel) -> Iterator[None]:
    """Undo what a trainer writes into the model's config, which would be exported with it."""
    text_config = model.config.get_text_config()
    before = dict(text_config.to_dict())
    try:
        yield
    finally:
        for key in ("output_router_logits", "router_aux_loss_coef", "use_cache", "pad_token_id"):
            if key in before:
                setattr(text_config, key, before[key])


class _Watch(TrainerCallback):
    """Hears what the Trainer does and writes it down our way."""

    def __init__(self, trainer: Trainer, where: Fit, pending: Pending) -> None:
        self._trainer = trainer
        self._where = where
        self._pending = pending
        self._began = time.monotonic()

    def on_pre_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **kwargs: object,
    ) -> None:
        """Stop before a gradient that is not finite reaches the weights."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None] if model else []
        if gradients and not torch.isfinite(nn.utils.get_total_norm(gradients)):
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
        if self._pending.requested or out_of_time:
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
