"""Constraints of form that a rule can check, by name and value: "at most 50 words".

Each has values to train on and others that are only ever evaluated, so that following an
instruction can be told from having learnt some. A text without a word says nothing and keeps none
of them.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, get_args

Value = int | str
ConstraintName = Literal[
    "max_words", "min_words", "max_sentences", "paragraphs", "bullets", "numbered", "json_key",
    "starts_with", "ends_with", "signed_by", "without_word", "with_word", "language",
]  # fmt: skip

NAMES: tuple[ConstraintName, ...] = get_args(ConstraintName)


@dataclass(frozen=True, slots=True)
class Constraint:
    """One constraint with its value.

    Example:
        Constraint("max_words", 3).holds("four words are here") → False
    """

    name: ConstraintName
    value: Value

    def holds(self, text: str) -> bool:
        """Whether a completion keeps it."""
        return bool(_words(text)) and RULES[self.name].holds(text, self.value)


@dataclass(frozen=True, slots=True)
class Rule:
    """How a constraint is worded, which values it takes, and how it is checked.

    Example:
        Rule(("Use at most {value} words.",), (20, 50), (35,), lambda text, n: …)
    """

    wordings: tuple[str, ...]
    """What an instruction says; one is drawn."""
    values: tuple[Value, ...]
    """For training."""
    heldout: tuple[Value, ...]
    """For evaluation only."""
    holds: Callable[[str, Value], bool]
    choices: tuple[Value, ...] = ()
    """All values that can be checked; empty: any of the type of `values`."""


_SCRIPTS: Mapping[str, frozenset[str]] = {
    "Russian": frozenset({"CYRILLIC"}),
    "Greek": frozenset({"GREEK"}),
    "Arabic": frozenset({"ARABIC"}),
    "Hebrew": frozenset({"HEBREW"}),
    "Hindi": frozenset({"DEVANAGARI"}),
    "Korean": frozenset({"HANGUL"}),
    "Thai": frozenset({"THAI"}),
    "Japanese": frozenset({"CJK", "HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA"}),
}
"""Language → first words of its letters' Unicode names: languages that a script gives away."""
_OWN_SHARE = 0.8
"""Share of a text's letters that must be of its language's script: names may stay as they are."""


def _words(text: str) -> list[str]:
    return re.findall(r"\w+(?:['\u2019-]\w+)*", text)


def _lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def _paragraphs(text: str) -> int:
    return len([part for part in re.split(r"\n[ \t]*\n", text) if part.strip()])


def _sentences(text: str) -> int:
    stop = r"[.!?\u3002\uff01\uff1f]"
    ends = re.findall(rf"(?<!{stop}){stop}+(?=[\s\"')\]]|$)", text.strip())
    return len(ends) + (not re.search(rf"{stop}[\"')\]]*$", text.strip()))


def _marked(text: str, mark: str) -> int:
    return sum(re.match(mark, line) is not None for line in _lines(text))


def _numbered(text: str, count: Value) -> bool:
    numbers = [int(n) for n in re.findall(r"^[ \t]*(\d{1,3})[.)][ \t]", text, re.MULTILINE)]
    return numbers == list(range(1, int(count) + 1))


def _has_word(text: str, word: Value) -> bool:
    return str(word).casefold() in (each.casefold() for each in _words(text))


def _only_key(text: str, key: Value) -> bool:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return False
    return isinstance(said, dict) and list(said) == [key]


def _written_in(text: str, language: Value) -> bool:
    letters = [unicodedata.name(each, "").partition(" ")[0] for each in text if each.isalpha()]
    own = sum(each in _SCRIPTS[str(language)] for each in letters)
    kana = language != "Japanese" or "HIRAGANA" in letters or "KATAKANA" in letters
    return bool(letters) and own >= _OWN_SHARE * len(letters) and kana


RULES: Mapping[ConstraintName, Rule] = {
    "max_words": Rule(
        ("Use at most {value} words.", "Your whole reply must not exceed {value} words."),
        (20, 30, 50, 80, 120),
        (25, 40, 100),
        lambda text, n: len(_words(text)) <= int(n),
    ),
    "min_words": Rule(
        ("Use at least {value} words.", "Write no fewer than {value} words."),
        (20, 40, 80),
        (30, 60),
        lambda text, n: len(_words(text)) >= int(n),
    ),
    "max_sentences": Rule(
        ("Answer in at most {value} sentences.", "Do not write more than {value} sentences."),
        (2, 4, 6),
        (3, 5),
        lambda text, n: _sentences(text) <= int(n),
    ),
    "paragraphs": Rule(
        ("Write exactly {value} paragraphs, with an empty line between them.",),
        (2, 3, 5),
        (4,),
        lambda text, n: _paragraphs(text) == int(n),
    ),
    "bullets": Rule(
        ('Give exactly {value} bullet points, each on a line that begins with "- ".',),
        (2, 3, 5, 7),
        (4, 6),
        lambda text, n: _marked(text, r"- ") == int(n),
    ),
    "numbered": Rule(
        ('Number your steps "1.", "2." and so on, each on its own line: exactly {value} of them.',),
        (2, 3, 5),
        (4,),
        _numbered,
    ),
    "json_key": Rule(
        ('Reply with one JSON object and nothing else; its only key is "{value}".',),
        ("answer", "result", "reply"),
        ("solution", "output"),
        _only_key,
    ),
    "starts_with": Rule(
        ('Begin your reply with "{value}".', 'The first words of your reply are "{value}".'),
        ("In short,", "Let us see.", "Well,"),
        ("To begin,", "Good question."),
        lambda text, phrase: text.lstrip().startswith(str(phrase)),
    ),
    "ends_with": Rule(
        ('End your reply with "{value}".', 'The last words of your reply are "{value}".'),
        ("That is all.", "Over and out.", "I hope this helps."),
        ("Thank you for asking.", "And that settles it."),
        lambda text, phrase: text.rstrip().endswith(str(phrase)),
    ),
    "signed_by": Rule(
        (
            "You are {value}. Put your name alone on the last line.",
            "Your name is {value}; sign your reply with it, on a line of its own at the end.",
        ),
        ("Ada", "Boris", "Chen", "Fatima"),
        ("Greta", "Tomas", "Noor"),
        lambda text, name: _words(_lines(text)[-1]) == _words(str(name)),
    ),
    "without_word": Rule(
        ('Do not use the word "{value}".', 'The word "{value}" must not appear in your reply.'),
        ("and", "is", "very"),
        ("of", "so"),
        lambda text, word: not _has_word(text, word),
    ),
    "with_word": Rule(
        ('Use the word "{value}" at least once.', 'Your reply must contain the word "{value}".'),
        ("llama", "trail", "mountain"),
        ("river", "pack"),
        _has_word,
    ),
    "language": Rule(
        ("Answer in {value}.", "Write your whole reply in {value}."),
        ("Russian", "Japanese", "Arabic", "Korean"),
        ("Greek", "Hindi", "Hebrew", "Thai"),
        _written_in,
        choices=tuple(_SCRIPTS),
    ),
}


def value_problem(name: ConstraintName, value: object) -> str:
    """Why a constraint cannot take a value; empty when it can.

    Example:
        value_problem("max_words", "ten") → "max_words takes whole numbers above 0, got 'ten'"
    """
    rule = RULES[name]
    if rule.choices:
        known = ", ".join(map(str, rule.choices))
        return "" if value in rule.choices else f"{name} takes one of {known}, got {value!r}"
    if isinstance(rule.values[0], int):
        good = isinstance(value, int) and not isinstance(value, bool) and value > 0
        return "" if good else f"{name} takes whole numbers above 0, got {value!r}"
    good = isinstance(value, str) and bool(_words(value))
    return "" if good else f"{name} takes text, got {value!r}"
