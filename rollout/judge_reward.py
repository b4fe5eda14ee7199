"""The `judge` reward: a model compares the answer with a reference (docs/rewards.md).

A model gives it, behind an engine and beside the reward processes, so what is registered here only
keeps the name, and tells whoever ends up here what is missing.
"""

from __future__ import annotations

from ground.errors import PacktrainError, RecipeError
from rollout.reward_pool import ScoredText
from rollout.rewards import Score, reward

JUDGE = "judge"
"""Name of the reward."""
AWAITING = ScoredText(0.0, False, error="awaiting: the judge's verdict")
"""What a rollout worker puts in the place of verdicts that are a judge's business."""


def _refuse() -> None:
    raise no_judge()


@reward(JUDGE, prepare=_refuse)
def judge(**columns: object) -> list[Score]:
    """Never called: a reward process that is asked to load it fails."""
    raise no_judge()


def no_judge(where: str = "") -> PacktrainError:
    """What to say where prompts want a judge and there is none."""
    return RecipeError(
        "prompts with `reward: judge` need a judge, and the recipe names none",
        where=where or "judge",
        fix="add a section `judge: {}`, which takes the teacher, or `judge: {model: {path: …}}`",
    )
