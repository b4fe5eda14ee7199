"""Settings of a low-rank adapter, the same in sft, rl and dpo; torch-free, as every config is."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from ground.config import Section
from ground.errors import SetupError
from ground.launch import Launch


class LoraSection(Section):
    """Train a low-rank adapter instead of the weights (LoRA, Hu and others, arXiv 2106.09685).

    y = W x + (alpha / rank) · B A x: W stands still. B begins as zeros, so the model begins as it
    is. A learning rate about ten times that of full training suits it.

    Example:
        sft: {lora: {rank: 16, targets: [q_proj, v_proj]}, trainer: {learning_rate: 1e-4}}
    """

    rank: int = Field(default=16, ge=1)
    """Rows of A and columns of B."""
    alpha: float = Field(default=32.0, gt=0)
    """B A is multiplied with alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of A's inputs that a training pass leaves out; 0 in rl, where the sampler has none."""
    targets: list[str] | None = Field(default=None, min_length=1)
    """Linear maps that get an adapter, by the end of their name: `q_proj`, `self_attn.q_proj`. Left
    out: all of the language model but LM head, routers and routed experts."""
    init: Literal["uniform", "gaussian"] = "uniform"
    """What A is drawn from: Kaiming's uniform distribution, or the normal one of deviation
    1 / rank."""

    @property
    def scale(self) -> float:
        """What B A is multiplied with."""
        return self.alpha / self.rank

    def require_launch(self, launch: Launch, stage: str) -> None:
        """Refuse launchers that split what an adapter stands on.

        Raises:
            SetupError: ZeRO or FSDP2.
        """
        if launch.kind not in ("single", "ddp"):
            raise SetupError(
                f"{stage}.lora runs on one rank or with DDP, the launch file asks for {launch}",
                where="accelerate launch",
                why="ZeRO and FSDP2 split the base's weights or the moments among the ranks; an "
                "adapter is read, saved and merged where both are whole",
                fix=f"use recipes/accelerate/ddp.yaml (an adapter's moments are small), or take "
                f"{stage}.lora out",
            )
