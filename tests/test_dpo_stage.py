"""The dpo stage from the command line: pairs and model out, or the RL model and the reason why."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from dpo.config import DpoSection
from dpo.train import train
from ground.entry import stage_entry
from ground.metrics import read_metrics
from ground.model import load_model, tensors_of
from ground.run import RunDir
from ground.storage import commit_directory, verify_directory
from ground.tables import read_rows, write_rows

RECIPE = """
name: sums
seed: 3
model: {{path: {model}}}
dpo:
  max_length: 100
  pairs: {{min_pairs: 4, max_wrong_share: 1}}
  gate: {{max_kl: 0.5, max_chosen_fall: 0.5}}
  trainer:
    {{learning_rate: 1e-4, rows_per_step: 4, rows_per_pass: 4, max_steps: 3, log_every: 1}}
"""


@pytest.fixture
def recipe(tmp_path: Path, tiny_model: Path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny_model))
    return path


def finish_rl(recipe: Path, model: Path, num_prompts: int, *, version: int = 1) -> None:
    """What an RL stage leaves: `model`; one group a prompt, one right and one wrong answer.

    Args:
        version: of the model that RL exported; its groups are all of version 1.
    """
    groups = pytest.importorskip("rl.groups")
    rows = [
        {
            "id": f"p{n}.0",
            "prompt_id": f"p{n}",
            "messages": [{"role": "user", "content": f"{n}+{n}="}],
            "capability": "sums",
            "reward": "exact",
            "answer": str(2 * n),
            "system": "",
            "version": 1,
            "state": "trained",
            "reason": "",
            "texts": [f"{2 * n}", f"{2 * n + 1}"],
            "rewards": [1.0, 0.0],
            "passed": [True, False],
            "finish": ["stop", "stop"],
            "num_tokens": [3, 3],
            "errors": ["", ""],
            "advantages": [0.5, -0.5],
        }
        for n in range(10, 10 + num_prompts)
    ]
    recipe.write_text(recipe.read_text() + "rl: {}\n")
    done = RunDir(recipe.parent / "run")
    journal = dict.fromkeys(groups.SCHEMA.names)
    journaled = [{**journal, **row} for row in rows]
    with done.open():
        done.begin("rl", {}, resume=False, overwrite=False)
        write_rows(groups.groups_path(done.stage("rl") / "groups", 1), journaled, groups.SCHEMA)
        with commit_directory(done.stage("rl") / "model", {"version": version}) as folder:
            shutil.copytree(model, folder, dirs_exist_ok=True)
        done.finish("rl", {}, {})


def run(recipe: Path, *arguments: str) -> tuple[int, RunDir]:
    directory = RunDir(recipe.parent / "run")
    argv = [str(recipe), *arguments, "--run", str(directory.path)]
    return stage_entry("dpo", DpoSection, train, argv), directory


def summary_of(directory: RunDir) -> dict[str, object]:
    summary = directory.manifest("dpo").facts["summary"]
    assert isinstance(summary, dict)
    return summary


def test_the_stage_trains_on_rl_s_pairs_and_reports_the_gate(recipe: Path, tiny_model: Path):
    finish_rl(recipe, tiny_model, 6)
    code, directory = run(recipe)
    assert code == 0
    stage = directory.stage("dpo")
    summary = summary_of(directory)
    assert summary["trained"] is True and summary["pairs"] == 6 and summary["steps"] == 3
    assert summary["mining"] == {"pair_wrong": 6}
    pairs = read_rows(stage / "pairs.parquet")
    assert {(row["chosen"], row["rejected"]) for row in pairs} >= {("20", "21"), ("30", "31")}
    verify_directory(stage / "model")
    gate = [record for record in read_metrics(stage / "metrics.jsonl") if "kl" in record]
    assert gate[0]["phase"] == "gate" and 0 < float(str(gate[0]["kl"])) < 0.5
    ours, base = tensors_of(load_model(stage / "model")), tensors_of(load_model(tiny_model))
    assert not torch.equal(ours["lm_head.weight"], base["lm_head.weight"])
    assert "recipe_sha256" in (stage / "model" / "README.md").read_text()


@pytest.mark.parametrize(
    ("num_prompts", "override", "why"),
    [
        (0, (), "the rl stage left no groups"),
        (3, (), "3 pairs were found, dpo.pairs.min_pairs asks for 4"),
        (6, ("dpo.gate.max_kl=1e-12",), "dpo.gate.max_kl"),
    ],
)
def test_the_rl_model_goes_on_with_the_reason_why(
    recipe: Path, tiny_model: Path, num_prompts: int, override: tuple[str, ...], why: str
):
    if num_prompts:
        finish_rl(recipe, tiny_model, num_prompts)
    code, directory = run(recipe, *override)
    assert code == 0
    summary = summary_of(directory)
    assert summary["trained"] is False and why in str(summary["kept_because"])
    model = directory.stage("dpo") / "model"
    ours, base = tensors_of(load_model(model)), tensors_of(load_model(tiny_model))
    assert all(torch.equal(ours[name], base[name]) for name in base)
    assert why in (model / "README.md").read_text()


def test_with_lora_the_reference_is_the_rl_model_and_an_objection_leaves_no_adapter(
    recipe: Path, tiny_model: Path
):
    """The margin of the first step is zero only if the reference is what training begins with."""
    finish_rl(recipe, tiny_model, 6)
    lora = "dpo.lora={rank: 4, targets: [v_proj, o_proj]}"
    code, directory = run(recipe, lora, "dpo.trainer.learning_rate=3e-3")
    assert code == 0
    stage = directory.stage("dpo")
    first = read_metrics(stage / "metrics.jsonl")[0]
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-4)
    summary = summary_of(directory)
    assert summary["trained"] is True
    gate = summary["gate"]
    assert isinstance(gate, dict) and gate["kl"] > 1e-4
    assert isinstance(told := summary["adapter"], dict) and told["rank"] == 4
    verify_directory(stage / "adapter")
    ours, base = tensors_of(load_model(stage / "model")), tensors_of(load_model(tiny_model))
    moved = {name.split(".")[-2] for name in base if not torch.equal(ours[name], base[name])}
    assert moved == {"v_proj", "o_proj"}
    assert run(recipe, "--overwrite", lora, "dpo.gate.max_kl=1e-12")[0] == 0
    summary = summary_of(directory)
    assert summary["trained"] is False and "gate" in summary and "adapter" not in summary
    assert "share_of_base" not in (stage / "model" / "README.md").read_text()
    assert not (stage / "adapter").exists()
    ours = tensors_of(load_model(stage / "model"))
    assert all(torch.equal(ours[name], base[name]) for name in base)


def test_groups_far_from_the_exported_version_are_left_out(recipe: Path, tiny_model: Path):
    """RL exported version 22, the groups are 21 versions behind: one too many, then just enough."""
    finish_rl(recipe, tiny_model, 6, version=22)
    code, directory = run(recipe)
    assert code == 0 and summary_of(directory)["trained"] is False
    assert summary_of(directory)["mining"] == {"group_too_far": 6}
    assert run(recipe, "--overwrite", "dpo.pairs.max_age=21")[0] == 0
    assert summary_of(directory)["mining"] == {"pair_wrong": 6}


def test_merely_wrong_answers_are_no_corner_cases(recipe: Path, tiny_model: Path):
    """Without a fault of form among them no share of wrong pairs is allowed, save all."""
    finish_rl(recipe, tiny_model, 6)
    code, directory = run(recipe, "dpo.pairs.max_wrong_share=0.5")
    assert code == 0
    why = summary_of(directory)["kept_because"]
    assert why == "0 pairs were found, dpo.pairs.min_pairs asks for 4 (over_max_wrong 6)"


def test_groups_that_were_changed_on_disk_are_refused_by_name(
    recipe: Path, tiny_model: Path, capsys: pytest.CaptureFixture[str]
):
    finish_rl(recipe, tiny_model, 6)
    file = recipe.parent / "run" / "rl" / "groups" / "step_000001.parquet"
    file.write_bytes(file.read_bytes()[:-1] + b"X")
    assert run(recipe)[0] == 3
    assert "groups/step_000001.parquet: the file was changed" in capsys.readouterr().err


def test_groups_of_an_rl_stage_that_the_recipe_turned_off_are_left_alone(
    recipe: Path, tiny_model: Path
):
    finish_rl(recipe, tiny_model, 6)
    recipe.write_text(recipe.read_text().replace("rl: {}\n", ""))
    code, directory = run(recipe)
    assert code == 0
    assert "the rl stage left no groups" in str(summary_of(directory)["kept_because"])
