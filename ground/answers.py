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


def _balanced(text: str) -> str | None:
    """The text up to the brace that closes the one before it; None when it is never closed."""
    depth = 1
    for position, character in enumerate(text):
        depth += (character == "{") - (character == "}")
        if depth == 0:
            return text[:position].strip()
    return None
