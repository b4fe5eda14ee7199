"""Which ranks a teacher can speak to."""

from __future__ import annotations

from ground.errors import SetupError
from ground.launch import Launch

_IN_PARTS = ("zero3", "fsdp2")


def require_whole_weights(launch: Launch, stage: str) -> None:
    """Refuse ranks that hold parts of a model.

    Raises:
        SetupError: the soft loss reads the LM head's weights as they are.
    """
    if launch.kind in _IN_PARTS:
        raise SetupError(
            f"{stage}.distill needs the whole model on each rank, got {launch}",
            where="accelerate launch",
            why="its loss reads the LM head's weights, of which each rank would hold a part",
            fix=f"use recipes/accelerate/ddp.yaml or zero2.yaml, or go without the teacher: "
            f"{stage}.distill=null{' targets=null' * (stage == 'sft')}",
        )
