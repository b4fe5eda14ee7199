"""Settings of the `sft` stage."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from distill.config import DistillSection
from ground.config import Section
from ground.lora import LoraSection
from ground.trainer_config import TrainerSection


class SftSection(Section):
    """Light supervised fine-tuning: the assistant's turns of the demonstrations are imitated."""

    trainer: TrainerSection = TrainerSection()
    max_length: int = Field(default=2048, ge=8)
    """Longest conversation in tokens; longer rows are left out and reported, never cut."""
    lora: LoraSection | None = None
    """Train a low-rank adapter and leave it beside the merged model; left out, all weights."""
    distill: DistillSection | None = None
    """Learn from the teacher's stored word too (stage `targets`), in this model or in an arm beside
    it; left out, from the rows alone."""

    @model_validator(mode="after")
    def _one_way_of_learning(self) -> Self:
        if self.lora and self.distill:
            raise ValueError(
                "lora and distill cannot be had together yet: distil into all weights, or leave "
                "the teacher out"
            )
        return self
