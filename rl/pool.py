"""The prompts of a run: those to train on and a slice that is only looked at."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ground.errors import DataError
from ground.records import Prompt
from rollout.seeds import sample_seed


@dataclass(frozen=True, slots=True)
class Pool:
    """Prompts, parted for good by a seeded hash of each one's content.

    Example:
        split_pool(prompts, 96, seed=0) → Pool(training=(…), validation=(… 96 …))
    """

    training: tuple[Prompt, ...]
    validation: tuple[Prompt, ...]


def split_pool(prompts: Sequence[Prompt], num_validation: int, seed: int) -> Pool:
    """Part a slice from the prompts, the same one whatever the order of the file.

    Raises:
        DataError: nothing would be left to train on.
    """
    if num_validation >= len(prompts):
        raise DataError(
            f"there must be more prompts than the validation slice takes ({num_validation}), "
            f"got {len(prompts)}",
            where="rl.validation.prompts",
            fix="lower rl.validation.prompts, or give more prompts",
        )
    shuffled = sorted(prompts, key=lambda prompt: sample_seed(seed, prompt.id, "validation", 0))
    return Pool(tuple(shuffled[num_validation:]), tuple(shuffled[:num_validation]))
