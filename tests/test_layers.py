"""The house of DESIGN: imports point down, heavy libraries have few addresses."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

BELOW: dict[str, set[str]] = {
    "ground": set(),
    "rollout": {"ground"},
    "distill": {"ground", "rollout"},
    "curation": {"ground", "rollout"},
    "sft": {"ground", "rollout", "distill"},
    "dpo": {"ground", "rollout"},
    "rl": {"ground", "rollout", "curation", "distill"},
    "packtrain": {"ground", "rollout", "distill", "curation", "sft", "dpo", "rl"},
}
"""Room → the rooms it may import besides itself."""

ADDRESSES: dict[str, set[str]] = {
    "trl": {"sft/trainer.py", "dpo/trainer.py"},
    "ray": {
        "rollout/carriage.py",
        "rollout/cluster.py",
        "rollout/courier.py",
        "rollout/network.py",
        "rollout/ray_machines.py",
        "rollout/ray_worker.py",
        "rollout/fleet.py",
        "rollout/weights.py",
        "rl/actors.py",
        "rl/cluster.py",
        "rollout/lean_ray.py",
        "rollout/knock.py",
        "rl/learn.py",
        "rollout/preflight.py",
        "rl/pulse.py",
        "rl/remote.py",
        "rl/ray_train.py",
        "rl/train_ranks.py",
    },
    "vllm": {
        "rollout/vllm_engine.py",
        "rollout/vllm_process.py",
        "rollout/vllm_requests.py",
        "rollout/vllm_scheduler.py",
        "rollout/vllm_transfer.py",
        "rollout/vllm_worker.py",
    },
    "deepspeed": {"ground/ranks.py", "rl/zero.py"},
    "pandas": {"curation/inspect.py"},
    "peft": {"ground/adapter.py"},
    "rensa": {"curation/duplicates.py"},
}
"""Heavy dependency → the only files that may import it."""


def product_files() -> list[Path]:
    """Every Python file of every room that exists."""
    return sorted(path for room in BELOW for path in (ROOT / room).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every absolute import, those under TYPE_CHECKING left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module if not node.level and node.module else "relative import"
        else:
            yield from imported(node)


def layer_faults(path: str, tree: ast.AST) -> list[str]:
    """Imports of `path` (relative to the root) that go up, sideways or to a wrong address."""
    room = path.split("/")[0]
    faults = []
    for line, name in imported(tree):
        top = name.split(".")[0]
        if top in BELOW and top != room and top not in BELOW[room]:
            faults.append(f"{path}:{line}: {room} must not import {name}")
        if top == "recipes" or name == "relative import":
            faults.append(f"{path}:{line}: {name}")
        if path not in ADDRESSES.get(top, {path}):
            faults.append(f"{path}:{line}: {top} is imported only in {sorted(ADDRESSES[top])}")
    return faults


def print_faults(path: str, tree: ast.AST) -> list[str]:
    """Calls of print: what a package says goes through its logger or ground.console."""
    return [
        f"{path}:{node.lineno}: print"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]


def entry_faults(path: str, tree: ast.Module) -> list[str]:
    """Classes in a module that is run with -m: they would exist twice, as __main__'s and ours."""
    is_entry = any(
        isinstance(node, ast.If) and "__main__" in ast.unparse(node) for node in tree.body
    )
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return [f"{path}:{node.lineno}: class {node.name}" for node in classes if is_entry]


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Import cycles among modules, each as the path that closes."""
    found: list[list[str]] = []
    finished: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        if module in trail:
            found.append([*trail[trail.index(module) :], module])
        elif module not in finished:
            for target in sorted(graph.get(module, ())):
                visit(target, [*trail, module])
            finished.add(module)

    for module in sorted(graph):
        visit(module, [])
    return found


def import_graph() -> dict[str, set[str]]:
    """Module → modules of ours that it imports."""
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in product_files()
    }
    return {
        module: {name for _, name in imported(ast.parse(path.read_text())) if name in modules}
        for module, path in modules.items()
    }


@pytest.mark.parametrize("check", [layer_faults, print_faults, entry_faults])
def test_every_file_keeps_the_house_rules(
    check: Callable[[str, ast.Module], list[str]],
) -> None:
    assert len(product_files()) > 8
    faults = [
        fault
        for path in product_files()
        for fault in check(path.relative_to(ROOT).as_posix(), ast.parse(path.read_text()))
    ]
    assert not faults, "\n".join(faults)


def test_there_are_no_import_cycles() -> None:
    assert cycles(import_graph()) == []


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    rooms = [room for room in BELOW if (ROOT / room).is_dir()]
    assert not set(rooms) & set(sys.stdlib_module_names)


def test_recipes_hold_no_python_and_tests_are_flat() -> None:
    assert not list((ROOT / "recipes").rglob("*.py"))
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize(
    ("path", "source", "fault"),
    [
        ("ground/x.py", "from rollout.seeds import sample_seed", "ground must not import rollout"),
        ("rollout/x.py", "def f():\n    import curation", ":2: rollout must not import curation"),
        ("rl/loss.py", "import ray.actor", "ray is imported only in"),
        ("rl/x.py", "from packtrain import cli", "rl must not import packtrain"),
        ("dpo/x.py", "from trl import DPOTrainer", "trl is imported only in"),
        ("sft/x.py", "from . import config", "relative import"),
    ],
)
def test_the_layer_check_sees_a_fault(path: str, source: str, fault: str) -> None:
    assert fault in "\n".join(layer_faults(path, ast.parse(source)))


def test_the_layer_check_lets_type_checking_imports_pass() -> None:
    source = "if TYPE_CHECKING:\n    import ray"
    assert layer_faults("rl/buffer.py", ast.parse(source)) == []


def test_the_other_checks_see_a_fault() -> None:
    assert print_faults("x.py", ast.parse("print(1)")) == ["x.py:1: print"]
    entry = "class A: ...\nif __name__ == '__main__':\n    pass"
    assert entry_faults("x.py", ast.parse(entry)) == ["x.py:1: class A"]
    assert cycles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"]]
