"""`packtrain recipes ls|cp`: the recipes that come with the package."""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

from ground.errors import RecipeError
from ground.validation import suggest

FOLDER = Path(__file__).resolve().parents[1] / "recipes"
"""Beside the packages, in a checkout as well as in an installed wheel."""


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
    """Copy a recipe; a folder as target keeps the file's name. Nothing is overwritten."""
    known = recipes()
    if name not in known:
        raise RecipeError(
            f"'{name}' is not a recipe{suggest(name, known)}", fix="packtrain recipes ls"
        )
    if target.is_dir():
        target = target / Path(name).name
    if target.exists():
        raise RecipeError("the target exists already", where=str(target), fix="name another file")
    target.parent.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(known[name], target))


def _comment_length(lines: list[str]) -> int:
    return next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
