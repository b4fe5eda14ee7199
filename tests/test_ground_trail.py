"""Inputs of stages: the last finished stage before, else the recipe's own path, verified."""

from __future__ import annotations

from pathlib import Path

import pytest

from ground.config import STAGES, Data, Head, ModelSource
from ground.errors import DataError, RecipeError
from ground.run import RunDir
from ground.storage import commit_directory
from ground.trail import Trail

OUTPUTS = {
    "herd": (
        "student/w",
        "teacher/w",
        "data/sft.jsonl",
        "data/prompts.jsonl",
        "data/heldout.jsonl",
    ),
    "prune": ("kept.parquet", "dropped.parquet"),
    "sft": ("model/w",),
    "taught": ("model/w",),
    "mine": ("prompts.parquet",),
    "rl": ("model/w", "groups/step_000001.parquet", "groups/step_000002.parquet"),
    "dpo": ("model/w",),
}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    return RunDir(tmp_path / "run")


@pytest.fixture
def head(tmp_path: Path) -> Head:
    """A recipe that names everything itself."""
    for name in ("base", "big"):
        (tmp_path / name).mkdir()
    for name in ("s", "p", "h"):
        (tmp_path / name).write_text("{}")
    return Head(
        name="t",
        model=ModelSource(path=tmp_path / "base"),
        teacher=ModelSource(path=tmp_path / "big"),
        data=Data(sft=tmp_path / "s", prompts=tmp_path / "p", heldout=tmp_path / "h"),
    )


def finish(run: RunDir, *stages: str, done: bool = True) -> None:
    for stage in stages:
        run.begin(stage, {}, resume=False, overwrite=True)
        for name in OUTPUTS[stage]:
            path = run.stage(stage) / name
            if path.name == "w":
                with commit_directory(path.parent, {"version": 7}) as staging:
                    (staging / "w").write_text(stage)
            else:
                path.parent.mkdir(exist_ok=True)
                path.write_text(stage)
        if done:
            run.finish(stage, {}, {})


def test_without_finished_stages_the_recipes_own_paths_are_used(
    run: RunDir, head: Head, tmp_path: Path
) -> None:
    trail = Trail(head, run, STAGES)
    finish(run, "herd", "sft", done=False)
    assert trail.model_before("rl") == trail.model_of("base") == tmp_path / "base"
    assert trail.teacher() == tmp_path / "big"
    assert trail.demonstrations_before("sft") == tmp_path / "s"
    assert trail.prompts_before("rl") == tmp_path / "p"
    assert trail.heldout() == tmp_path / "h"


def test_the_last_finished_stage_before_wins(run: RunDir, head: Head) -> None:
    trail, at = Trail(head, run, STAGES), run.path
    finish(run, "herd")
    assert trail.model_before("sft") == trail.model_of("base") == at / "herd/student"
    assert trail.teacher() == at / "herd/teacher"
    assert trail.demonstrations_before("prune") == at / "herd/data/sft.jsonl"
    assert trail.demonstrations_before("sft") == at / "herd/data/sft.jsonl"
    assert trail.prompts_before("rl") == at / "herd/data/prompts.jsonl"
    assert trail.heldout() == at / "herd/data/heldout.jsonl"
    finish(run, "prune", "sft", "mine", "rl", "dpo")
    assert trail.demonstrations_before("prune") == at / "herd/data/sft.jsonl"
    assert trail.demonstrations_before("sft") == at / "prune/kept.parquet"
    assert trail.prompts_before("mine") == at / "herd/data/prompts.jsonl"
    assert trail.prompts_before("rl") == at / "mine/prompts.parquet"
    assert trail.model_before("prune") == trail.model_before("sft") == at / "herd/student"
    assert trail.model_before("mine") == trail.model_before("rl") == at / "sft/model"
    assert trail.model_before("dpo") == at / "rl/model"
    assert [trail.model_of(place) for place in ("base", "sft", "rl", "dpo")] == [
        at / "herd/student",
        *(at / stage / "model" for stage in ("sft", "rl", "dpo")),
    ]


def test_an_input_that_nobody_makes_is_named_with_its_key(run: RunDir) -> None:
    trail = Trail(Head(name="t"), run, STAGES)
    for look, expected in (
        (lambda: trail.model_before("sft"), "no model: neither a finished stage nor model.path"),
        (trail.teacher, "no teacher: neither a finished stage nor teacher.path"),
        (lambda: trail.demonstrations_before("sft"), "no demonstrations: neither a finished stage"),
        (
            lambda: trail.prompts_before("rl"),
            "no prompts: neither a finished stage nor data.p",
        ),
        (trail.heldout, "no held-out prompts: neither a finished stage nor data.heldout gives any"),
    ):
        with pytest.raises(RecipeError) as caught:
            look()
        assert caught.value.what.startswith(expected)
        assert caught.value.exit_code == 2


def test_a_path_of_the_recipe_that_does_not_exist_is_named(run: RunDir, tmp_path: Path) -> None:
    head = Head(name="t", model=ModelSource(path=tmp_path / "gone"))
    with pytest.raises(RecipeError) as caught:
        Trail(head, run, STAGES).model_before("sft")
    assert caught.value.what == f"model.path names {tmp_path / 'gone'}, which does not exist"


def test_a_stage_that_is_not_finished_has_no_model_to_evaluate(run: RunDir, head: Head) -> None:
    with pytest.raises(RecipeError) as caught:
        Trail(head, run, STAGES).model_of("rl")
    assert caught.value.what == "stage rl is not finished, so its model cannot be evaluated"
    with pytest.raises(RecipeError, match="one of base, sft, taught, rl, dpo, got 'mine'"):
        Trail(head, run, STAGES).model_of("mine")


def test_no_stage_goes_on_from_an_arm(run: RunDir, head: Head, tmp_path: Path) -> None:
    trail = Trail(head, run, (*STAGES, "taught"))
    with pytest.raises(RecipeError, match="stage taught is not finished") as caught:
        trail.model_of("taught")
    assert caught.value.fix == "run the stage first: python -m sft.train RECIPE --as taught"
    finish(run, "taught")
    assert trail.model_of("taught") == run.path / "taught/model"
    assert trail.model_before("rl") == tmp_path / "base"
    with pytest.raises(RecipeError, match="stage taught is off, so there is no model") as off:
        Trail(head, run, STAGES).model_of("taught")
    assert off.value.fix.startswith("set sft.distill.as_arm: true")


def test_damaged_outputs_of_a_stage_are_refused_by_name(run: RunDir, head: Head) -> None:
    finish(run, "herd", "sft")
    (run.stage("sft") / "model" / "w").write_text("txs")
    (run.stage("herd") / "data" / "sft.jsonl").write_text("cut")
    trail = Trail(head, run, STAGES)
    with pytest.raises(DataError, match=r"sft/model/w: the file was changed: its sha256 differs"):
        trail.model_before("rl")
    with pytest.raises(DataError, match=r"data/sft\.jsonl: the file must have 4 bytes, it has 3"):
        trail.demonstrations_before("sft")
    assert trail.prompts_before("rl").name == "prompts.jsonl"


def test_what_a_stage_left_that_the_recipe_turns_off_is_not_used(
    run: RunDir, head: Head, tmp_path: Path
) -> None:
    finish(run, "herd", "prune", "sft", "mine", "rl", "dpo")
    trail, at = Trail(head, run, ("sft", "dpo")), run.path
    assert trail.demonstrations_before("sft") == tmp_path / "s"
    assert trail.prompts_before("rl") == tmp_path / "p"
    assert trail.teacher() == tmp_path / "big"
    assert trail.heldout() == tmp_path / "h"
    assert trail.model_of("base") == tmp_path / "base"
    assert trail.model_before("dpo") == trail.model_of("sft") == at / "sft/model"
    assert trail.groups() == ([], 0)
    with pytest.raises(RecipeError, match="stage rl is off, so there is no model of it"):
        trail.model_of("rl")


def test_the_groups_of_rl_come_verified_with_the_version_of_its_model(
    run: RunDir, head: Head
) -> None:
    trail = Trail(head, run, STAGES)
    assert trail.groups() == ([], 0)
    finish(run, "rl")
    folder = run.stage("rl") / "groups"
    files = [folder / "step_000001.parquet", folder / "step_000002.parquet"]
    assert trail.groups() == (files, 7)
    files[1].write_text("xx")
    with pytest.raises(DataError, match=r"step_000002\.parquet: the file was changed"):
        trail.groups()
