"""Mining preferences: each reason by hand, one pair per prompt, honest counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo.config import PairsSection
from dpo.pairs import (
    Answer,
    GroupRow,
    MinedPair,
    fault,
    format_marks,
    is_looping,
    mine_pairs,
    pair_of,
)
from dpo.tables import PAIR_SCHEMA, group_row, pair_row, read_groups
from ground.errors import DataError
from ground.records import Message, Prompt
from ground.tables import read_rows, write_rows

SECTION = PairsSection()


def answer(index: int, text: str, reward: float, **changes: object) -> Answer:
    fields: dict[str, object] = {
        "passed": reward >= 1,
        "ended": True,
        "num_tokens": len(text),
    }
    return Answer(index, text, reward, **{**fields, **changes})  # pyright: ignore[reportArgumentType]


def group(*answers: Answer, version: int = 5, prompt: str = "p1", capability: str = "sums"):
    task = Prompt(prompt, (Message("user", "2+2="),), capability, "exact", "4")
    return GroupRow(f"{prompt}.{version}", version, task, "", answers)


def mined(row: GroupRow, section: PairsSection = SECTION) -> tuple[str, str, str]:
    pair = pair_of(row, section)
    assert isinstance(pair, MinedPair), pair
    return pair.pair.chosen, pair.pair.rejected, pair.pair.reason


def test_best_against_worst_by_the_verifier():
    row = group(
        answer(0, "long way => 4", 1),
        answer(1, "=> 5", 0),
        answer(2, "=> 6", -0.5),
        answer(3, "=> 4", 1),
    )
    assert mined(row) == ("=> 4", "=> 6", "wrong")


@pytest.mark.parametrize(
    ("rejected", "reason"),
    [
        (answer(1, "=> 5", 0), "wrong"),
        (answer(1, "5", 0), "format_break"),
        (answer(1, "=> 5" + " and so on, as we know" * 2, 0, num_tokens=21), "length_outlier"),
        (answer(1, "=> 5 => 5 => 5", 0), "repetition"),
        (answer(1, "5 5 5 5 5 5 5", 0, ended=False), "truncated"),
        (answer(1, "=> 5 => 5 => 5", 0, ended=False), "truncated"),
    ],
)
def test_the_plainest_fault_names_the_pair(rejected: Answer, reason: str):
    assert mined(group(answer(0, "=> 4", 1), rejected)) == ("=> 4", rejected.text, reason)


def test_a_right_answer_is_rejected_only_for_a_fault_of_form():
    row = group(answer(0, "=> 4", 1), answer(1, "=> 4 " + "padding " * 9, 1, num_tokens=40))
    assert mined(row) == ("=> 4", row.answers[1].text, "repetition")
    varied = "=> 4, which follows from counting on the fingers of one hand"
    row = group(answer(0, "=> 4", 1), answer(1, varied, 1, num_tokens=40))
    assert mined(row)[2] == "length_outlier"
    same_length = group(answer(0, "=> 4", 1), answer(1, "it is 4", 1))
    assert pair_of(same_length, SECTION) == "nothing_to_reject"


def test_a_wrong_answer_comes_before_a_right_one_with_a_fault():
    row = group(
        answer(0, "=> 4", 1),
        answer(1, "=> 4 => 4 => 4", 1),
        answer(2, "=> 5", 0),
    )
    assert mined(row) == ("=> 4", "=> 5", "wrong")


def test_length_outliers_need_ratio_and_excess():
    chosen = answer(0, "c", 1, num_tokens=10)
    at_limit = answer(1, "r", 0, num_tokens=20)
    assert fault(at_limit, chosen, PairsSection(outlier_tokens=1)) == "wrong"
    beyond = answer(1, "r", 0, num_tokens=21)
    assert fault(beyond, chosen, PairsSection(outlier_tokens=11)) == "length_outlier"
    assert fault(beyond, chosen, PairsSection(outlier_tokens=12)) == "wrong"


def test_groups_without_a_clean_answer_or_a_bad_one_give_no_pair():
    assert pair_of(group(answer(0, "=> 5", 0)), SECTION) == "nothing_to_choose"
    assert pair_of(group(answer(0, "=> 4", 1, ended=False)), SECTION) == "nothing_to_choose"
    assert pair_of(group(answer(0, "=> 4 => 4 => 4", 1)), SECTION) == "nothing_to_choose"
    assert pair_of(group(answer(0, "", 1), answer(1, "x", 0)), SECTION) == "nothing_to_choose"
    assert pair_of(group(answer(0, "4", 1), answer(1, "4", 0)), SECTION) == "nothing_to_reject"


def test_reasons_can_be_left_out():
    row = group(answer(0, "=> 4", 1), answer(1, "=> 5", 0), answer(2, "=> 5 => 5 => 5", 0))
    assert mined(row, PairsSection(reasons=["repetition"]))[2] == "repetition"
    assert pair_of(row, PairsSection(reasons=["truncated"])) == "nothing_to_reject"


@pytest.mark.parametrize(
    ("text", "looping"),
    [
        ("2+2 => 4 => 4 => 4", True),
        ("2+2 => 4 => 4", False),
        ("10000000000000000", False),
        ("ha ha ha ha ha ha \n", True),
        ("abcabcabc", False),
        ("a line\na line\na line\n", True),
        ("", False),
    ],
)
def test_looping_is_three_times_the_same_at_the_end(text: str, looping: bool):
    assert is_looping(text) is looping


def test_format_marks():
    assert format_marks("so \\boxed{4}") == {"\\boxed{"}
    assert format_marks("Answer : 4 => x") == {"answer:", "=>"}


def test_one_pair_per_prompt_from_the_group_nearest_to_the_base():
    old = group(answer(0, "old 4", 1), answer(1, "5", 0), version=4)
    new = group(answer(0, "new 4", 1), answer(1, "5", 0), version=9)
    flat = group(answer(0, "=> 5", 0), version=10)
    stale = group(answer(0, "4", 1), answer(1, "5", 0), version=3, prompt="p2")
    result = mine_pairs([old, stale, flat, new], 10, PairsSection(max_age=6))
    (pair,) = result.pairs
    assert (pair.pair.chosen, pair.version) == ("new 4", 9)
    assert result.counts == {
        "group_too_far": 1,
        "nothing_to_choose": 1,
        "pair_wrong": 1,
        "prompt_has_a_pair": 1,
    }
    result = mine_pairs([old, stale, flat, new], 3, PairsSection(max_age=6))
    assert [pair.version for pair in result.pairs] == [3, 4], "RL's best version was an early one"
    assert result.counts["group_too_far"] == 1, "version 10 is seven ahead of the base"


def test_the_cap_goes_round_the_capabilities_nearest_first():
    rows = [
        group(answer(0, "4", 1), answer(1, "5", 0), prompt=f"{kind}{n}", version=n, capability=kind)
        for kind, versions in (("sums", (1, 2, 3, 4)), ("words", (2,)))
        for n in versions
    ]
    result = mine_pairs(rows, 4, PairsSection(max_pairs=3))
    assert [pair.pair.prompt.id for pair in result.pairs] == ["sums4", "words2", "sums3"]
    assert result.counts["over_max_pairs"] == 2
    assert mine_pairs(list(reversed(rows)), 4, PairsSection(max_pairs=3)) == result
    assert mine_pairs([], 0, SECTION).pairs == ()


def raw_group(**changes: object) -> dict[str, object]:
    row: dict[str, object] = {
        "id": "p1.0",
        "prompt_id": "p1",
        "version": 3,
        "messages": [{"role": "user", "content": "2+2="}],
        "capability": "sums",
        "reward": "exact",
        "answer": "4",
        "system": "Be brief.",
        "texts": ["4", "5"],
        "rewards": [1.0, 0.0],
        "passed": [True, False],
        "finish": ["stop", "length"],
        "num_tokens": [2, 9],
    }
    return {**row, **changes}


def test_rows_of_groups_and_pairs_go_through_parquet(tmp_path: Path):
    row = group_row(raw_group(), "here")
    assert row.answers[1] == Answer(1, "5", 0.0, passed=False, ended=False, num_tokens=9)
    (pair,) = mine_pairs([row], 3, SECTION).pairs
    write_rows(tmp_path / "pairs.parquet", [pair_row(pair)], PAIR_SCHEMA)
    (back,) = read_rows(tmp_path / "pairs.parquet")
    assert (back["chosen"], back["rejected"], back["reason"]) == ("4", "5", "truncated")
    assert back["system"] == "Be brief." and back["group"] == "p1.0"


@pytest.mark.parametrize(
    "changes",
    [{"texts": ["4"]}, {"rewards": None}, {"version": "new"}, {"messages": [{"role": "bot"}]}],
)
def test_a_damaged_group_is_named(changes: dict[str, object]):
    with pytest.raises(DataError, match="cannot be read") as caught:
        group_row(raw_group(**changes), "step_000003.parquet:row 7")
    assert caught.value.where == "step_000003.parquet:row 7"


def test_the_files_of_the_rl_stage_are_read_in_order(tmp_path: Path):
    """Contract with rl/groups.py: a file with its schema reads back as groups."""
    groups = pytest.importorskip("rl.groups")
    extra = {"state": "trained", "reason": "", "errors": ["", ""], "advantages": [0.5, -0.5]}
    files = [groups.groups_path(tmp_path, step) for step in (1, 2)]
    for step, file in enumerate(files, start=1):
        journal = dict.fromkeys(groups.SCHEMA.names)
        write_rows(file, [{**journal, **raw_group(version=step), **extra}], groups.SCHEMA)
    assert [row.version for row in read_groups(files)] == [1, 2]
    assert read_groups([]) == []
