"""The demo's data files: balanced, disjoint, and the same bytes for the same seed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from ground.answers import final_answer
from ground.config import Data
from ground.herd.config import HerdSection
from ground.herd.files import data_files
from ground.tables import read_demonstrations, read_prompts

SECTION = HerdSection(demonstrations_per_level=6, prompts_per_level=4, heldout_per_level=3)  # pyright: ignore[reportCallIssue]


@pytest.fixture(scope="module")
def files() -> dict[str, str]:
    return data_files(SECTION, seed=0)


def _rows(content: str) -> list[dict]:
    return [json.loads(line) for line in content.splitlines()]


def _question(row: dict) -> str:
    return next(message["content"] for message in row["messages"] if message["role"] == "user")


def test_equal_seeds_give_equal_bytes(files: dict[str, str]) -> None:
    assert data_files(SECTION, seed=0) == files
    other = data_files(SECTION, seed=1)
    assert other["sft.jsonl"] != files["sft.jsonl"]
    assert other["prompts.jsonl"] != files["prompts.jsonl"]


def test_what_is_held_out_is_the_same_for_every_seed(files: dict[str, str]) -> None:
    assert data_files(SECTION, seed=1)["heldout.jsonl"] == files["heldout.jsonl"]


def test_no_question_stands_in_two_files_or_twice_in_one(files: dict[str, str]) -> None:
    questions = [_question(row) for content in files.values() for row in _rows(content)]
    assert len(questions) == len(set(questions)) == 21 * (6 + 4 + 3)


def test_families_and_levels_have_equal_shares(files: dict[str, str]) -> None:
    cells = Counter(
        (json.loads(row["answer"])["family"], row["difficulty"]["label"])
        for row in _rows(files["heldout.jsonl"])
    )
    assert len(cells) == 21 and set(cells.values()) == {3}


def test_every_demonstration_is_right_and_both_ways_of_answering_are_shown(
    files: dict[str, str],
) -> None:
    thought = 0
    rows = _rows(files["sft.jsonl"])
    for row in rows:
        completion, answer = row["messages"][-1]["content"], json.loads(row["answer"])["answer"]
        assert final_answer(completion) == answer
        thought += not completion.startswith("=>")
    assert thought / len(rows) == pytest.approx(0.45, abs=0.13)


def test_the_house_reads_them(files: dict[str, str], tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    demonstrations = read_demonstrations(tmp_path / "sft.jsonl", Data())
    prompts = read_prompts(tmp_path / "prompts.jsonl", Data())
    assert len(demonstrations) == 126 and len(prompts) == SECTION.num_prompts == 84
    assert demonstrations[0].messages[-1].role == "assistant"
    assert prompts[0].reward == "reasoning_gym"
