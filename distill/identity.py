"""Whose word stored targets are: what must be equal before a student may learn from them.

A teacher's log-probs mean something only under the weights that gave them, the ids of one
vocabulary, and conversations written as one template writes them. All three are hashed; targets
of another identity are another store, and are refused by name wherever they turn up.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

from ground.errors import DataError
from ground.provenance import weights_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PROBES = (
    "The quick brown fox jumps over 13 lazy dogs.",
    "  def f(x):\n\treturn x ** 2  # 1,234.5",
    "naïve café, Ωμέγα, 東京, 🦙🦙",
    "https://example.org/a?b=c&d=%20",
)
"""Texts that two tokenizers of one vocabulary may still cut into different tokens."""


@dataclass(frozen=True, slots=True)
class Identity:
    """What a store's targets depend on besides the tokens of a row.

    Example:
        Identity("teacher@3f9a01bc5d2e7788", "9b1f…", "77ab…", 200_019, "topk_tail k=64")
    """

    teacher: str
    """Name of its folder and a hash over its weights."""
    tokenizer: str
    template: str
    vocabulary: int
    """Ids that the tokenizer knows: a model's head may have more rows."""
    format: str

    @property
    def name(self) -> str:
        """Sixteen hex digits, the store's folder; a teacher that was moved keeps it."""
        said = {**asdict(self), "teacher": _weights(self.teacher)}
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]

    @classmethod
    def parse(cls, content: object, where: str) -> Identity:
        """From JSON.

        Raises:
            DataError: it is not what `asdict` gives.
        """
        try:
            return cls(**content)  # pyright: ignore[reportCallIssue]
        except TypeError:
            raise DataError("this does not say whose targets they are", where=where) from None

    def differences(self, other: Identity) -> list[str]:
        """In which of its parts another identity differs, in words."""
        mine, theirs = asdict(self), asdict(other)
        if _weights(self.teacher) == _weights(other.teacher):
            mine["teacher"] = theirs["teacher"]
        changed = [key for key in mine if mine[key] != theirs[key]]
        return [f"{key} {theirs[key]} instead of {mine[key]}" for key in changed]


def identity_of(
    teacher: Path,
    teacher_tokenizer: PreTrainedTokenizerFast,
    student_tokenizer: PreTrainedTokenizerFast,
    format: str,
) -> Identity:
    """The identity of what a teacher says to rows that the student's tokenizer wrote.

    Raises:
        DataError: teacher and student do not share vocabulary and template.
    """
    require_same_tokens(teacher_tokenizer, student_tokenizer, str(teacher))
    return Identity(
        f"{teacher.name}@{weights_fingerprint(teacher)}",
        tokenizer_fingerprint(student_tokenizer),
        template_fingerprint(student_tokenizer),
        vocabulary_of(student_tokenizer),
        format,
    )


def require_same_tokens(
    teacher: PreTrainedTokenizerFast, student: PreTrainedTokenizerFast, where: str
) -> None:
    """Refuse logit distillation between models that do not speak of the same tokens.

    Raises:
        DataError: naming the first id, text, line of the template or special token that differs.
    """
    why = "the teacher's probabilities belong to its own tokens and its own form of a conversation"
    what = _first_difference(teacher, student)
    if what:
        raise DataError(
            f"teacher and student must share their tokenizer: {what}",
            where=where,
            why=why,
            fix="use a teacher of the student's family; one of another family can still teach by "
            "its text: let it write the demonstrations",
        )
    what = _template_difference(teacher, student)
    if what:
        raise DataError(
            f"their chat templates differ: {what}",
            where=where,
            why=why,
            fix="copy chat_template.jinja and the special tokens of tokenizer_config.json from the "
            "model that was trained on conversations into the other's folder; where both were, on "
            "different forms, use another teacher",
        )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Sixteen hex digits over every id's token and over how texts are cut."""
    return _digest([sorted(tokenizer.get_vocab().items()), _cut(tokenizer)])


def template_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """Sixteen hex digits over the chat template and the names of its special tokens."""
    return _digest([str(tokenizer.chat_template), _special_tokens(tokenizer)])


def vocabulary_of(tokenizer: PreTrainedTokenizerFast) -> int:
    """Ids from 0 on that may stand for a token."""
    return max(tokenizer.get_vocab().values()) + 1


def token_ids(tokenizer: PreTrainedTokenizerFast, tokens: Sequence[str]) -> tuple[int, ...]:
    """The ids of tokens that a recipe names.

    Raises:
        DataError: one of them is not a token.
    """
    known = tokenizer.get_vocab()
    for token in tokens:
        if token not in known:
            raise DataError(
                f"'{token}' is not a token of the tokenizer",
                where="targets.always",
                fix="write tokens as tokenizer.json does, for example <|eot|>",
            )
    return tuple(known[token] for token in tokens)


def _first_difference(teacher: PreTrainedTokenizerFast, student: PreTrainedTokenizerFast) -> str:
    theirs, ours = ({i: t for t, i in each.get_vocab().items()} for each in (teacher, student))
    for token_id in sorted({*theirs, *ours}):
        one, other = theirs.get(token_id), ours.get(token_id)
        if one != other:
            return f"id {token_id} is {one!r} to the teacher and {other!r} to the student"
    for text, one, other in zip(_PROBES, _cut(teacher), _cut(student), strict=True):
        if one != other:
            return f"the vocabulary is the same, but the text {text!r} is cut into other tokens"
    return ""


def _template_difference(teacher: PreTrainedTokenizerFast, student: PreTrainedTokenizerFast) -> str:
    """The first line that is not the same, or the special token."""
    lines = [str(each.chat_template).split("\n") for each in (teacher, student)]
    for number, (one, other) in enumerate(zip_longest(*lines, fillvalue="<no such line>"), start=1):
        if one != other:
            same = sum(
                1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
            )
            part = slice(max(same - 20, 0), same + 40)  # some templates are one long line
            one, other = one[part], other[part]
            return f"line {number} has {one!r} for the teacher and {other!r} for the student"
    theirs, ours = (_special_tokens(each) for each in (teacher, student))
    for name in sorted({*theirs, *ours}):
        one, other = theirs.get(name), ours.get(name)
        if one != other:
            return f"{name} is {one!r} to the teacher and {other!r} to the student"
    return ""


def _special_tokens(tokenizer: PreTrainedTokenizerFast) -> dict[str, str]:
    return {name: str(token) for name, token in tokenizer.special_tokens_map.items()}


def _weights(teacher: str) -> str:
    """The hash in a teacher's name."""
    return teacher.partition("@")[2]


def _cut(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False) for text in _PROBES]


def _digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
