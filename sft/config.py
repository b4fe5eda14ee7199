"""Settings of the `sft` stage."""

from __future__ import annotations

from pydantic import Field

from distill.config import DistillSection
from ground.config import Section
from ground.trainer_config import TrainerSection


class SftSection(Section):
    """Light supervised fine-tuning: the assistant's turns of the demonstrations are imitated."""

    trainer: TrainerSection = TrainerSection()
    max_length: int = Field(default=2048, ge=8)
    """Longest conversation in tokens; longer rows are left out and reported, never cut."""
    distill: DistillSection | None = None
    """Learn from the teacher's stored word too (stage `targets`); left out, from the rows alone."""
