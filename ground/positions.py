"""YAML that remembers where each key stands, read strictly: plain data, no duplicate keys, bounded.

Scalars follow YAML 1.2's core types, which hold no surprises: `1e-5` is a number, `no` is text,
`010` is ten. Tags, merge keys, endless aliases and oversized files are refused, so that a
recipe from a stranger can be read safely.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from ground.errors import RecipeError

Scalar = None | bool | int | float | str
Value = Scalar | list["Value"] | dict[str, "Value"]
KeyPath = tuple[str | int, ...]

MAX_BYTES = 256 * 1024
MAX_VALUES = 20_000
MAX_DEPTH = 32


class PlacedText(str):
    """Text that knows the folder its file stands in, so that a path can be read relative to it.

    Example:
        PlacedText("data/sft.jsonl", Path("recipes/mine")) names recipes/mine/data/sft.jsonl
    """

    folder: Path

    def __new__(cls, text: str, folder: Path) -> PlacedText:
        self = super().__new__(cls, text)
        self.folder = folder
        return self


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was written: a line of a file, or an override of the command line.

    Example:
        str(Origin("recipe.yaml", 14)) == "recipe.yaml:14"
    """

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong with a recipe, and where.

    Example:
        Problem(Origin("recipe.yaml", 14), "rl.group_szie is not a key; did you mean 'group_size'?")
    """

    origin: Origin
    text: str


def raise_problems(problems: list[Problem], fix: str = "") -> None:
    """Raise one RecipeError that names every problem, in the order of the lines; none: return."""
    if not problems:
        return
    unique = dict.fromkeys(problems)
    ordered = sorted(unique, key=lambda item: (item.origin.source, item.origin.line or 0))
    raise RecipeError("\n".join(f"{item.origin}: {item.text}" for item in ordered), fix=fix)


@dataclass(frozen=True, slots=True)
class Placed:
    """A mapping and the origin of each of its keys, by key path."""

    values: dict[str, Value]
    origins: dict[KeyPath, Origin]


_RESOLVERS: tuple[tuple[str, str, str], ...] = (
    ("null", r"~|null|Null|NULL|", "~nN"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9][0-9_]*|0x[0-9a-fA-F]+|0o[0-7]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9][0-9_]*(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
)


class _CoreLoader(yaml.SafeLoader):
    """PyYAML's composer with the scalar types of YAML 1.2's core schema."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  (PyYAML's own class attribute)


for _name, _pattern, _first in _RESOLVERS:
    _starts = [*_first, ""] if _name == "null" else list(_first)
    _CoreLoader.add_implicit_resolver(
        f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), _starts
    )


def read_mapping(path: Path, shown: str) -> Placed:
    """Read a YAML file whose top is a mapping; `shown` is the file's name in messages.

    Raises:
        RecipeError: unreadable, not YAML, or holding something a recipe may not hold.
    """
    node = _compose(_text(path, shown), shown)
    if node is None:
        return Placed({}, {})
    if not isinstance(node, yaml.MappingNode):
        raise RecipeError(
            "a recipe is a mapping of keys to values", where=f"{shown}:{node.start_mark.line + 1}"
        )
    reader = _Reader(shown, path.parent)
    values = reader.mapping(node, (), 0)
    raise_problems(reader.problems)
    return Placed(values, reader.origins)


def _text(path: Path, shown: str) -> str:
    """The text of a regular, small UTF-8 file."""
    try:
        if path.exists() and not path.is_file():
            raise RecipeError("a recipe is a regular file", where=shown)
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise RecipeError(
            f"cannot read the recipe ({error.strerror})",
            where=shown,
            fix="check the path; `packtrain recipes ls` lists the recipes that come with packtrain",
        ) from None
    if len(content) > MAX_BYTES:
        raise RecipeError(
            f"a recipe has at most {MAX_BYTES} bytes, this one has more",
            where=shown,
            fix="keep data in data files and name them in the recipe",
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RecipeError("a recipe is UTF-8 text", where=f"{shown}:{line}") from None


def read_value(text: str, shown: str, folder: Path) -> Value:
    """Read one YAML value, as in an override `key=value`; its relative paths start at `folder`.

    Raises:
        RecipeError: its `what` is the fault alone; the caller knows which override it was.
    """
    node = _compose(text, shown)
    reader = _Reader(shown, folder)
    value = None if node is None else reader.value(node, (), 0)
    for problem in reader.problems:
        raise RecipeError(problem.text, where=shown)
    return value


def _compose(text: str, shown: str) -> yaml.Node | None:
    """Parse to nodes; aliases stay shared nodes here, so that a bomb costs nothing yet."""
    try:
        _refuse_depth(text, shown)
        return yaml.compose(text, Loader=_CoreLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{shown}:{mark.line + 1}" if mark else shown
        what = " ".join(part for part in (error.context, error.problem) if part)
        raise RecipeError(f"not valid YAML: {what}", where=where) from None
    except yaml.YAMLError as error:
        first = str(error).splitlines()[0]
        raise RecipeError(f"not valid YAML: {first}", where=shown) from None


def _refuse_depth(text: str, shown: str) -> None:
    """Count levels in the event stream, which PyYAML makes without recursion."""
    depth = 0
    for event in yaml.parse(text, Loader=_CoreLoader):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            line = event.start_mark.line + 1
            raise RecipeError(
                f"values may be nested {MAX_DEPTH} deep at most", where=f"{shown}:{line}"
            )


class _Reader:
    """Turns nodes into values, noting origins and problems; bounded in values and in depth."""

    def __init__(self, shown: str, folder: Path) -> None:
        self.shown = shown
        self.folder = folder
        self.origins: dict[KeyPath, Origin] = {}
        self.problems: list[Problem] = []
        self.num_values = 0

    def value(self, node: yaml.Node, at: KeyPath, depth: int) -> Value:
        self.num_values += 1
        origin = Origin(self.shown, node.start_mark.line + 1)
        if self.num_values > MAX_VALUES or depth > MAX_DEPTH:
            raise RecipeError(
                f"a recipe holds at most {MAX_VALUES} values, {MAX_DEPTH} deep; "
                "its aliases unfold to more",
                where=str(origin),
                fix="write the values out instead of nesting aliases",
            )
        if isinstance(node, yaml.ScalarNode):
            return self._scalar(node, origin)
        plain = "map" if isinstance(node, yaml.MappingNode) else "seq"
        if node.tag != f"tag:yaml.org,2002:{plain}":
            self._refuse_tag(node, origin)
            return None
        if isinstance(node, yaml.MappingNode):
            return self.mapping(node, at, depth)
        return [
            self._item(child, (*at, index), depth) for index, child in enumerate(_children(node))
        ]

    def mapping(self, node: yaml.MappingNode, at: KeyPath, depth: int) -> dict[str, Value]:
        values: dict[str, Value] = {}
        for key_node, child in node.value:
            origin = Origin(self.shown, key_node.start_mark.line + 1)
            key = self._key(key_node, origin)
            if key is None:
                continue
            here = (*at, key)
            if key in values:
                first = self.origins[here]
                self.problems.append(
                    Problem(origin, f"{dotted(here)} is given twice, first at {first}")
                )
                continue
            self.origins[here] = origin
            values[key] = self.value(child, here, depth + 1)
        return values

    def _item(self, node: yaml.Node, at: KeyPath, depth: int) -> Value:
        self.origins[at] = Origin(self.shown, node.start_mark.line + 1)
        return self.value(node, at, depth + 1)

    def _key(self, node: yaml.Node, origin: Origin) -> str | None:
        if node.tag == "tag:yaml.org,2002:str" and isinstance(node, yaml.ScalarNode):
            key = str(node.value)
            if key.startswith("_"):
                text = f"'{key}' is not a key: a recipe names parts by their registered name, "
                self.problems.append(Problem(origin, text + "never by an import path"))
                return None
            if key == "<<":
                self.problems.append(Problem(origin, "'<<' is not supported; use `extends:`"))
                return None
            return key
        shown = node.value if isinstance(node, yaml.ScalarNode) else "a collection"
        self.problems.append(Problem(origin, f"a key must be text, got {shown}; quote it"))
        return None

    def _scalar(self, node: yaml.ScalarNode, origin: Origin) -> Scalar:
        text = str(node.value)
        match node.tag.removeprefix("tag:yaml.org,2002:"):
            case "str":
                return PlacedText(text, self.folder)
            case "null":
                return None
            case "bool":
                return text.lower() == "true"
            case "int":
                return self._whole_number(text, origin)
            case "float":
                return float(text.replace("_", ""))
        self._refuse_tag(node, origin)
        return None

    def _whole_number(self, text: str, origin: Origin) -> int | None:
        base = {"0x": 16, "0o": 8}.get(text[:2], 10)
        digits = text.replace("_", "")
        if len(digits) > 20 or abs(int(digits, base)) >= 2**63:
            self.problems.append(Problem(origin, f"{text[:24]}… is too large a number"))
            return None
        return int(digits, base)

    def _refuse_tag(self, node: yaml.Node, origin: Origin) -> None:
        tag = node.tag.replace("tag:yaml.org,2002:", "!!")
        self.problems.append(Problem(origin, f"the tag '{tag}' is refused; a recipe is plain YAML"))


def _children(node: yaml.Node) -> Iterator[yaml.Node]:
    yield from node.value


def dotted(path: KeyPath) -> str:
    """`("rl", "loss", "kind")` → `rl.loss.kind`; list positions as `[0]`."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")
