"""One staged recipe: YAML with `extends`, overrides, and errors that name file, line and key.

    document = load_recipe(Path("recipe.yaml"), ["rl.group_size=8"])
    head, section = document.stage("rl", RlSection)

`extends: ../base.yaml` puts another file underneath: mappings merge, lists and scalars replace,
and a stage section of `null` turns the stage off. Neither torch nor ray is imported here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import yaml
from pydantic import BaseModel

from ground.config import ARMS, SECTIONS, STAGES, Head
from ground.errors import RecipeError
from ground.positions import (
    KeyPath,
    Origin,
    Placed,
    Problem,
    Value,
    dotted,
    raise_problems,
    read_mapping,
    read_value,
)
from ground.validation import suggest, validate

M = TypeVar("M", bound=BaseModel)

MAX_EXTENDS = 8
_OVERRIDE = re.compile(r"^([A-Za-z][\w-]*(?:\.[\w-]+)*)=(.*)$", re.DOTALL)


@dataclass(frozen=True)
class RecipeDocument:
    """A merged recipe that has not met its schemas yet.

    Example:
        load_recipe(Path("recipes/tiny/recipe.yaml")).has("rl") → True
    """

    path: Path
    shown: str
    """The path as the user wrote it, used in messages."""
    values: Mapping[str, Value]
    origins: Mapping[KeyPath, Origin]
    overrides: tuple[str, ...] = field(default=())

    def has(self, section: str) -> bool:
        """Whether a stage section (or any top-level key) is present."""
        return section in self.values

    @property
    def stages(self) -> tuple[str, ...]:
        """The stages that are on, in the order of the trail."""
        return tuple(stage for stage in STAGES if self.has(stage))

    @property
    def arms(self) -> tuple[str, ...]:
        """The arms that are wanted."""
        return arms_in(self.values)

    @property
    def aside(self) -> tuple[str, ...]:
        """Stages that nothing but these arms reads."""
        return tuple(ARMS[arm].reads for arm in self.arms)

    def read(self, model: type[M]) -> M:
        """Validate the whole recipe against `model`; all errors at once."""
        value, problems = self._validate(model, self.values, (), SECTIONS)
        raise_problems(problems)
        assert value is not None
        return value

    def head(self) -> Head:
        """What all stages share; stage sections are left alone, other keys are refused."""
        value, problems = self._head()
        raise_problems(problems)
        assert value is not None
        return value

    def section(self, name: str, model: type[M]) -> M:
        """One stage's section; all its errors at once."""
        value, problems = self._section(name, model)
        raise_problems(problems)
        assert value is not None
        return value

    def stage(self, name: str, model: type[M]) -> tuple[Head, M]:
        """Head and section together, so that the errors of both come at once."""
        head, problems = self._head()
        section, more = self._section(name, model)
        raise_problems(problems + more)
        assert head is not None and section is not None
        return head, section

    def resolved(self) -> str:
        """The merged recipe as YAML, the head's paths absolute: enough to run it again."""
        head = self.head().model_dump(mode="json", exclude_unset=True)
        sections = {name: self.values[name] for name in SECTIONS if name in self.values}
        merged = json.loads(json.dumps({**head, **sections}))
        return yaml.dump(merged, Dumper=yaml.SafeDumper, sort_keys=False, allow_unicode=True)

    def fingerprint(self, *keys: str, without: Collection[str] = ()) -> str:
        """Sixteen hex digits over what the recipe says under `keys` (all keys when none given).

        Paths count as written, so that a project that was moved keeps its fingerprints.

        Args:
            without: names that are left out wherever they stand below `keys`.
        """
        wanted = keys or tuple(sorted(self.values))
        chosen = {key: _pruned(self.values[key], without) for key in wanted if key in self.values}
        payload = json.dumps(chosen, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(payload.encode()).hexdigest()[:16]

    def _head(self) -> tuple[Head | None, list[Problem]]:
        own = {key: value for key, value in self.values.items() if key not in SECTIONS}
        return self._validate(Head, own, (), SECTIONS)

    def _section(self, name: str, model: type[M]) -> tuple[M | None, list[Problem]]:
        if name not in self.values:
            top = [str(key) for key in self.values]
            text = f"the section '{name}' is missing, so this stage is off{suggest(name, top)}"
            return None, [Problem(Origin(self.shown), text)]
        value = self.values[name]
        if not isinstance(value, dict):
            text = f"{name} must be a mapping; write '{name}: {{}}' for its defaults"
            return None, [Problem(self.origins[(name,)], text)]
        return self._validate(model, value, (name,), ())

    def _validate(
        self, model: type[M], values: Mapping[str, Value], at: KeyPath, known: Sequence[str]
    ) -> tuple[M | None, list[Problem]]:
        origins = {(): Origin(self.shown), **self.origins}
        return validate(model, values, origins, at, known)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> RecipeDocument:
    """Read a recipe, the files it extends and the overrides `key.path=value` on top of it.

    Raises:
        RecipeError: a file is unreadable or holds what a recipe may not, `extends` goes in a
            circle, or an override is malformed. Schemas are checked later, by the sections.
    """
    placed = _read_chain(path, str(path), ())
    problems: list[Problem] = []
    for number, override in enumerate(overrides, start=1):
        problems += _apply_override(placed, number, override)
    for name in SECTIONS:
        if name in placed.values and placed.values[name] is None:
            text = f"{name} is empty; write '{name}: {{}}' for its defaults, or leave it out"
            problems.append(Problem(placed.origins[(name,)], text))
    raise_problems(problems)
    return RecipeDocument(path, str(path), placed.values, placed.origins, tuple(overrides))


def arms_in(values: Mapping[str, Value]) -> tuple[str, ...]:
    """The arms that a recipe wants."""
    return tuple(
        name for name, arm in ARMS.items() if said(values, arm.stage, arm.section, arm.key) is True
    )


def said(values: Mapping[str, Value], *keys: str) -> Value:
    """What a recipe says under nested keys, as it is written; None where it says nothing."""
    value: Value = dict(values)
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _pruned(value: Value, names: Collection[str]) -> Value:
    """A value without the keys of these names, and without the mappings that this leaves empty."""
    if not names or not isinstance(value, dict):
        return value
    kept = {key: _pruned(each, names) for key, each in value.items() if key not in names}
    return {key: each for key, each in kept.items() if each != {}}


def _read_chain(path: Path, shown: str, below: tuple[Path, ...]) -> Placed:
    """Read `path` and everything it extends; `below` are the files that led here."""
    place = path.resolve()
    if place in below:
        circle = " → ".join(item.name for item in (*below[below.index(place) :], place))
        raise RecipeError(f"`extends` goes in a circle: {circle}", where=shown)
    if len(below) >= MAX_EXTENDS:
        raise RecipeError(f"`extends` may be {MAX_EXTENDS} files deep at most", where=shown)
    own = read_mapping(path, shown)
    parent = own.values.pop("extends", None)
    origin = own.origins.pop(("extends",), None)
    if origin is None:
        return own
    if not isinstance(parent, str) or not parent:
        raise RecipeError("extends must be the path of one recipe", where=str(origin))
    target = path.parent / Path(parent).expanduser()
    if not target.is_file():
        raise RecipeError(f"extends names '{parent}', which is not a file", where=str(origin))
    base = _read_chain(target, os.path.normpath(Path(shown).parent / parent), (*below, place))
    _merge(base, own.values, own.origins, ())
    return base


def _merge(
    base: Placed, values: dict[str, Value], origins: Mapping[KeyPath, Origin], at: KeyPath
) -> None:
    """Put `values`, which stand at `at`, on top of `base`; mappings merge, the rest replaces."""
    target = _mapping_at(base.values, at)
    for key, value in values.items():
        here = (*at, key)
        old = target.get(key)
        if isinstance(old, dict) and isinstance(value, dict):
            if origins[here].line is not None:
                base.origins[here] = origins[here]
            _merge(base, value, origins, here)
            continue
        _forget(base, here)
        if value is None and not at and key in SECTIONS and isinstance(old, dict):
            del target[key]
            continue
        target[key] = value
        base.origins.update({k: v for k, v in origins.items() if k[: len(here)] == here})


def _mapping_at(values: dict[str, Value], path: KeyPath) -> dict[str, Value]:
    for part in path:
        inner = values[str(part)]
        assert isinstance(inner, dict)
        values = inner
    return values


def _forget(placed: Placed, path: KeyPath) -> None:
    for key in [key for key in placed.origins if key[: len(path)] == path]:
        del placed.origins[key]


def _apply_override(placed: Placed, number: int, override: str) -> list[Problem]:
    """Set one `key.path=value`; the value is YAML, its relative paths start at the cwd."""
    shown = override if len(override) <= 40 else f"{override[:37]}…"
    match = _OVERRIDE.match(override)
    if match is None:
        origin = Origin(f"override {number} ({shown})")
        return [Problem(origin, "an override is key.path=value, like rl.group_size=8")]
    keys, text = match.group(1).split("."), match.group(2)
    origin = Origin(f"override {number} ({match.group(1)}=…)")
    if not text:
        return [Problem(origin, f"{match.group(1)} needs a value; write null for none")]
    for part in keys:
        if part.startswith("_"):
            return [Problem(origin, f"'{part}' is not a key: parts are named, never imported")]
    try:
        value = read_value(text, str(origin), Path.cwd())
    except RecipeError as error:
        return [Problem(origin, error.what)]
    current: Value = placed.values
    for length, part in enumerate(keys[:-1], start=1):
        current = current.get(part) if isinstance(current, dict) else current
        if current is not None and not isinstance(current, dict):
            return [Problem(origin, f"{dotted(tuple(keys[:length]))} is not a mapping")]
        if current is None:
            break
    _merge(placed, _nested(keys, value), _origins_of(keys, value, origin), ())
    return []


def _nested(keys: Sequence[str], value: Value) -> dict[str, Value]:
    for key in reversed(keys):
        value = {key: value}
    assert isinstance(value, dict)
    return value


def _origins_of(keys: Sequence[str], value: Value, origin: Origin) -> dict[KeyPath, Origin]:
    """The override as origin of every key on its path and of all within its value."""
    origins: dict[KeyPath, Origin] = {tuple(keys[:n]): origin for n in range(1, len(keys) + 1)}
    pending: list[tuple[KeyPath, Value]] = [(tuple(keys), value)]
    while pending:
        path, item = pending.pop()
        origins[path] = origin
        if isinstance(item, dict):
            pending += [((*path, key), inner) for key, inner in item.items()]
        elif isinstance(item, list):
            pending += [((*path, index), inner) for index, inner in enumerate(item)]
    return origins
