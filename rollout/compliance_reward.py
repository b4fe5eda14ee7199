"""The `compliance` reward: does a completion keep the constraints that its prompt states?

For prompts whose whole task is to answer in some form. A prompt's `answer` is JSON, a constraint
such as {"constraint": "max_words", "value": 50} or a list of them.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence

from ground.constraints import NAMES, Constraint, ConstraintName, value_problem
from ground.errors import DataError
from rollout.rewards import Score, Turn, reward


@reward("compliance")
def compliance(
    prompts: Sequence[list[Turn]],
    completions: Sequence[list[Turn]],
    answer: Sequence[str],
    **columns: object,
) -> list[Score]:
    """The share of the constraints that are kept; solved is all of them.

    Example:
        answer {"constraint": "max_words", "value": 2}: "no more" → 1, "a few words" → 0, "" → 0
    """
    return [
        _score(completion[-1]["content"], _constraints(asked))
        for completion, asked in zip(completions, answer, strict=True)
    ]


def _score(text: str, constraints: tuple[Constraint, ...]) -> Score:
    kept = {each.name: float(each.holds(text)) for each in constraints}
    share = sum(each.holds(text) for each in constraints) / len(constraints)
    return Score(share, share == 1, kept)


@functools.lru_cache(maxsize=4096)
def _constraints(answer: str) -> tuple[Constraint, ...]:
    try:
        asked = json.loads(answer)
        found = tuple(map(_constraint, asked if isinstance(asked, list) else [asked]))
        if not found:
            raise ValueError("no constraint")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            'answer must be JSON like {"constraint": "max_words", "value": 50} or a list of such, '
            f"got {answer[:80]!r} ({type(error).__name__}: {error})",
            where="reward compliance",
            fix=f"known constraints: {', '.join(NAMES)}",
        ) from None
    return found


def _constraint(asked: dict[str, object]) -> Constraint:
    name, value = asked["constraint"], asked["value"]
    known: ConstraintName | None = next((each for each in NAMES if each == name), None)
    if known is None:
        raise ValueError(f"unknown constraint {name!r}")
    problem = value_problem(known, value)
    if problem or not isinstance(value, int | str):
        raise ValueError(problem)
    return Constraint(known, value)
