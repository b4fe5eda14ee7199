"""From pydantic's findings to sentences that name file, line, key and the nearest known key."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ValidationError

from ground.positions import KeyPath, Origin, Problem, Value, dotted

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

M = TypeVar("M", bound=BaseModel)

_WANTED = {
    "float": "a number",
    "finite": "a finite number",
    "int": "a whole number",
    "bool": "true or false",
    "string": "text",
    "path": "a path",
    "model": "a mapping",
    "dict": "a mapping",
    "mapping": "a mapping",
    "union": "a mapping",
    "list": "a list",
    "tuple": "a list",
    "set": "a list",
}
_COMPARISONS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
    "multiple_of": ("a multiple of", "multiple_of"),
}


def validate(
    model: type[M],
    values: Mapping[str, Value],
    origins: Mapping[KeyPath, Origin],
    at: KeyPath = (),
    known: Iterable[str] = (),
) -> tuple[M | None, list[Problem]]:
    """Validate `values`, which stand at `at`; return the model, or every problem there is.

    `known` are further keys that a misspelt key may have meant.
    """
    try:
        return model.model_validate(values), []
    except ValidationError as error:
        found = error.errors(include_url=False)
        problems = [_problem(model, detail, values, origins, at, known) for detail in found]
        return None, problems


def suggest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'group_size'?`, or nothing when no known word is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean '{near[0]}'?" if near else ""


def _problem(
    model: type[BaseModel],
    detail: ErrorDetails,
    values: Mapping[str, Value],
    origins: Mapping[KeyPath, Origin],
    at: KeyPath,
    known: Iterable[str],
) -> Problem:
    here = _real_path(detail["loc"], values)
    path = (*at, *here)
    if detail["type"] == "extra_forbidden":
        siblings = set(known) if len(here) == 1 else set()
        for owner in _models_at(model, here[:-1]):
            siblings |= set(owner.model_fields)
        # A key of another member of a union is a known word too, and no advice.
        text = f"is not a key{suggest(str(here[-1]), sorted(siblings - {str(here[-1])}))}"
    else:
        text = _sentence(detail)
    return Problem(_origin(path, origins), f"{dotted(path)} {text}".strip())


def _real_path(location: tuple[int | str, ...], values: Mapping[str, Value]) -> KeyPath:
    """Drop what pydantic adds to a location: tags of unions, names of union members."""
    path: list[str | int] = []
    current: object = values
    for index, part in enumerate(location):
        found, inner = _descend(current, part)
        if found:
            current = inner
        elif index < len(location) - 1 or not isinstance(current, dict):
            continue
        path.append(part)
    return tuple(path)


def _descend(value: object, part: int | str) -> tuple[bool, object]:
    """Whether `value` has something at `part`, and what."""
    if isinstance(value, dict):
        return part in value, value.get(part)
    if isinstance(value, list) and isinstance(part, int) and part < len(value):
        return True, value[part]
    return False, None


def _origin(path: KeyPath, origins: Mapping[KeyPath, Origin]) -> Origin:
    """The origin of the key, or of the nearest mapping around it."""
    for length in range(len(path), -1, -1):
        if path[:length] in origins:
            return origins[path[:length]]
    return Origin("recipe")


def _models_at(model: type[BaseModel], path: KeyPath) -> Iterator[type[BaseModel]]:
    """Every model that may stand at `path` below `model`."""
    if not path:
        yield model
        return
    field = model.model_fields.get(str(path[0]))
    inner = path[1:]
    for candidate in _models_in(field.annotation if field else None):
        yield from _models_at(candidate, inner)
        if inner:
            yield from _models_at(candidate, inner[1:])


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from _models_in(argument)


def _sentence(detail: ErrorDetails) -> str:
    """What is required, then what was found."""
    kind, got, context = detail["type"], _shown(detail["input"]), detail.get("ctx", {})
    if kind == "missing":
        return "is missing"
    if kind == "value_error":
        return str(context["error"])
    if kind in _COMPARISONS:
        words, key = _COMPARISONS[kind]
        return f"must be {words} {context[key]:g}, got {got}"
    if kind in ("literal_error", "enum"):
        wanted = str(context["expected"])
        near = suggest(str(detail["input"]), re.findall(r"'([^']*)'", wanted))
        return f"must be {wanted}, got {got}{near}"
    if kind == "union_tag_invalid":
        return f"has a {context['discriminator']} that must be {context['expected_tags']}"
    if kind == "union_tag_not_found" and isinstance(detail["input"], dict):
        return f"needs the key {context['discriminator']}"
    if kind == "string_pattern_mismatch":
        return f"must match {context['pattern']}, got {got}"
    wanted = _WANTED.get(kind.split("_")[0])
    if wanted and not kind.endswith(("too_short", "too_long")):
        return f"must be {wanted}, got {got}"
    message = detail["msg"][:1].lower() + detail["msg"][1:]
    return f"is wrong: {message}, got {got}"


def _shown(value: object) -> str:
    """A value as a recipe would write it, cut to one short piece."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        return "a list"
    text = f"'{value}'" if isinstance(value, str) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
