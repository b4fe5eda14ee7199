"""Settings of pruning, mining and the curriculum."""

from __future__ import annotations

from fractions import Fraction
from typing import Literal, Self

from pydantic import Field, model_validator

from ground.config import Section
from rollout.config import EngineSection, MeasureSection

PRESETS = {"small": 0.5, "behemoth": 0.95}
"""What Meta reports removing: over half of the SFT data for small models, 95 % for Behemoth."""


class JudgeSection(Section):
    """Who says how hard an SFT row is."""

    kind: Literal["label"] = "label"
    """`label`: the teacher's probabilities of the words easy, medium and hard."""
    min_label_mass: float = Field(default=0.01, ge=0, le=1)
    """Probability of the three words together below which an answer is garbage: `unjudged`."""
    max_unjudged: float = Field(default=0.2, ge=0, le=1)
    """The stage stops when a larger share of the rows is left unjudged."""


class PruneSection(Section):
    """Remove the easiest part of the SFT data."""

    judge: JudgeSection = JudgeSection()
    fraction: float | Literal["small", "behemoth"] = Field(default=0.5)
    """Share of the whole set that is removed; `small` is 0.5, `behemoth` 0.95."""
    per: Literal["capability", "all"] = "capability"
    """Remove the same share of every capability, or the easiest rows wherever they are."""
    engine: EngineSection = EngineSection()

    @model_validator(mode="after")
    def _a_share(self) -> Self:
        if not 0 <= self.share < 1:
            raise ValueError(f"fraction must be at least 0 and below 1, got {self.fraction}")
        return self

    @property
    def share(self) -> Fraction:
        """The fraction as it is written: 0.95 is 19/20, not the float beside it."""
        return Fraction(str(PRESETS.get(str(self.fraction), self.fraction)))


class MineSection(MeasureSection):
    """Measure how often the model solves each RL prompt."""

    temperature: float = Field(default=1.0, gt=0)
    """Of the samples, as RL will draw them."""
    solved_at: float = Field(default=0.9, gt=0, le=1)
    """Pass rate from which a prompt counts as solved."""
    shard_size: int = Field(default=512, ge=1)
    """Prompts after which the work is committed; --resume goes on behind the last one."""


class CurriculumSection(Section):
    """How draws follow from pass rates."""

    decay: float = Field(default=0.95, gt=0, le=1)
    """What a version leaves of older evidence: its policy is gone (MoPPS, arXiv 2507.04632)."""
    retire_at: float = Field(default=0.9, gt=0, le=1)
    """A prompt with this pass rate or more is solved (ScaleRL, arXiv 2510.13786)."""
    review_share: float = Field(default=0.02, ge=0, lt=1)
    """Share of the draws that look again at solved prompts and at those never solved yet."""
    round_every: int = Field(default=10, ge=1)
    """Versions after which what is known of the prompts is written to rl/curriculum."""
