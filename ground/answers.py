"""Where the final answer of a completion stands.

Known conventions, the rightmost of which counts:

    2+2 => 4          the demo's marker
    … so 4. #### 4    GSM8K
    \\boxed{4}         LaTeX, braces balanced
    Answer: 4         a line of its own ("A: 4", "Final answer: 4", "The answer is 4" likewise)
"""

from __future__ import annotations

import re

ANSWER_MARKER = "=>"
"""The marker that the demo's models learn."""

_MARKER = re.compile(
    r"=>|####|(?P<prose>\banswer is\b[ \t]*:?|^[ \t*]*(?:(?:final )?answer[ \t*]*|A):)",
    re.IGNORECASE | re.MULTILINE,
)
_BOXED = r"\boxed{"
_BOLD = "**"
_EMPHASIS = re.compile(r"[ \t]*\*+")


def final_answer(text: str) -> str | None:
    """What a completion gives as its answer, stripped; None when no convention is followed.

    Example:
        "4;+5=9=>9" → "9"; "4+5\\n#### 9" → "9"; "4;+5=9" → None
        "so $\\\\boxed{\\\\frac{1}{2}}$." → "\\\\frac{1}{2}"
    """
    boxed = text.rfind(_BOXED)
    marker = max(_MARKER.finditer(text), key=re.Match.end, default=None)
    if boxed >= 0 and (marker is None or boxed >= marker.end()):
        return _balanced(text[boxed + len(_BOXED) :])
    if marker is None:
        return None
    answer = text[marker.end() :].strip()
    return answer.strip("*").strip() if marker["prose"] else answer


def before_answer(text: str) -> str | None:
    """What stands before the final answer, its marker included; None when there is no marker.

    Asterisks behind a marker in prose belong to it.

    Example:
        "4;+5=9=>9" → "4;+5=9=>"; "so $\\\\boxed{4}$" → "so $\\\\boxed{"; "9" → None
        "**Answer:** 4" → "**Answer:**"
    """
    boxed = text.rfind(_BOXED)
    ends = [_with_asterisks(text, match) for match in _MARKER.finditer(text)]
    ends += [boxed + len(_BOXED)] * (boxed >= 0)
    return text[: max(ends)] if ends else None


def closing_of(before: str) -> str:
    """What has to follow an answer behind this; empty where an answer ends the text.

    Example:
        "so $\\\\boxed{" → "}"; "**Answer:" → "**"; "The answer is **" → "**"
        "**Answer:**" → ""; "4;+5=9=>" → ""
    """
    if before.endswith(_BOXED):
        return "}"
    is_prose = not before.endswith((ANSWER_MARKER, "####"))
    is_open = before.rpartition("\n")[2].count(_BOLD) % 2 == 1
    return _BOLD if is_prose and is_open else ""


def _with_asterisks(text: str, marker: re.Match[str]) -> int:
    """Where a marker ends: as far as the emphasis that opens or closes right behind it."""
    behind = _EMPHASIS.match(text, marker.end()) if marker["prose"] else None
    return behind.end() if behind else marker.end()


def _balanced(text: str) -> str | None:
    """The text up to the brace that closes the one before it; None when it is never closed."""
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:position].strip()
    return None
