"""What pass@k says about prompts, and that a broken-off run goes on where it was."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import make_tiny_model

from curation import mine
from curation.config import MineSection
from curation.mine import train
from curation.mining import Mined, mined_row, mined_schema, summarise
from curation.models import model_name
from ground.config import Data
from ground.entry import stage_entry
from ground.errors import InfraError
from ground.records import Difficulty, Message, Prompt
from ground.storage import commit_directory, verify_directory
from ground.tables import read_prompts, write_records, write_rows
from rollout.passk import wilson


def prompt(number: int, capability: str = "sums", text: str = "") -> Prompt:
    return Prompt.make(
        (Message("user", text or f"{number}+0="),),
        capability=capability,
        reward="format",
        answer="[^a-m]*",
        difficulty=Difficulty("medium", judged_by="level"),
    )


@pytest.mark.parametrize(
    ("successes", "trials", "status"),
    [
        (0, 16, "hopeless"),
        (1, 16, "workable"),
        (14, 16, "workable"),
        (15, 16, "solved"),
        (9, 10, "solved"),
        (0, 0, "skipped"),
    ],
)
def test_status_with_nine_tenths_as_solved(successes: int, trials: int, status: str):
    assert Mined(prompt(1), successes, trials).status(0.9) == status


def test_a_row_says_what_was_measured_and_reads_back(tmp_path: Path):
    """2 of 4: pass@1 1/2, pass@2 5/6, measured hardness 1/2 under the label that it came with."""
    mined = Mined(prompt(1), 2, 4)
    row = mined_row(mined, ks=[1, 2, 16], solved_at=0.9, judged_by="mine:m@1")
    assert (row["meta_pass_at_1"], row["meta_pass_at_2"], row["meta_pass_at_16"]) == (
        0.5, pytest.approx(5 / 6), None,
    )  # fmt: skip
    assert (row["meta_pass_low"], row["meta_pass_high"]) == (wilson(2, 4).low, wilson(2, 4).high)
    assert row["meta_status"] == "workable"
    path = tmp_path / "prompts.parquet"
    write_rows(path, [row], mined_schema([16, 1, 2]))
    (back,) = read_prompts(path, Data())
    assert back.id == mined.prompt.id
    assert back.difficulty == Difficulty("medium", 0.5, "mine:m@1", successes=2, trials=4)


def test_summary_by_hand():
    mined = [
        Mined(prompt(1), 0, 4),
        Mined(prompt(2), 4, 4),
        Mined(prompt(3, "words"), 2, 4),
        Mined(prompt(4, "words"), 0, 0, "too long"),
    ]
    summary = summarise(mined, ks=[1, 2, 8], solved_at=0.9, seed=0)
    counts = {key: summary[key] for key in ("prompts", "hopeless", "solved", "workable", "skipped")}
    assert counts == {"prompts": 4, "hopeless": 1, "solved": 1, "workable": 1, "skipped": 1}
    assert summary["pass@1"]["mean"] == pytest.approx(0.5)  # pyright: ignore[reportIndexIssue]
    assert "pass@8" not in summary
    words = summary["by_capability"]["words"]  # pyright: ignore[reportIndexIssue]
    assert words["pass@2"]["mean"] == pytest.approx(5 / 6)


def test_a_model_is_named_by_its_content(tmp_path: Path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.json").write_text("{}")
    name = model_name(tmp_path / "a")
    assert name.startswith("a@") and len(name) == 10 and model_name(tmp_path / "a") == name
    (tmp_path / "a" / "model.safetensors").write_bytes(b"x")
    assert model_name(tmp_path / "a") != name


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("model") / "policy", seed=2)


def recipe(tmp_path: Path, model: Path, *, with_long: bool = True) -> list[str]:
    """Twelve prompts that a random model solves by avoiding half of the alphabet, one too long."""
    prompts = [prompt(n, "sums" if n % 2 else "words") for n in range(12)]
    long = [prompt(0, text="9" * 300)] if with_long else []
    write_records(tmp_path / "prompts.jsonl", [*prompts, *long])
    document = {
        "name": "t",
        "model": {"path": str(model)},
        "data": {"prompts": str(tmp_path / "prompts.jsonl")},
        "mine": {
            "samples": 4, "k": [1, 4], "max_new_tokens": 6, "shard_size": 5,
            "engine": {"num_slots": 8, "max_length": 64},
        },
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(document))
    return [str(path), "--run", str(tmp_path / "run")]


def run_mine(argv: list[str]) -> int:
    return stage_entry("mine", MineSection, train, argv)


def test_every_prompt_is_measured_and_the_long_one_set_aside(tmp_path: Path, model: Path):
    """#65"""
    assert run_mine(recipe(tmp_path, model)) == 0
    stage = tmp_path / "run" / "mine"
    rows = pq.read_table(stage / "prompts.parquet").to_pylist()
    assert len(rows) == 12 and [r["id"] for r in rows] == sorted(r["id"] for r in rows)
    assert all(r["difficulty"]["trials"] == 4 for r in rows)
    assert {r["meta_status"] for r in rows} <= {"solved", "workable", "hopeless"}
    assert any(0 < r["difficulty"]["successes"] < 4 for r in rows)
    (skipped,) = pq.read_table(stage / "skipped.parquet").to_pylist()
    assert "must fit max_length 64" in skipped["meta_reason"]
    assert skipped["meta_status"] == "skipped"
    summary = json.loads((stage / "summary.json").read_text())
    assert (summary["prompts"], summary["skipped"]) == (13, 1)
    assert not (stage / "shards").exists()


def test_a_broken_off_run_goes_on_and_ends_with_the_same_bytes(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    """Broken in the third shard of three; the resumed run measures that one alone."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    assert run_mine(recipe(whole, model)) == 0
    measured: list[int] = []
    real = mine.measure

    def breaking(engine, chat, prompts, *rest, **settings):
        if len(measured) == 2:
            raise InfraError("the power fails")
        measured.append(len(prompts))
        return real(engine, chat, prompts, *rest, **settings)

    argv = recipe(broken, model)
    monkeypatch.setattr(mine, "measure", breaking)
    assert run_mine(argv) == 6
    assert measured == [5, 5]
    measured[:] = [0, 0, 0]
    assert run_mine([*argv, "--resume"]) == 0
    assert measured == [0, 0, 0, 3]
    for name in ("prompts.parquet", "skipped.parquet"):
        first, second = (p / "run" / "mine" / name for p in (whole, broken))
        assert first.read_bytes() == second.read_bytes()


def test_a_damaged_shard_is_measured_again(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    argv = recipe(tmp_path, model, with_long=False)
    real = mine.measure
    sizes: list[int] = []

    def counting(engine, chat, prompts, *rest, **settings):
        sizes.append(len(prompts))
        if len(sizes) == 3:
            raise InfraError("the power fails")
        return real(engine, chat, prompts, *rest, **settings)

    monkeypatch.setattr(mine, "measure", counting)
    assert run_mine(argv) == 6
    first = tmp_path / "run" / "mine" / "shards" / "00000000" / "outcomes.json"
    first.write_text(first.read_text().replace(", 4,", ", 3,"))
    assert run_mine([*argv, "--resume"]) == 0
    assert sizes == [5, 5, 2, 5, 2], "the damaged first one and the one that was broken off"


@pytest.mark.parametrize("foreign", ["weights", "prompts"])
def test_a_shard_of_other_weights_or_prompts_is_measured_again(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, foreign: str
):
    """It is whole and of the right size, and claims that everything is solved."""
    argv = recipe(tmp_path, model, with_long=False)
    real = mine.measure
    sizes: list[int] = []

    def counting(engine, chat, prompts, *rest, **settings):
        sizes.append(len(prompts))
        if len(sizes) == 2:
            raise InfraError("the power fails")
        return real(engine, chat, prompts, *rest, **settings)

    monkeypatch.setattr(mine, "measure", counting)
    assert run_mine(argv) == 6
    shard = tmp_path / "run" / "mine" / "shards" / "00000000"
    judged_by = verify_directory(shard).facts["judged_by"]
    ids = [outcome[0] for outcome in json.loads((shard / "outcomes.json").read_text())]
    if foreign == "weights":
        judged_by = "mine:policy@00000000"
    else:
        ids = ids[::-1]
    shutil.rmtree(shard)
    with commit_directory(shard, {"judged_by": judged_by}) as staging:
        solved = [[id_, 4, 4, ""] for id_ in ids]
        (staging / "outcomes.json").write_text(json.dumps(solved))
    assert run_mine([*argv, "--resume"]) == 0
    assert sizes == [5, 5, 5, 5, 2]
    rows = pq.read_table(tmp_path / "run" / "mine" / "prompts.parquet").to_pylist()
    assert {row["difficulty"]["successes"] for row in rows[:5]} != {4}


def test_nothing_but_long_prompts_is_an_error(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
):
    argv = recipe(tmp_path, model)
    write_records(tmp_path / "prompts.jsonl", [prompt(0, text="9" * 300)])
    assert run_mine(argv) == 3
    assert "no prompt could be asked" in capsys.readouterr().err
