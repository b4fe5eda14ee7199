"""The README and its neighbours name only what exists."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from packtrain.cli import COMMANDS
from packtrain.recipe import Recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_link_leads_to_a_file() -> None:
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if "://" not in link]
    assert len(links) > 20
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_command_is_described() -> None:
    for command in COMMANDS:
        assert f"packtrain {command.name} " in README


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    texts = README + (ROOT / "CONTRIBUTING.md").read_text() + (ROOT / ".ci" / "run").read_text()
    assert set(re.findall(r"make ([a-z-]+)(?: |$|`)", texts, re.MULTILINE)) <= targets


def test_every_figure_is_that_of_a_committed_result() -> None:
    rows = re.findall(r"^\| [^|]*\| (-?[0-9.]+)[^|]*\| (\w+): ([^|]+) \|$", README, re.MULTILINE)
    assert len(rows) > 15
    for shown, name, figure in rows:
        result = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        digits = len(shown.partition(".")[2])
        assert f"{result['figures'][figure]['value']:.{digits}f}" == shown, figure


def test_the_recipe_of_the_readme_is_valid() -> None:
    example = next(b for b in re.findall(r"```yaml\n(.*?)```", README, re.DOTALL) if "name:" in b)
    assert Recipe.model_validate(yaml.safe_load(example)).name == "mine"


def test_no_committed_text_names_a_machine_or_a_registry_host() -> None:
    names = (
        "Makefile",
        ".ci/run",
        "README.md",
        "CONTRIBUTING.md",
        "constraints.txt",
        "pyproject.toml",
    )
    here = re.escape(f"{ROOT.parent}/")
    for name in names:
        text = (ROOT / name).read_text()
        assert not re.search(rf"{here}|index-url|https?://(?!pypi\.org/project/)", text), name
