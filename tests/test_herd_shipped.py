"""The tracked herd is what its card says, RL has something to find in it, and it can be rebuilt."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from subprocess import run

import pytest
from herd_figures import SHIPPED, answer, judge_figures, judge_scores, shipped_tasks, solver_figures

from ground.config import Data, Head
from ground.entry import Stage
from ground.errors import DataError
from ground.herd.config import HerdSection
from ground.herd.train import train
from ground.metrics import Metrics
from ground.model import load_model, load_tokenizer
from ground.run import RunDir
from ground.storage import verify_directory
from ground.tables import read_prompts
from ground.trail import Trail

RECIPE = SHIPPED.parent / "recipe.yaml"
TOLERANCE = 0.04
"""Of pass@1 between two measurements: twice the standard error of 588 tasks at 4 samples each."""


def _card() -> dict:
    return json.loads((SHIPPED / "herd.json").read_text(encoding="utf-8"))


def _stage(tmp_path: Path, section: HerdSection) -> Stage[HerdSection]:
    directory = tmp_path / "herd"
    directory.mkdir()
    return Stage(
        name="herd",
        head=Head(name="t"),  # pyright: ignore[reportCallIssue]
        section=section,
        run=RunDir(tmp_path),
        directory=directory,
        trail=Trail(Head(name="t"), RunDir(tmp_path), ("herd",)),  # pyright: ignore[reportCallIssue]
        metrics=Metrics(directory / "metrics.jsonl"),
        resume=False,
    )


def test_the_tracked_models_are_whole_and_small() -> None:
    for name in ("student", "teacher"):
        verify_directory(SHIPPED / name)
        assert load_tokenizer(SHIPPED / name).chat_template
    size = sum(file.stat().st_size for file in SHIPPED.rglob("*") if file.is_file())
    assert size <= 8_000_000


def test_the_student_is_a_llama_4_of_about_a_million_parameters() -> None:
    model = load_model(SHIPPED / "student")
    assert model.config.model_type == "llama4_text"
    assert 500_000 < model.num_parameters() < 1_500_000
    assert model.num_parameters() < load_model(SHIPPED / "teacher").num_parameters()


def test_the_stage_copies_the_models_and_writes_the_data(tmp_path: Path) -> None:
    section = HerdSection(prompts_per_level=2, heldout_per_level=1, demonstrations_per_level=3)  # pyright: ignore[reportCallIssue]
    summary = train(_stage(tmp_path, section))
    assert summary["rows"] == {"sft.jsonl": 63, "prompts.jsonl": 42, "heldout.jsonl": 21}
    weights = (tmp_path / "herd/teacher/model.safetensors").read_bytes()
    assert weights == (SHIPPED / "teacher/model.safetensors").read_bytes()
    verify_directory(tmp_path / "herd/student")
    assert len(read_prompts(tmp_path / "herd/data/prompts.jsonl", Data())) == 42


def test_a_damaged_shipped_model_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    section = HerdSection(shipped=tmp_path)  # pyright: ignore[reportCallIssue]
    with pytest.raises(DataError, match="student"):
        train(_stage(tmp_path, section))


def test_the_card_tells_of_a_base_on_which_rl_can_bite() -> None:
    student = _card()["student"]
    assert student["pass@16"] > student["pass@1"] + 0.2
    assert student["pass@1_thinking"] > student["pass@1_direct"] + 0.3
    assert 0.3 < student["think_share"] < 0.6


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_shipped_student_solves_as_much_as_its_card_says() -> None:
    measured = solver_figures(answer(SHIPPED / "student", shipped_tasks(), samples=4))
    assert measured["pass@1"] == pytest.approx(_card()["student"]["pass@1"], abs=TOLERANCE)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_judge_foresees_failure_on_families_it_was_not_taught_to_judge() -> None:
    tasks = shipped_tasks()
    answers = answer(SHIPPED / "student", tasks)
    figures = judge_figures(answers, judge_scores(SHIPPED / "teacher", tasks))
    assert float(str(figures["spearman"])) >= 0.5
    assert float(str(figures["p_value"])) < 0.01


@pytest.mark.rebuild
@pytest.mark.timeout(3000)
def test_the_rebuilt_student_solves_as_much_as_the_shipped_one(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "ground.herd.train", str(RECIPE), "herd.rebuild=true"]
    run([*command, "--run", str(tmp_path / "run")], check=True)
    rebuilt = tmp_path / "run" / "herd" / "student"
    measured = solver_figures(answer(rebuilt, shipped_tasks(), samples=4))
    assert measured["pass@1"] == pytest.approx(_card()["student"]["pass@1"], abs=TOLERANCE)
