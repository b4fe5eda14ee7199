"""A wrong program for each HumanEval problem: its canonical solution with one operator changed.

Which one was chosen by running the problem's own test on the changes in turn, in a plain process,
and taking the first that the test does not let pass.
"""

from __future__ import annotations

import ast

_SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult, ast.Mod: ast.FloorDiv, ast.Pow: ast.Mult,
    ast.Lt: ast.GtE, ast.GtE: ast.Lt, ast.Gt: ast.LtE, ast.LtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
_LATER = {35: 1, 40: 3, 75: 2, 108: 1, 129: 3}
"""Problem → number of the change, where the first one changes nothing that is tested."""
_WITHOUT = {9, 16, 22, 23, 27, 28, 29, 34, 38, 86, 116, 162}
"""Problems whose solution has no operator and no number: what they return is put into a list."""


class _Swap(ast.NodeTransformer):
    """Changes the n-th operator or whole number."""

    def __init__(self, number: int) -> None:
        self.left = number

    def generic_visit(self, node: ast.AST) -> ast.AST:
        swapped = _SWAPPED.get(type(node))
        if swapped is not None:
            self.left -= 1
            return swapped() if self.left == -1 else node
        if isinstance(node, ast.Constant) and isinstance(node.value, int):
            self.left -= 1
            if self.left == -1:
                value = node.value
                return ast.Constant(not value if isinstance(value, bool) else value + 1)
        return super().generic_visit(node)


class _Wrap(ast.NodeTransformer):
    """Puts what is returned into a list."""

    def visit_Return(self, node: ast.Return) -> ast.Return:
        return ast.Return(ast.List([node.value or ast.Constant(None)], ast.Load()))


def mutated(row: dict[str, str]) -> str:
    """The mutant of a problem: its prompt and a wrong solution, as one program."""
    problem = int(row["task_id"].rpartition("/")[2])
    change = _Wrap() if problem in _WITHOUT else _Swap(_LATER.get(problem, 0))
    module = ast.parse(row["prompt"] + row["canonical_solution"])
    for place, node in enumerate(module.body):
        if isinstance(node, ast.FunctionDef) and node.name == row["entry_point"]:
            module.body[place] = change.visit(node)
    return ast.unparse(ast.fix_missing_locations(module))
