"""The `reasoning_gym` reward: the task family's own verifier judges the final answer.

A prompt's `answer` is JSON: {"family": "chain_sum", "answer": "6", "metadata": {…}}.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence

from reasoning_gym import get_score_answer_fn

from ground.answers import final_answer
from ground.errors import DataError
from rollout.rewards import Score, Turn, reward

Verifier = Callable[..., float]


@reward("reasoning_gym")
def reasoning_gym(
    prompts: Sequence[list[Turn]],
    completions: Sequence[list[Turn]],
    answer: Sequence[str],
    **columns: object,
) -> list[Score]:
    """1 if the family's verifier gives full marks, else 0.

    The verifiers' partial credit (a share for an answer that merely contains the right one) is kept
    in the parts, out of the reward: it would pay for listing many guesses.
    """
    return [
        _judge(final_answer(completion[-1]["content"]), right)
        for completion, right in zip(completions, answer, strict=True)
    ]


def _judge(given: str | None, reference: str) -> Score:
    entry, verifier = _read(reference)
    if given is None:
        return Score(0.0, False, {"answered": 0.0, "verifier": 0.0})
    marks = float(verifier(given, entry={**entry, "metadata": dict(entry["metadata"])}))
    return Score(float(marks >= 1.0), marks >= 1.0, {"answered": 1.0, "verifier": marks})


@functools.lru_cache(maxsize=4096)
def _read(reference: str) -> tuple[dict[str, dict[str, object]], Verifier]:
    try:
        entry = json.loads(reference)
        return {"metadata": {}, **entry}, _verifier(entry["family"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            'answer must be JSON like {"family": "chain_sum", "answer": "6", "metadata": {}}, '
            f"got {reference[:80]!r} ({type(error).__name__}: {error})",
            where="reward reasoning_gym",
        ) from None


@functools.cache
def _verifier(family: str) -> Verifier:
    """Building a family's data set takes milliseconds, so it is done once."""
    return get_score_answer_fn(family)
