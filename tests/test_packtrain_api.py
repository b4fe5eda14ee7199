"""packtrain from Python."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as pq
import pytest
from fabricated import fabricate_run
from test_packtrain_runner import Trail, trail

import packtrain
from ground.errors import DataError, PacktrainError, RecipeError
from packtrain import runner
from packtrain.steps import Step

__all__ = ["trail"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fabricate_run(tmp_path_factory.mktemp("api") / "made", num_prompts=20)


def test_a_run_gives_its_numbers_as_tables(made: Path) -> None:
    run = packtrain.Run(made)
    rl = run.metrics["rl"]
    assert {"step", "reward"} <= set(rl.column_names)
    steps = [value for value in rl.column("step").to_pylist() if value is not None]
    assert steps == sorted(steps) and len(steps) > 3
    assert {stage.name: stage.state for stage in run.status.stages}["rl"] == "done"


def test_groups_and_curriculum_have_a_row_per_consumed_draw(made: Path) -> None:
    run = packtrain.Run(made)
    files = sorted((made / "rl" / "groups").glob("*.parquet"))
    rows = sum(pq.read_metadata(path).num_rows for path in files)
    groups, seen = run.groups(), run.curriculum()
    assert groups.num_rows == seen.num_rows == rows > 0
    assert set(groups.column("step").to_pylist()) == {int(p.stem.split("_")[1]) for p in files}
    assert {"texts", "rewards"} <= set(groups.column_names)
    assert {"prompt_id", "reason", "successes", "trials", "step"} <= set(seen.column_names)


def test_a_run_without_rl_has_no_groups(tmp_path: Path, trail: Trail) -> None:
    assert trail.run() == 0
    run = packtrain.Run(tmp_path / "run")
    assert run.groups().num_rows == run.curriculum().num_rows == 0 and run.metrics == {}


def test_the_report_is_written_where_it_is_wanted(made: Path, tmp_path: Path) -> None:
    page = packtrain.Run(str(made)).report(tmp_path / "page.html")
    assert page == tmp_path / "page.html" and page.read_text().startswith("<!doctype html>")


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="this is not a run directory"):
        packtrain.Run(tmp_path)


def test_a_recipe_is_run_with_overrides_and_a_failure_is_an_error(
    trail: Trail, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [Step(name, name, f"stage_{name}") for name in ("sft", "dpo")]
    monkeypatch.setattr(runner, "steps_of", lambda document: steps)
    monkeypatch.setattr(runner, "read_recipe", lambda document: document.head())
    monkeypatch.setattr(runner, "check_runnable", lambda document, recipe: None)
    with pytest.raises(PacktrainError, match="the run ended with exit code 3"):
        packtrain.run(trail.recipe, "run", **cast(Any, {"dpo.fail": True}))
    assert trail.finished == ["sft"]
    run = packtrain.run(trail.recipe, trail.folder / "run", start="dpo")
    assert trail.finished == ["sft", "dpo"] and run.path == trail.folder / "run"
    with pytest.raises(RecipeError):
        packtrain.run(trail.folder / "absent.yaml")


def test_the_package_itself_is_light_and_has_no_other_names() -> None:
    heavy = "[name for name in ('torch', 'ray', 'pyarrow') if name in sys.modules]"
    code = f"import sys, packtrain; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert done.stdout == "[]\n"
    with pytest.raises(AttributeError, match="no attribute 'ran'"):
        _ = packtrain.ran
