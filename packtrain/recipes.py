"""`packtrain recipes ls|cp`: the recipes that come with the package."""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

from ground.errors import RecipeError
from ground.validation import suggest

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
"""Beside the packages, in a checkout as well as in an installed wheel."""
_NAME = re.compile(r"^(name:[ ]*)[^ #\n]+", re.MULTILINE)


def command(arguments: argparse.Namespace) -> int:
    """List the recipes, or copy one."""
    if arguments.action == "ls":
        for name, path in recipes().items():
            sys.stdout.write(f"{name:24}{summary(path)}\n")
        return 0
    written = copy(arguments.name, arguments.target)
    sys.stdout.write(f"{written}\n")
    return 0


def recipes() -> dict[str, Path]:
    """Name → file of every recipe and launch file, sorted."""
    return {path.relative_to(FOLDER).as_posix(): path for path in sorted(FOLDER.rglob("*.yaml"))}


def summary(path: Path) -> str:
    """The first sentence of the comment that opens a recipe."""
    lines = path.read_text(encoding="utf-8").splitlines()
    opening = " ".join(line.lstrip("# ") for line in lines[: _comment_length(lines)])
    return re.split(r"(?<=[.;])\s", opening)[0].rstrip(".;")


def copy(name: str, target: Path) -> Path:
    """Copy a recipe under a name of its own; a folder as target keeps the file's name.

    The run's name follows the target, so that the copy's run is not the original's: `mine.yaml`
    and `mine/recipe.yaml` are both called mine. Nothing is overwritten.
    """
    known = recipes()
    if name not in known:
        main = f"{name}/recipe.yaml"
        within = [main] if main in known else [p for p in known if p.startswith(f"{name}/")]
        hint = f"; did you mean '{within[0]}'?" if within else suggest(name, known)
        raise RecipeError(f"'{name}' is not a recipe{hint}", fix="packtrain recipes ls")
    if target.is_dir():
        target = target / Path(name).name
    if target.exists():
        raise RecipeError("the target exists already", where=str(target), fix="name another file")
    target.parent.mkdir(parents=True, exist_ok=True)
    text = known[name].read_text(encoding="utf-8")
    target.write_text(_NAME.sub(rf"\g<1>{_run_name(target)}", text, count=1), encoding="utf-8")
    return target


def _run_name(target: Path) -> str:
    """A name of a run, from the file's or, for a recipe.yaml, from its folder's."""
    path = target.resolve()
    stem = path.parent.name if path.stem == "recipe" else path.stem
    return re.sub(r"[^A-Za-z0-9._-]", "-", stem).lstrip("._-")[:100] or "mine"


def _comment_length(lines: list[str]) -> int:
    return next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
