"""The command line: quick, light, and helpful when a word is wrong."""

from __future__ import annotations

import resource
import subprocess
import sys
import tomllib
from importlib.metadata import PackageNotFoundError
from inspect import isclass
from pathlib import Path
from typing import get_args

import pytest
from pydantic import BaseModel

from ground.config import OPERATIONAL
from ground.errors import RecipeError
from ground.recipe import load_recipe
from packtrain import recipes
from packtrain.cli import main, parse
from packtrain.doctor import ROOMS, check_shadows, check_versions
from packtrain.recipe import Recipe

ROOT = Path(__file__).parents[1]
TINY = ROOT / "recipes" / "tiny" / "recipe.yaml"
PROBE = """\
import sys
import tomllib
from packtrain.cli import main
try:
    code = main(sys.argv[1:])
except SystemExit as end:
    code = end.code
heavy = {"torch", "ray", "transformers", "trl", "datasets"} & set(sys.modules)
sys.stderr.write(f"code={code} heavy={sorted(heavy)}\\n")
"""


@pytest.mark.parametrize("words", [("--help",), ("validate", str(TINY)), ("plan", str(TINY))])
def test_help_validate_and_plan_are_light_and_quick(words: tuple[str, ...], tmp_path: Path) -> None:
    """Seconds of work, not of waiting for others on a busy machine."""
    times = []
    for _ in range(3):
        start = cpu_seconds()
        line = [sys.executable, "-c", PROBE, *words]
        done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, timeout=60)
        times.append(cpu_seconds() - start)
        assert "code=0 heavy=[]" in done.stderr, done.stderr
    assert min(times) < 0.5, times


def cpu_seconds() -> float:
    """What the ended children of this process have worked."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_overrides_may_stand_anywhere_after_the_recipe() -> None:
    found = parse(["run", "r.yaml", "rl.steps=3", "--resume", "sft.x=4", "--run", "a=b", "c=d=e"])
    assert (found.recipe, found.run, found.resume) == (Path("r.yaml"), Path("a=b"), True)
    assert found.overrides == ["rl.steps=3", "sft.x=4", "c=d=e"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rnu"], "'rnu' is not a command; did you mean 'run'?"),
        (["xyzzy"], "'xyzzy' is not a command; known are run, validate"),
        (["run", "r.yaml", "--resmue"], "'--resmue' is not a flag; did you mean '--resume'?"),
        (["run", "r.yaml", "more"], "unexpected argument 'more'"),
        (["status", "runs/x", "a=1"], "`packtrain status` takes no overrides, got 'a=1'"),
        (["run"], "the following arguments are required: RECIPE"),
        (
            ["run", "r", "--resume", "--overwrite"],
            "--overwrite: not allowed with argument --resume",
        ),
        ([], "the following arguments are required: COMMAND"),
    ],
)
def test_a_wrong_word_gets_one_clear_error(words: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse(words)
    assert message in str(caught.value)


def test_errors_go_to_stderr_with_their_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "/nowhere/at/all"]) == 3
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("packtrain: /nowhere/at/all: this is not a run directory\n  fix:")


def test_recipes_are_listed_and_copied_without_overwriting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recipes", "ls"]) == 0
    assert "tiny/recipe.yaml" in capsys.readouterr().out
    assert main(["recipes", "cp", "tiny/recipe.yaml", str(tmp_path)]) == 0
    copied = (tmp_path / "recipe.yaml").read_text()
    assert copied != TINY.read_text()
    assert copied.replace(f"name: {tmp_path.name} ", "name: tiny ") == TINY.read_text()
    assert main(["recipes", "cp", "tiny/recipe.yaml", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
    with pytest.raises(RecipeError, match=r"did you mean 'tiny/recipe.yaml'"):
        recipes.copy("tiny/recpe.yaml", tmp_path / "x")


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("mine.yaml", "mine"),
        ("gsm 8k.yaml", "gsm-8k"),
        ("big/recipe.yaml", "big"),
        ("_.yaml", "mine"),
    ],
)
def test_a_copied_recipe_is_a_run_of_its_own(tmp_path: Path, target: str, name: str) -> None:
    copied = load_recipe(recipes.copy("tiny/recipe.yaml", tmp_path / target))
    original = load_recipe(TINY)
    assert copied.head().name == name and original.head().name == "tiny"
    assert {**copied.values, "name": "tiny"} == original.values


def test_half_a_name_of_a_recipe_is_completed(tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"'tiny' is not a recipe; did you mean 'tiny/recipe\.yaml'"
    ):
        recipes.copy("tiny", tmp_path / "x")


def test_a_defect_is_told_once_without_secrets(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ZeroDivisionError("while token hf_abcdefghijklmnopqrst was used")

    monkeypatch.setattr(recipes, "recipes", fail)
    assert main(["recipes", "ls"]) == 1
    shown = capsys.readouterr().err
    assert shown.startswith("packtrain: a defect of packtrain:\nTraceback (most recent call last)")
    assert "ZeroDivisionError: while token [redacted] was used" in shown
    assert "hf_abc" not in shown


def test_the_doctor_compares_versions_with_the_tested_set() -> None:
    tested = {"torch": "2.13", "ray": "2.60", "trl": "1.16"}
    installed = {"torch": "2.13.0+cpu", "ray": "2.61.0"}

    def found(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    verdicts = {f.subject: f.verdict for f in check_versions(tested, found)}
    assert verdicts == {"torch": "ok", "ray": "warn", "trl": "fail"}


def test_the_doctor_sees_folders_that_hide_ours(tmp_path: Path) -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {name.rstrip("*") for name in settings["packages"]["find"]["include"]}
    assert {*ROOMS} == packages - {"recipes"}
    assert [f.verdict for f in check_shadows(tmp_path)] == ["ok"]
    assert [f.verdict for f in check_shadows(ROOT)] == ["ok"]
    (tmp_path / "rl").mkdir()
    (tmp_path / "ground.py").touch()
    (found,) = check_shadows(tmp_path)
    assert found.verdict == "fail"
    assert f"{tmp_path / 'ground'}, {tmp_path / 'rl'}" in found.found


def test_what_is_called_operational_are_keys_of_stages() -> None:
    known: set[str] = set()
    unread: list[type[BaseModel]] = [Recipe]
    while unread:
        fields = unread.pop().model_fields
        known |= fields.keys()
        for field in fields.values():
            inner = [field.annotation, *get_args(field.annotation)]
            unread += [each for each in inner if isclass(each) and issubclass(each, BaseModel)]
    assert known >= OPERATIONAL
