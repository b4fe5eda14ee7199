"""The `math` reward: is the final answer the same number or expression as the reference?

Plain numbers are compared as exact fractions. Anything else goes to math-verify, and there only
through its LaTeX grammar: its other path hands text to sympy's `parse_expr`, which evaluates
Python. Even so an expression may compute for ever (`9^{9^{9^9}}`), and math-verify's own alarms
work in a main thread only; therefore they are off and the reward pool's killable processes set the
deadline.
"""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Sequence
from fractions import Fraction

from math_verify import LatexExtractionConfig, parse, verify
from sympy import Basic, MatrixBase

from ground.answers import final_answer
from ground.errors import DataError
from rollout.rewards import Turn, reward

Expression = Basic | MatrixBase | str

MAX_ANSWER = 512
"""Characters of a final answer; a longer one is wrong."""
_CONFIG = (LatexExtractionConfig(boxed_match_priority=0),)
_NUMBER = re.compile(
    r"[-+]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+|\d+/0*[1-9]\d*)", re.ASCII
)
_DECORATION = re.compile(r"\\?[$€£]|\\[,!;()\[\]]")
_UNIT = re.compile(r"(?<=\d)\s+(?!hundred|thousand|million|billion|dozen)[a-z]{2,}(?:[ -][a-z]+)*")

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its alarms are off


@reward("math")
def math(
    prompts: Sequence[list[Turn]],
    completions: Sequence[list[Turn]],
    answer: Sequence[str],
    **columns: object,
) -> list[float]:
    """1 if the final answer equals the reference; which may be a whole GSM8K solution (`#### 72`).

    A completion without a final answer (`ground.answers`) is searched for LaTeX in its last line.

    Example:
        answer "… #### 1,000": "A: $1000.00" → 1;  answer "1/2": "\\\\boxed{\\\\frac{2}{4}}" → 1
    """
    return [
        float(equal_answers(_given(completion[-1]["content"]), right))
        for completion, right in zip(completions, answer, strict=True)
    ]


def equal_answers(given: str, reference: str) -> bool:
    """Whether an answer is worth the same as the reference.

    Raises:
        DataError: the reference is not a mathematical expression.
    """
    if len(given) > MAX_ANSWER:
        return False
    wanted = final_answer(reference)
    number, expressions = _reference(reference if wanted is None else wanted)
    given_number = as_number(_UNIT.sub("", given))
    if number is not None and given_number is not None:
        return number == given_number
    return bool(given) and verify(expressions, _latex(given), timeout_seconds=None)


def as_number(text: str) -> Fraction | None:
    """A plain number, exactly: "$1,234.50" → 2469/2; None when it is anything else."""
    bare = _DECORATION.sub("", text).strip(" \t\n*").removesuffix(".")
    return Fraction(bare.replace(",", "")) if _NUMBER.fullmatch(bare) else None


def _given(text: str) -> str:
    answer = final_answer(text)
    if answer is not None:
        return answer.partition("\n")[0]
    last = text.strip().rpartition("\n")[2]
    return last if "$" in last or "\\" in last else ""


def _latex(text: str) -> list[Expression]:
    """Expressions in a LaTeX text; the parser finds bare text only between delimiters."""
    marked = text if re.search(r"\$.+\$|\\[(\[]", text) else rf"\boxed{{{text}}}"
    return parse(marked, _CONFIG, parsing_timeout=0)


@functools.lru_cache(maxsize=4096)
def _reference(answer: str) -> tuple[Fraction | None, list[Expression]]:
    number, expressions = as_number(answer), _latex(answer)
    if number is None and not expressions:
        raise DataError(
            f"a reference answer must be a number or LaTeX, got {answer[:80]!r}",
            where="reward math",
        )
    return number, expressions
