"""The sft stage from the command line: recipe in, verified model out, bad inputs named."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel

from ground.entry import stage_entry
from ground.model import load_model
from ground.run import RunDir
from ground.storage import verify_directory
from sft.config import SftSection
from sft.train import train

RECIPE = """
name: sums
seed: 3
model: {{path: {model}}}
data: {{sft: sft.jsonl}}
sft:
  max_length: {max_length}
  trainer:
    {{learning_rate: 3e-3, rows_per_step: 4, rows_per_pass: 4, max_steps: 3, log_every: 1}}
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Path:
    """A recipe with eight sums and one row that is too long."""
    rows = [(f"{n}+{n}=", str(2 * n)) for n in range(10, 18)] + [("count", "1 " * 200)]
    with (tmp_path / "sft.jsonl").open("w") as file:
        for question, answer in rows:
            messages = [
                {"role": "user", "content": question},
                {"role": "assistant", "content": answer},
            ]
            file.write(json.dumps({"messages": messages}) + "\n")
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny_model, max_length=100))
    return path


def run(recipe: Path, *arguments: str) -> int:
    argv = [str(recipe), *arguments, "--run", str(recipe.parent / "run")]
    return stage_entry("sft", SftSection, train, argv)


def test_the_stage_leaves_a_verified_model_and_says_what_it_did(recipe: Path, tiny_model: Path):
    assert run(recipe) == 0
    directory = RunDir(recipe.parent / "run")
    assert directory.is_done("sft")
    summary = directory.manifest("sft").facts["summary"]
    assert isinstance(summary, dict)
    assert (summary["rows"], summary["skipped"], summary["steps"]) == (8, 1, 3)
    model_path = directory.stage("sft") / "model"
    verify_directory(model_path)
    trained, base = load_model(model_path), load_model(tiny_model)
    assert trained.config.to_diff_dict() == base.config.to_diff_dict()
    moved = [
        name
        for name, tensor in trained.named_parameters()
        if not torch.equal(tensor, base.get_parameter(name))
    ]
    assert "lm_head.weight" in moved
    card = (model_path / "README.md").read_text()
    assert "| stage | sft |" in card and "sft.jsonl" in card
    skipped = (directory.stage("sft") / "skipped.jsonl").read_text()
    assert "more than 100" in skipped
    assert run(recipe) == 0  # nothing to do


def test_a_context_longer_than_the_model_s_is_a_recipe_error(recipe: Path, capsys):
    assert run(recipe, "sft.max_length=5000") == 2
    assert "at most the model's 1024 positions, got 5000" in capsys.readouterr().err


def test_no_row_left_is_a_data_error_before_the_model_is_loaded(recipe: Path, capsys):
    assert run(recipe, "sft.max_length=8") == 3
    message = capsys.readouterr().err
    assert "no demonstration is left to train on, of 9" in message and "fix:" in message


def test_divergence_ends_with_exit_code_5(recipe: Path, capsys):
    assert run(recipe, "sft.trainer.learning_rate=1e30", "sft.trainer.warmup=0") == 5
    assert "must be finite" in capsys.readouterr().err


def test_with_lora_the_model_is_the_base_and_the_adapter_beside_it(recipe: Path, tiny_model: Path):
    lora = "sft.lora={rank: 4, targets: [q_proj, down_proj]}"
    assert run(recipe, lora, "sft.trainer.schedule=constant") == 0
    directory = RunDir(recipe.parent / "run")
    stage = directory.stage("sft")
    verify_directory(stage / "adapter")
    trained, base = load_model(stage / "model"), load_model(tiny_model)
    assert trained.config.to_diff_dict() == base.config.to_diff_dict()
    moved = {
        name
        for name, tensor in trained.named_parameters()
        if not torch.equal(tensor, base.get_parameter(name))
    }
    assert {name.split(".")[-2] for name in moved} == {"q_proj", "down_proj"} and len(moved) == 8
    summary = directory.manifest("sft").facts["summary"]
    assert isinstance(summary, dict)
    # Four q_proj: 4 · (32 + 32) · 4; two dense MLPs: 2 · (64 + 32) · 4; two shared: 2 · 64 · 4.
    assert summary["adapter"]["parameters"] == 1024 + 768 + 512
    theirs = PeftModel.from_pretrained(base, str(stage / "adapter"))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        got, wanted = theirs(input_ids=ids).logits, trained(ids).logits
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_a_target_that_is_none_is_a_recipe_error_with_the_nearest(recipe: Path, capsys):
    assert run(recipe, "sft.lora.targets=[q_porj]") == 2
    assert "sft.lora.targets: the model has no linear map called 'q_porj'; did you mean" in (
        capsys.readouterr().err
    )


@pytest.mark.slow
def test_it_runs_under_accelerate_launch(recipe: Path):
    root = Path(__file__).parents[1]
    launch = ["-m", "accelerate.commands.launch", "--config_file", "recipes/accelerate/cpu.yaml"]
    result = subprocess.run(
        [
            *[sys.executable, *launch, "-m", "sft.train", str(recipe)],
            *["--run", str(recipe.parent / "launched")],
        ],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stderr[-2000:]
    assert "stage=sft step=3 total=3" in result.stdout
    assert RunDir(recipe.parent / "launched").is_done("sft")
