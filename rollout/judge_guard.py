"""What is done to an answer before a judge sees it: some are refused, the others are cleaned.

    answer ─▶ says nothing, or only how it will begin ─▶ refused: worth 0, no judge is asked
          └─▶ invisible characters and control tokens taken out ─▶ cut ─▶ quoted (judge_prompt.py)

Judges pay for answers that say nothing: a colon or "Thought process:" alone was called right up to
80 % of the time by models of every size (arXiv 2507.08794). Rules refuse those before they cost
anything, for a rule cannot be talked to.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from ground.chat import ChatTemplate

Refusal = Literal["empty", "wordless", "opener"]

_OPENERS = (
    "thought process", "lets solve this problem step by step", "let us solve this problem step by "
    "step", "lets think step by step", "let us think step by step", "step by step", "solution",
    "the solution is", "answer", "the answer is", "final answer", "the final answer is",
    "reasoning", "explanation", "analysis", "thinking", "result", "response", "output",
    "解", "解答", "答案", "思考过程", "かいせつ", "解説", "respuesta", "solución",
    "antwort", "lösung", "réponse", "risposta", "ответ", "решение", "الجواب", "उत्तर",
)  # fmt: skip
"""What an answer may begin with; one that has nothing else has said nothing."""
_OPENER = re.compile(
    "|".join(sorted((re.escape(each) for each in _OPENERS), key=len, reverse=True))
)
_MARKUP = re.compile(
    "[<\uff1c][|\uff5c][^<>\uff1c\uff1e\n]{0,64}[|\uff5c][>\uff1e]"  # also in full width
    r"|</?s>|<(?:bos|eos|pad|unk)>|\[/?INST\]|<</?SYS>>|</?(?:start|end)_of_turn>",
    re.IGNORECASE,
)
"""Control tokens of the families of models that we know, as text."""
_LABEL = re.compile(r"^\s*\(?[A-Za-z0-9][.):]\s+")
"""What a choice begins with: B) Output."""
_QUOTES = re.compile(r"[\s`'\"$]")
_UNLIMITED = 1 << 24
_CHARACTERS_PER_TOKEN = 16
"""More than this many characters of each token that is kept are not looked at."""


@dataclass(frozen=True, slots=True)
class Cleaned:
    """A text as a judge may see it.

    Example:
        Cleaned("Paris", is_cut=False)
    """

    text: str
    is_cut: bool


def refusal(answer: str, reference: str) -> Refusal | None:
    """Why an answer is worth nothing whatever a judge would say; None when it is to be judged.

    One that holds a reference of that very kind, or a part of it, is left to the judge.

    Example:
        "" → "empty", ":" → "wordless", "Thought process:" → "opener", "Paris" → None
        "The answer is Solution." → None where the reference is "B) Solution"
    """
    why, wanted = _emptiness(answer), _LABEL.sub("", reference, count=1)
    if why is None or why == "empty" or why != _emptiness(wanted):
        return why
    said, right = (_core(text, why) for text in (answer, wanted))
    return None if said in right or right in said else why


def _emptiness(answer: str) -> Refusal | None:
    """How it says nothing; None when it says something."""
    visible = "".join(filter(_is_visible, answer))
    if not visible.strip():
        return "empty"
    words = _words(visible)
    if not words:
        return "wordless"
    return None if _words(_OPENER.sub(" ", words)) else "opener"


def _core(text: str, why: Refusal) -> str:
    """What of two texts that say nothing is to be compared: whole words, or signs unquoted."""
    return f" {_words(text)} " if why == "opener" else _QUOTES.sub("", text)


def clean(text: str, chat: ChatTemplate, max_tokens: int = _UNLIMITED) -> Cleaned:
    """Take out what a reader would not see or a model might take for a turn's end; then cut.

    Characters without a shape go (controls, zero-width, direction marks, tags, unassigned), and so
    does every control token, the model's own and the usual ones of others, until none is left. The
    judge's tokenizer would encode these as plain text anyhow (ground/chat.py); what looks like one
    has been seen to work on judges nevertheless.

    Example:
        "Par\\u200bis<|eot|>" → Cleaned("Paris", is_cut=False)
    """
    limit = _CHARACTERS_PER_TOKEN * max_tokens
    seen = unicodedata.normalize("NFC", "".join(filter(_is_visible, text[:limit])))
    seen = _without_markup(seen, chat.special_texts).strip()
    ids = chat.encode_text(seen)
    if len(ids) <= max_tokens:
        return Cleaned(seen, is_cut=len(text) > limit)
    kept = chat.decode(ids[:max_tokens]).rstrip("\ufffd")  # half a character at the end
    return Cleaned(kept, is_cut=True)


def _without_markup(text: str, own: Sequence[str]) -> str:
    """Taking one token out may bring the halves of another together, so until nothing changes."""
    before = None
    while before != text:
        before = text
        for token in own:
            text = text.replace(token, "")
        text = _MARKUP.sub("", text)
    return text


def _is_visible(character: str) -> bool:
    return character in "\n\t" or not unicodedata.category(character).startswith("C")


def _words(text: str) -> str:
    """Letters and digits alone, small, a blank between words; apostrophes leave no gap."""
    kept = unicodedata.normalize("NFKC", text).casefold().replace("'", "").replace("\u2019", "")
    return " ".join("".join(c if _is_word(c) else " " for c in kept).split())


def _is_word(character: str) -> bool:
    return character.isalnum() or unicodedata.category(character).startswith("M")
