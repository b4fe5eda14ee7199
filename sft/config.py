"""Settings of the `sft` stage."""

from __future__ import annotations

from pydantic import Field

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
