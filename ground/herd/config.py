"""The `herd` section: which models are made, from which lessons, and how much data is written."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from ground.config import Section


class Shape(Section):
    """A small Llama 4: dense layers and mixtures of experts in turn, the last one without RoPE."""

    hidden_size: int = Field(128, ge=16, multiple_of=16)
    num_layers: int = Field(4, ge=2, multiple_of=2)
    num_heads: int = Field(4, ge=1)
    num_key_value_heads: int = Field(2, ge=1)
    dense_size: int = Field(256, ge=16)
    """Width of the feed-forward net in dense layers."""
    expert_size: int = Field(64, ge=16)
    """Width of each expert, and of the expert that all tokens share."""
    num_experts: int = Field(4, ge=2)
    max_length: int = Field(512, ge=256, multiple_of=128)
    """Longest conversation in tokens."""


class Lessons(Section):
    """How a model of the herd is trained from nothing."""

    steps: int = Field(1500, ge=1)
    batch_size: int = Field(64, ge=1)
    matrix_lr: float = Field(0.02, gt=0)
    """Muon's learning rate, for all matrices but embedding and router."""
    other_lr: float = Field(8e-3, gt=0)
    """AdamW's learning rate, for everything else."""
    think: float = Field(0.45, ge=0, le=1)
    """Share of demonstrations with a scratchpad."""
    guess: tuple[float, float, float] = (0.0, 0.5, 0.9)
    """Share of direct answers that are guessed, on easy, medium and hard questions."""
    slip: tuple[float, float, float] = (0.0, 0.1, 0.2)
    """Share of thought answers that are wrong all the same."""
    judgements: float = Field(0.0, ge=0, le=1)
    """Share of rows that teach to judge difficulty."""


STUDENT = Shape.model_validate({})
TEACHER = Shape.model_validate({"hidden_size": 160, "dense_size": 320, "expert_size": 96})
STUDENT_LESSONS = Lessons.model_validate({})
TEACHER_LESSONS = Lessons.model_validate(
    {"steps": 900, "think": 0.95, "judgements": 0.25, "guess": (0, 0, 0), "slip": (0, 0, 0)}
)
"""A careful author's lessons, and those of a judge."""


NUM_FAMILIES, NUM_LEVELS = 7, 3
"""Of the tasks whose rows are written (ground/herd/families.py), told here without loading them."""


class HerdSection(Section):
    """The tiny herd of the demo: tokenizer, student, teacher, and data for all stages."""

    shipped: Path | None = None
    """Folder with `student` and `teacher`; by default the one in packtrain's tiny recipe."""
    rebuild: bool = False
    """Train both models anew instead of copying the shipped ones; takes minutes."""
    student: Shape = STUDENT
    teacher: Shape = TEACHER
    student_lessons: Lessons = STUDENT_LESSONS
    teacher_lessons: Lessons = TEACHER_LESSONS
    demonstrations_per_level: int = Field(150, ge=1)
    """Rows of sft.jsonl for each family and level."""
    prompts_per_level: int = Field(72, ge=1)
    """Rows of prompts.jsonl for each family and level."""
    heldout_per_level: int = Field(28, ge=1)
    """Rows of heldout.jsonl for each family and level."""
    think: float = Field(0.45, ge=0, le=1)
    """Share of demonstrations in sft.jsonl with a scratchpad, as in the student's own lessons. All
    of them are right: what SFT costs or gains is not the doing of wrong labels."""

    @property
    def num_prompts(self) -> int:
        """Rows of prompts.jsonl."""
        return NUM_FAMILIES * NUM_LEVELS * self.prompts_per_level
