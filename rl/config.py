"""Settings of the `rl` stage."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from curation.config import CurriculumSection
from ground.config import Section
from rollout.config import EngineSection, FleetSection, SamplingSection


class LossSection(Section):
    """The policy loss."""

    kind: Literal["aipo"] = "aipo"
    """Truncated importance weights on every token (rl/loss.py)."""
    rho_max: float = Field(default=4.0, ge=1)
    """Truncation of pi / mu; LlamaRL uses 2 to 10."""


class OptimizerSection(Section):
    """AdamW at a constant rate after a linear warm-up."""

    learning_rate: float = Field(default=1e-5, gt=0)
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = Field(default=0.0, ge=0)
    warmup_steps: int = Field(default=0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)


class ValidationSection(Section):
    """A slice of the prompts that is only looked at; picks the weights that are exported."""

    prompts: int = Field(default=96, ge=0)
    """Taken from the pool by content hash, never trained on; 0 keeps the last weights."""
    samples: int = Field(default=2, ge=1)
    """Answers to each prompt, at the training temperature."""
    evaluate_every: int = Field(default=10, ge=1)
    """Versions between two looks; the last version is always looked at."""


class RlSection(Section):
    """Online RL: how much, how fresh, from what and where."""

    steps: int = Field(ge=1)
    """Optimizer steps, each of which publishes a version of the weights."""
    groups_per_step: int = Field(default=32, ge=1)
    """Slots that a step consumes; filtered ones make the batch smaller."""
    group_size: int = Field(default=8, ge=2)
    """Rollouts of a group; at least 2 to form a baseline."""
    max_staleness: int = Field(default=1, ge=0)
    """Versions between a sample's oldest token and the learner; 0 is synchronous training."""
    max_refills: int = Field(default=1, ge=0)
    """Draws that may replace a flat group, one after another."""
    sampling: SamplingSection = SamplingSection()
    engine: EngineSection = EngineSection()
    fleet: FleetSection = FleetSection()
    loss: LossSection = LossSection()
    optimizer: OptimizerSection = OptimizerSection()
    curriculum: CurriculumSection = CurriculumSection()
    validation: ValidationSection = ValidationSection()
    micro_batch_tokens: int = Field(default=8192, ge=1)
    """Tokens, padding included, of one forward and backward pass."""
    max_empty_steps: int = Field(default=3, ge=1)
    """Steps in a row without any group that teaches, before the run stops with the reasons."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of the learner; the workers have `engine.threads` each."""
    checkpoint_every: int = Field(default=10, ge=1)
    """Versions between two checkpoints; the last version is always kept."""
    checkpoints_kept: int = Field(default=2, ge=1)
    max_restarts: int = Field(default=2, ge=0)
    """Times that the run may go on from its last checkpoint after losing learner or controller."""
    step_deadline_seconds: float = Field(default=600.0, gt=0)
    """Longest wait for a step's groups or for a publication."""

    @model_validator(mode="after")
    def _samples_from_the_policy(self) -> Self:
        if self.sampling.temperature <= 0:
            raise ValueError("sampling.temperature must be positive in RL, got 0 (greedy)")
        return self
