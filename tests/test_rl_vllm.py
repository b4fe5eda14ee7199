"""vLLM as the engine of whole stages, each as it is started by the runner."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import make_tiny_llama, make_tiny_model
from rl_runs import Run, nothing_left

from ground.storage import verify_directory

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ENGINE = {"kind": "vllm", "num_slots": 16, "max_length": 128}


@pytest.mark.parametrize(
    ("kind", "transfer"),
    [
        pytest.param("dense", "gloo", id="dense, broadcast"),
        pytest.param("mixture", "memory", id="mixture"),
    ],
)
def test_rl_trains_on_what_vllm_samples_and_survives_the_end_of_its_core(
    tmp_path: Path, kind: str, transfer: str
) -> None:
    """Every version passes the parity gate; the core is killed once, and no group is lost."""
    folder = tmp_path / "model"
    model = make_tiny_llama(folder) if kind == "dense" else make_tiny_model(folder, head_dim=32)
    patient = {"backoff_seconds": 0.1, "spare": False, "start_deadline_seconds": 600}
    rl = {"engine": ENGINE | {"transfer": transfer}, "fleet": patient}
    with nothing_left(Run(tmp_path, model, rl=rl)) as run:
        run.wait_for_step(3)
        [core] = run.below("EngineCore")
        core.kill()
        output = run.finish()
        assert run.process.returncode == 0, output
        run.check_finished()
        handed = [e for e in run.events("handover") if e["role"] == "worker 0"]
        assert {e["version"] for e in handed} == set(range(13))
        assert all(0 < float(str(e["drift"])) < 8e-6 for e in handed)
        lost = [str(e["cause"]) for e in run.events("lost")]
        assert len(lost) == 1 and "SIGKILL" in lost[0]


def test_mine_evaluate_and_judge_run_on_vllm(tmp_path: Path) -> None:
    """A random model solves nothing and judges nothing: what is seen is that the stages end."""
    model = make_tiny_llama(tmp_path / "model")
    row = {"messages": [{"role": "user", "content": "2+2="}], "capability": "sums"}
    prompts = [row | {"reward": "exact", "answer": str(number)} for number in range(24)]
    answer = {"role": "assistant", "content": "4"}
    demonstration = row | {"messages": [*row["messages"], answer]}
    for name, rows in (("prompts", prompts), ("sft", [demonstration] * 8)):
        text = "".join(json.dumps(each) + "\n" for each in rows)
        (tmp_path / f"{name}.jsonl").write_text(text)
    measure = {"samples": 2, "k": [1, 2], "max_new_tokens": 8, "engine": ENGINE}
    recipe = {
        "name": "toy",
        "model": {"path": str(model)},
        "teacher": {"path": str(model)},
        "data": {"prompts": "prompts.jsonl", "heldout": "prompts.jsonl", "sft": "sft.jsonl"},
        "prune": {
            "judge": {"max_unjudged": 1.0, "min_canaries": 0},
            "engine": ENGINE | {"max_length": 512},
        },
        "mine": measure,
        "evaluate": measure | {"greedy": True},
    }
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    for stage, folder, *more in (
        ("curation.prune", "prune"),
        ("curation.mine", "mine"),
        ("rollout.evaluate", "base/evaluation", "--of", "base"),
    ):
        line = [sys.executable, "-m", stage, "recipe.yaml", "--run", "run", *more]
        done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=280)
        assert done.returncode == 0, done.stdout + done.stderr
        verify_directory(tmp_path / "run" / folder)
