"""Rewards that look at text only: `exact` compares the final answer, `format` its form."""

from __future__ import annotations

import re
from collections.abc import Sequence

from ground.answers import final_answer
from ground.errors import DataError
from rollout.rewards import Score, Turn, reward


@reward("exact")
def exact(
    prompts: Sequence[list[Turn]],
    completions: Sequence[list[Turn]],
    answer: Sequence[str],
    prompt_id: Sequence[str] = (),
    **columns: object,
) -> list[float]:
    """1 if the final answer is the reference answer, blanks at its ends and a last dot aside.

    Example:
        answer "9": "4;+5=9=>9" → 1, "the answer is 9." → 1, "=>09" → 0, "9" → 0 (no marker)

    Raises:
        DataError: a reference answer is empty, so that saying nothing would be right.
    """
    names = prompt_id or [f"of completion {number}" for number in range(len(answer))]
    wanted = [_reference(right, name) for right, name in zip(answer, names, strict=True)]
    return [
        float(_plain(final_answer(completion[-1]["content"]) or "") == right)
        for completion, right in zip(completions, wanted, strict=True)
    ]


@reward("format")
def well_formed(
    prompts: Sequence[list[Turn]],
    completions: Sequence[list[Turn]],
    answer: Sequence[str],
    **columns: object,
) -> list[Score]:
    """1 if the completion has the wanted form, right or wrong.

    The form is the prompt's `answer` read as a regular expression for the whole completion; an
    empty one asks for a final answer (`ground.answers`) on one line.

    Example:
        answer "": "4+5=>9" → 1, "4+5" → 0;  answer "[0-9]+": "9" → 1, "=>9" → 0
    """
    return [
        _form(completion[-1]["content"], pattern)
        for completion, pattern in zip(completions, answer, strict=True)
    ]


def _form(text: str, pattern: str) -> Score:
    if pattern:
        good = re.fullmatch(pattern, text, re.DOTALL) is not None
        return Score(float(good), good, {"matches": float(good)})
    answer = final_answer(text)
    answered, one_line = bool(answer), "\n" not in (answer or "")
    good = answered and one_line
    return Score(float(good), good, {"answered": float(answered), "one_line": float(one_line)})


def _reference(answer: str, name: str) -> str:
    plain = _plain(answer)
    if not plain:
        raise DataError(
            f"a reference answer must say something, got {answer!r}",
            where=f"reward exact, prompt {name}",
            fix="give the row an answer, or take it out",
        )
    return plain


def _plain(answer: str) -> str:
    return answer.strip().removesuffix(".")
