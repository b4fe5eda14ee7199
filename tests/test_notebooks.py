"""The notebooks as they are committed: no outputs, and only functions that there are.

They run on the quickstart's artefacts in tests/test_quickstart_artefacts.py.
"""

from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest

from curation import inspect

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(path: Path) -> list[nbformat.NotebookNode]:
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def inspected(source: str) -> set[str]:
    """Names that a cell takes from `inspect`."""
    return {
        node.attr
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id == "inspect"
    }


def test_there_are_four() -> None:
    names = ["1_pruning", "2_curriculum", "3_groups", "4_teacher"]
    assert [path.stem for path in NOTEBOOKS] == names


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_holds_no_run_of_anybody(path: Path) -> None:
    for cell in cells(path):
        assert cell.outputs == [] and cell.execution_count is None


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_calls_functions_that_inspect_has(path: Path) -> None:
    called = set[str]().union(*(inspected(cell.source) for cell in cells(path)))
    assert len(called) >= 3
    assert called <= set(dir(inspect))
