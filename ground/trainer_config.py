"""Settings that the light stages (sft, dpo) share: how long, how fast, how often to save."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import Field, model_validator

from ground.config import Section
from ground.errors import RecipeError


class TrainerSection(Section):
    """An optimizer run over rows; AdamW, linear warm-up, then the schedule."""

    learning_rate: float = Field(default=1e-5, gt=0)
    """Highest rate, reached after the warm-up."""
    rows_per_step: int = Field(default=64, ge=1)
    """Rows of an optimizer step, over all devices."""
    rows_per_pass: int = Field(default=16, ge=1)
    """Rows that one device holds in memory at once; the step is split accordingly."""
    epochs: float = Field(default=1.0, gt=0)
    """Passes over the rows; ignored where `max_steps` is set."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps, however many epochs they take."""
    max_seconds: float | None = Field(default=None, gt=0)
    """Wall-clock after which training stops early; for comparisons at equal time."""
    warmup: float = Field(default=0.05, ge=0, lt=1)
    """Share of the steps in which the rate rises from zero."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the rate falls after the warm-up."""
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    """Gradients longer than this are shortened to it."""
    router_balance: float | None = Field(default=None, ge=0)
    """Weight of the experts' balancing loss; the model's own by default, 0 turns it off."""
    save_every: int = Field(default=100, ge=1)
    """Steps between two checkpoints; the last step always makes one."""
    keep_checkpoints: int = Field(default=1, ge=1)
    log_every: int = Field(default=10, ge=1)
    """Steps between two lines of metrics."""

    @model_validator(mode="after")
    def _splits_evenly(self) -> Self:
        if self.rows_per_step % self.rows_per_pass and self.rows_per_step > self.rows_per_pass:
            raise ValueError(
                f"rows_per_step must be a multiple of rows_per_pass, got {self.rows_per_step} "
                f"and {self.rows_per_pass}"
            )
        return self

    def passes_per_step(self, num_processes: int) -> int:
        """Forward and backward passes that each process adds up before a step."""
        return max(1, self.rows_per_step // (self.pass_size(num_processes) * num_processes))

    def pass_size(self, num_processes: int) -> int:
        """Rows of one pass on one process; fewer than asked where a step has fewer."""
        return max(1, min(self.rows_per_pass, self.rows_per_step // num_processes))

    def require_divisible(self, num_processes: int) -> None:
        """Refuse a number of ranks that would make a step of another size.

        Raises:
            RecipeError: the rows of a step cannot be dealt out evenly.
        """
        rows = self.pass_size(num_processes) * self.passes_per_step(num_processes) * num_processes
        if rows != self.rows_per_step:
            raise RecipeError(
                f"{num_processes} ranks cannot share the {self.rows_per_step} rows of a step in "
                f"passes of {self.rows_per_pass}: they would make steps of {rows}",
                where="trainer.rows_per_step",
                fix=f"make rows_per_step a multiple of {num_processes} x rows_per_pass, or smaller "
                f"than that and a multiple of {num_processes}",
            )

    def num_steps(self, num_rows: int) -> int:
        """Optimizer steps over that many rows."""
        steps_per_epoch = math.ceil(num_rows / self.rows_per_step)
        return self.max_steps or max(1, round(self.epochs * steps_per_epoch))
