"""What may be bad about an answer apart from its result: faults of form, told by rule.

    answers to one prompt → typical: passed, clean, best reward, middle length
                          → fault_of each, measured by the typical one

The rules are narrow on purpose: what they name is a fault, and they overlook what takes a reader.
An answer that got no verdict (its verifier died) is blamed for nothing that takes one.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import Literal, Protocol, TypeVar, get_args

from ground.answers import final_answer
from ground.records import Finish

Fault = Literal[
    "truncated",
    "repetition",
    "language_mix",
    "needless_refusal",
    "format_break",
    "length_outlier",
]
FAULTS: tuple[Fault, ...] = get_args(Fault)
"""From the plainest to the vaguest; an answer with several is named by the first."""

OUTLIER_RATIO = 2.0
OUTLIER_TOKENS = 8

_FORMAT_MARKS = re.compile(r"\\boxed\{|<answer>|####|=>|```|(?i:\banswer\s*:)")
_LEAST_UNIT, _MOST_UNIT, _LEAST_REPEATS = 4, 200, 3
_REFUSAL = re.compile(
    r"\W*(?:(?:i['\u2019]?m|i am|we['\u2019]?re|we are)?\s*(?:very |so )?sorry\b"
    r"|(?:unfortunately\W+)?(?:i|we) (?:can['\u2019]t|cannot|can not|won['\u2019]t|must decline"
    r"|(?:am|are|['\u2019]m) (?:not able|unable))\b"
    r"|i apologi[sz]e\b|as an ai\b)",
    re.IGNORECASE,
)
_LEAST_LETTERS = 2
_WITH_KANA = dict.fromkeys(("CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"), "CJK")
_SCRIPTS = _WITH_KANA | {
    name: name
    for name in (
        "ARABIC", "ARMENIAN", "BENGALI", "CYRILLIC", "DEVANAGARI", "ETHIOPIC", "GEORGIAN",
        "GUJARATI", "HANGUL", "HEBREW", "KANNADA", "KHMER", "LAO", "MALAYALAM", "MYANMAR",
        "SINHALA", "TAMIL", "TELUGU", "THAI", "TIBETAN",
    )
}  # fmt: skip
"""Scripts by the first word of their letters' names; Latin and Greek are at home anywhere."""


class Judged(Protocol):
    """An answer with its verdict: a `Rollout`, or what a groups file tells of one."""

    @property
    def text(self) -> str: ...
    @property
    def finish(self) -> Finish: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def reward(self) -> float: ...
    @property
    def passed(self) -> bool: ...
    @property
    def error(self) -> str: ...


J = TypeVar("J", bound=Judged)


def typical(answers: Sequence[J]) -> J | None:
    """The clean right answer of the highest reward, of middle length among several.

    Not the shortest one: in a model that has learnt to work things out that is a lucky guess.

    Example:
        right answers of 3, 20 and 22 tokens → the one of 20; of 3 and 20 → the one of 20
    """
    clean = [
        answer
        for answer in answers
        if answer.passed
        and answer.finish == "stop"
        and answer.text.strip()
        and not is_looping(answer.text)
    ]
    best = max((answer.reward for answer in clean), default=0.0)
    middle = sorted(
        (answer for answer in clean if answer.reward == best), key=lambda each: each.num_tokens
    )
    return middle[len(middle) // 2] if middle else None


def fault_of(
    answer: Judged,
    model: Judged | None,
    question: str = "",
    *,
    ratio: float = OUTLIER_RATIO,
    tokens: int = OUTLIER_TOKENS,
) -> Fault | None:
    """The plainest fault of form of an answer; None when there is none.

    Args:
        model: the typical right answer to the same prompt; without one only truncation and
            repetition can be told.
        question: what was asked, whose scripts are no foreign ones.
        ratio: a length outlier has more than so many times the tokens of the model, or, if it
            failed, less than that part of them: it skipped the work.
        tokens: … and differs by at least so many.
    """
    failed = not answer.passed and not answer.error
    faults: dict[Fault, bool] = {
        "truncated": answer.finish == "length",
        "repetition": is_looping(answer.text),
    }
    if model is not None:
        long, short = answer.num_tokens - model.num_tokens, model.num_tokens - answer.num_tokens
        faults |= {
            "language_mix": bool(foreign_scripts(answer.text, question + model.text)),
            "needless_refusal": failed and is_refusal(answer.text) and not is_refusal(model.text),
            "format_break": failed and breaks_format(answer.text, model.text),
            "length_outlier": (long >= tokens and answer.num_tokens > ratio * model.num_tokens)
            or (failed and short >= tokens and model.num_tokens > ratio * answer.num_tokens),
        }
    return next((fault for fault in FAULTS if faults.get(fault)), None)


def is_looping(text: str) -> bool:
    """Whether a text ends in the same 4 to 200 characters three times over, white space aside.

    Example:
        "2+2 => 4 => 4 => 4" → True;  "1000000" → False
    """
    text = " " + " ".join(text.split())
    for length in range(_LEAST_UNIT, min(_MOST_UNIT, len(text) // _LEAST_REPEATS) + 1):
        unit = text[-length:]
        if len(set(unit)) > 1 and text.endswith(unit * _LEAST_REPEATS):
            return True
    return False


def is_refusal(text: str) -> bool:
    """Whether a text opens as English refusals do ("I'm sorry, but …", "As an AI …")."""
    return _REFUSAL.match(text) is not None


def breaks_format(text: str, model: str) -> bool:
    """Whether a text lacks a sign of form that the model has, or answers more often than once.

    Example:
        model "4;+5=9=>9": "9" → True, "=>" → True, "=>8 =>9" → True, "4;+5=8=>8" → False
    """
    given, wanted = format_marks(text), format_marks(model)
    lacks = bool(final_answer(model)) and not final_answer(text)
    once = [mark for mark, count in wanted.items() if count == 1]
    return lacks or not given.keys() >= wanted.keys() or any(given[mark] > 1 for mark in once)


def format_marks(text: str) -> Counter[str]:
    """Signs by which answers are found, and how many: boxes, answer tags, arrows, code fences."""
    return Counter(re.sub(r"\s", "", mark).lower() for mark in _FORMAT_MARKS.findall(text))


def foreign_scripts(text: str, known: str) -> set[str]:
    """Scripts of which a text has two letters or more, and the known text none.

    Example:
        "九个 in all" where English was asked and answered → {"CJK"}; "2πr" → none
    """
    if text.isascii():
        return set()
    counts = Counter(map(_script, text))
    seen = {script for script, count in counts.items() if count >= _LEAST_LETTERS}
    return seen - {"", *map(_script, known)}


def _script(letter: str) -> str:
    return _SCRIPTS.get(unicodedata.name(letter, "").partition(" ")[0], "")
