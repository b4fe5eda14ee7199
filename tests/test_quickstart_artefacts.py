"""What `make quickstart` leaves in runs/tiny: whole, readable, and worth the wait."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from statistics import fmean

import html5lib
import nbformat
import pyarrow.parquet as pq
import pytest
from nbclient import NotebookClient

from curation import inspect
from dpo.config import GateSection, PairsSection
from ground.metrics import read_metrics
from ground.storage import verify_directory
from packtrain.figures import ledger_counts
from packtrain.status import read_status
from packtrain.verdict import gain_between

ROOT = Path(__file__).parents[1]
RUN = ROOT / "runs" / "tiny"
MODELS = ("base", "sft", "taught", "rl", "dpo")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (RUN / "dpo" / "evaluation" / "manifest.json").exists(),
        reason="there is no finished runs/tiny: make quickstart",
    ),
]


def test_every_stage_is_done() -> None:
    stages = {stage.name: stage.state for stage in read_status(RUN).stages}
    names = ("base", "herd", "prune", "targets", "sft", "taught", "mine", "rl", "dpo")
    assert stages == dict.fromkeys(names, "done")


@pytest.mark.parametrize(
    "stage", ["herd", "prune", "targets", "sft", "taught", "mine", "rl", "dpo"]
)
def test_every_file_has_the_hash_of_its_manifest(stage: str) -> None:
    assert verify_directory(RUN / stage).facts["summary"]


@pytest.mark.parametrize("model", MODELS)
def test_every_model_answered_500_held_out_prompts_16_times(model: str) -> None:
    content = json.loads((RUN / model / "evaluation" / "evaluation.json").read_text())
    assert content["num_prompts"] >= 500
    assert content["samples"] == 16
    assert content["pass@1"]["low"] <= content["pass@1"]["mean"] <= content["pass@1"]["high"]
    assert content["entropy"] > 0
    rows = pq.read_table(RUN / model / "evaluation" / "prompts.parquet").num_rows
    assert rows == content["num_prompts"] + content["num_skipped"]


def test_rl_adds_much_and_dpo_costs_little() -> None:
    rl, dpo = gain_between(RUN, "sft", "rl"), gain_between(RUN, "rl", "dpo")
    assert rl is not None and dpo is not None
    assert rl.change.mean >= 0.15
    assert dpo.change.mean >= -0.01


def test_the_teachers_word_adds_to_sft() -> None:
    """9.4 points where it was first seen; shares went from .7 to between .35 and .44."""
    gain = gain_between(RUN, "sft", "taught")
    assert gain is not None and gain.is_clear and gain.change.mean >= 0.04
    shares = inspect.teacher(RUN)
    first, last = (shares[shares.step == shares.step.agg(end)].share for end in ("min", "max"))
    assert first.mean() > last.mean() > 0.1


def test_dpo_trained_on_corner_cases_and_moved_the_model_within_the_gate() -> None:
    """A learning rate that moves nothing costs nothing either; 1e-5 moved it by 3e-5 nats."""
    summary = json.loads((RUN / "dpo" / "manifest.json").read_text())["facts"]["summary"]
    assert summary["trained"] is True, summary["kept_because"]
    gate, counts = summary["gate"], summary["mining"]
    assert 1e-3 < gate["kl"] < GateSection().max_kl
    assert gate["chosen_change"] > -GateSection().max_chosen_fall
    assert gate["preferred"] > 0.8
    assert summary["pairs"] >= 100
    assert counts.get("pair_wrong", 0) <= PairsSection().max_wrong_share * summary["pairs"]
    shares = {
        model: json.loads((RUN / model / "evaluation" / "evaluation.json").read_text())[
            "corner_case_share"
        ]
        for model in ("rl", "dpo")
    }
    assert shares["dpo"] < shares["rl"]


def test_half_of_the_demonstrations_were_pruned_and_they_were_the_easy_half() -> None:
    kept, dropped = (pq.read_table(RUN / "prune" / f"{n}.parquet") for n in ("kept", "dropped"))
    assert abs(kept.num_rows - dropped.num_rows) <= 1
    hardness = [
        [row["score"] for row in table["difficulty"].to_pylist() if row["score"] is not None]
        for table in (kept, dropped)
    ]
    assert sum(map(len, hardness)) > 0.95 * (kept.num_rows + dropped.num_rows)  # few are unjudged
    assert fmean(hardness[0]) > fmean(hardness[1])


def test_the_ledger_closed() -> None:
    counts = ledger_counts(RUN)
    assert {state for state, _ in counts} <= {"trained", "filtered", "withdrawn"}
    assert sum(counts.values()) > 0


def test_the_frames_account_for_every_draw() -> None:
    funnel, rounds = inspect.funnel(RUN), inspect.curriculum(RUN)
    groups, judged = inspect.groups(RUN), inspect.judged(RUN)
    withdrawn = sum(funnel.query("state == 'withdrawn'")["draws"].tolist())
    surveyed = sum(funnel.query("reason == 'surveyed'")["draws"].tolist())
    drawn = sum(funnel["draws"].tolist())
    assert surveyed > 0
    assert drawn == groups["group"].nunique() + withdrawn + surveyed
    assert drawn == sum(ledger_counts(RUN).values())
    assert rounds["version"].tolist() == list(range(0, 31, 3))
    assert sum(rounds["drawn"].tolist()) == len(groups)
    statuses = [rounds[name] for name in ("active", "retired", "deferred", "refused")]
    assert len({sum(counts) for counts in zip(*statuses, strict=True)}) == 1
    assert inspect.fates(judged, [0.5])["kept"].tolist() == judged["kept"].tolist()


def test_what_was_trained_kept_to_its_quotas_but_for_slots_that_taught_nothing() -> None:
    """Each of those is owed to its capability; of one that is all but solved many are."""
    steps = [row for row in read_metrics(RUN / "rl" / "metrics.jsonl") if "quota_error" in row]
    assert steps
    missed = 0.0
    for step in steps:
        assert float(str(step["quota_error"])) <= 1 + missed
        missed += 32 - float(str(step["groups"]))


@pytest.mark.parametrize(
    ("name", "pictures"), [("1_pruning", 5), ("2_curriculum", 3), ("3_groups", 5), ("4_teacher", 3)]
)
def test_a_notebook_runs_and_draws(
    name: str, pictures: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seven seconds of a core each; the deadline is of a cell."""
    monkeypatch.setenv("PACKTRAIN_RUN", str(RUN))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    folder = {"metadata": {"path": str(ROOT / "notebooks")}}
    NotebookClient(notebook, timeout=120, kernel_name="python3", resources=folder).execute()
    shown = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert sum("image/png" in out.get("data", {}) for out in shown) == pictures
    said = "".join(out.get("text", "") for out in shown if out.get("name") == "stderr")
    assert "Warning" not in said, said


def test_the_report_opens_and_shows_every_part() -> None:
    html = (RUN / "report.html").read_text()
    html5lib.HTMLParser(strict=False).parse(html)
    for heading in (
        *("Accuracy by model", "Filter funnel", "The same prompts, before and after"),
        *("What the curriculum knew", "What another fraction would keep"),
    ):
        assert heading in html


def test_a_second_call_finds_nothing_to_do() -> None:
    line = [ROOT / ".venv" / "bin" / "packtrain", "run", "recipes/tiny/recipe.yaml", "--resume"]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "nothing to do: all 13 steps" in done.stdout
