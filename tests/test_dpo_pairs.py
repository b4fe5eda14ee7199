"""Mining preferences: each reason by hand, one pair per prompt, honest counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from dpo.config import PairsSection
from dpo.pairs import Answer, GroupRow, MinedPair, mine_pairs, pair_of
from dpo.tables import PAIR_SCHEMA, group_row, pair_row, read_groups
from ground.errors import DataError
from ground.records import Message, Prompt
from ground.tables import read_rows, write_rows

SECTION = PairsSection()
WRONG_TOO = PairsSection(max_wrong_share=1)


def answer(index: int, text: str, reward: float, **changes: object) -> Answer:
    fields: dict[str, object] = {
        "passed": reward >= 1,
        "finish": "stop",
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
        answer(0, "=> 4 it", 1),
        answer(1, "=> 5", 0),
        answer(2, "=> 6", -0.5),
        answer(3, "=> 4", 1),
        answer(4, "=> 4 is it", 1, num_tokens=14),
    )
    assert mined(row) == ("=> 4 it", "=> 6", "wrong"), "the right answer of middle length"


@pytest.mark.parametrize(
    ("rejected", "reason"),
    [
        (answer(1, "=> 5", 0), "wrong"),
        (answer(1, "5", 0), "format_break"),
        (answer(1, "=> 5 and so on, as we all know", 0, num_tokens=13), "length_outlier"),
        (answer(1, "=> 5 => 5 => 5", 0), "repetition"),
        (answer(1, "=> 5 девять", 0), "language_mix"),
        (answer(1, "I'm sorry, but I can't => 5", 0), "needless_refusal"),
        (answer(1, "5 5 5 5 5 5 5", 0, finish="length"), "truncated"),
        (answer(1, "=> 5 => 5 => 5", 0, finish="length"), "truncated"),
    ],
)
def test_the_plainest_fault_names_the_pair(rejected: Answer, reason: str):
    assert mined(group(answer(0, "=> 4", 1), rejected)) == ("=> 4", rejected.text, reason)


def test_a_right_answer_is_rejected_only_for_a_fault_of_form():
    row = group(answer(0, "=> 4", 1), answer(1, "=> 4 " + "padding " * 9, 1, num_tokens=40))
    assert mined(row) == ("=> 4", row.answers[1].text, "repetition")
    short = [answer(n, "=> 4", 1) for n in (0, 1)]
    varied = "=> 4, which follows from counting on the fingers of one hand"
    assert mined(group(*short, answer(2, varied, 1, num_tokens=40)))[2] == "length_outlier"
    same_length = group(answer(0, "=> 4", 1), answer(1, "it is 4", 1))
    assert pair_of(same_length, SECTION) == "nothing_to_reject"


def test_a_fault_of_form_comes_before_a_wrong_result():
    row = group(
        answer(0, "=> 4", 1),
        answer(1, "=> 6", -1),
        answer(2, "=> 4 => 4 => 4", 1),
        answer(3, "5", 0),
    )
    assert mined(row) == ("=> 4", "=> 4 => 4 => 4", "repetition")
    assert mined(row, PairsSection(reasons=["format_break", "wrong"]))[2] == "format_break"
    assert mined(row, PairsSection(reasons=["wrong"]))[1:] == ("=> 6", "wrong")


def test_length_outliers_need_ratio_and_difference():
    def reason(section: PairsSection, rejected: Answer) -> str:
        return mined(group(answer(0, "c", 1, num_tokens=20), rejected), section)[2]

    assert reason(PairsSection(outlier_tokens=1), answer(1, "r", 0, num_tokens=40)) == "wrong"
    beyond = answer(1, "r", 0, num_tokens=41)
    assert reason(PairsSection(outlier_tokens=21), beyond) == "length_outlier"
    assert reason(PairsSection(outlier_tokens=22), beyond) == "wrong"
    assert reason(PairsSection(outlier_tokens=1), answer(1, "r", 0, num_tokens=10)) == "wrong"
    skipped = answer(1, "r", 0, num_tokens=9)
    assert reason(PairsSection(outlier_tokens=11), skipped) == "length_outlier"
    assert reason(PairsSection(outlier_tokens=12), skipped) == "wrong"


def test_an_answer_without_a_verdict_is_neither_chosen_nor_rejected():
    """Its verifier hung or died: it earned 0, and nobody knows whether it is worse."""
    right, wrong = answer(0, "=> 4", 1), answer(1, "=> 5", 0)
    hung = answer(2, "=> 6", 0, error="reward_timeout: no reply within 10 s")
    assert pair_of(group(right, hung), SECTION) == "nothing_to_reject"
    cut = answer(2, "6 6 6", 0, finish="length", error="reward_died: exit code -9")
    assert mined(group(right, wrong, hung, cut)) == ("=> 4", "=> 5", "wrong")
    aborted = answer(2, "=", 0, finish="aborted")
    assert pair_of(group(right, aborted), SECTION) == "nothing_to_reject"


def test_failing_where_an_earlier_model_never_failed_is_a_regression():
    solved = group(answer(0, "4", 1), answer(1, "4 ", 1), version=3)
    mixed = group(answer(0, "4", 1), answer(1, "5", 0), version=5)
    (pair,) = mine_pairs([mixed, solved], 5, SECTION).pairs
    assert (pair.pair.reason, pair.version) == ("regression", 5)
    later = group(answer(0, "4", 1), answer(1, "4 ", 1), version=6)
    assert mine_pairs([mixed, later], 5, WRONG_TOO).counts["pair_wrong"] == 1
    half = group(answer(0, "4", 1), answer(1, "6", 0), version=3)
    assert "pair_regression" not in mine_pairs([mixed, half], 5, WRONG_TOO).counts


def test_merely_wrong_pairs_are_a_bounded_share_and_come_last():
    """Three faults of form and a share of 2/5 leave room for two wrong pairs."""
    rows = [
        group(answer(0, "=> 4", 1), answer(1, "5" if n < 3 else "=> 5", 0), prompt=f"p{n}")
        for n in range(9)
    ]
    result = mine_pairs(rows[::-1], 5, PairsSection(max_wrong_share=0.4))
    reasons = [pair.pair.reason for pair in result.pairs]
    assert reasons == ["format_break"] * 3 + ["wrong"] * 2
    assert result.counts == {"over_max_wrong": 4, "pair_format_break": 3, "pair_wrong": 2}
    assert mine_pairs(rows, 5, SECTION).counts["pair_wrong"] == 1, "a quarter when left out"
    assert len(mine_pairs(rows, 5, WRONG_TOO).pairs) == 9
    assert mine_pairs(rows[3:], 5, SECTION).pairs == (), "RL's business alone"
    few = mine_pairs(rows, 5, PairsSection(max_wrong_share=0.4, max_pairs=4))
    assert few.counts == {"over_max_wrong": 5, "pair_format_break": 3, "pair_wrong": 1}


def test_a_prompt_gives_its_fault_of_form_even_from_a_farther_group():
    near = group(answer(0, "=> 4", 1), answer(1, "=> 5", 0), version=9)
    far = group(answer(0, "=> 4", 1), answer(1, "5", 0), version=7)
    (pair,) = mine_pairs([near, far], 9, WRONG_TOO).pairs
    assert (pair.pair.reason, pair.version) == ("format_break", 7)


def test_groups_without_a_clean_answer_or_a_bad_one_give_no_pair():
    assert pair_of(group(answer(0, "=> 5", 0)), SECTION) == "nothing_to_choose"
    assert pair_of(group(answer(0, "=> 4", 1, finish="length")), SECTION) == "nothing_to_choose"
    assert pair_of(group(answer(0, "=> 4 => 4 => 4", 1)), SECTION) == "nothing_to_choose"
    assert pair_of(group(answer(0, "", 1), answer(1, "x", 0)), SECTION) == "nothing_to_choose"
    assert pair_of(group(answer(0, "4", 1), answer(1, "4", 0)), SECTION) == "nothing_to_reject"


def test_reasons_can_be_left_out():
    row = group(answer(0, "=> 4", 1), answer(1, "=> 5", 0), answer(2, "=> 5 => 5 => 5", 0))
    assert mined(row, PairsSection(reasons=["repetition"]))[2] == "repetition"
    assert pair_of(row, PairsSection(reasons=["truncated"])) == "nothing_to_reject"


def test_one_pair_per_prompt_from_the_group_nearest_to_the_base():
    old = group(answer(0, "old 4", 1), answer(1, "5", 0), version=4)
    new = group(answer(0, "new 4", 1), answer(1, "5", 0), version=9)
    flat = group(answer(0, "=> 5", 0), version=10)
    stale = group(answer(0, "4", 1), answer(1, "5", 0), version=3, prompt="p2")
    result = mine_pairs([old, stale, flat, new], 10, PairsSection(max_age=6, max_wrong_share=1))
    (pair,) = result.pairs
    assert (pair.pair.chosen, pair.version) == ("new 4", 9)
    assert result.counts == {
        "group_too_far": 1,
        "nothing_to_choose": 1,
        "pair_wrong": 1,
        "prompt_has_a_pair": 1,
    }
    result = mine_pairs([old, stale, flat, new], 3, PairsSection(max_age=6, max_wrong_share=1))
    assert [pair.version for pair in result.pairs] == [3, 4], "RL's best version was an early one"
    assert result.counts["group_too_far"] == 1, "version 10 is seven ahead of the base"


def test_the_cap_goes_round_the_capabilities_nearest_first():
    rows = [
        group(answer(0, "4", 1), answer(1, "5", 0), prompt=f"{kind}{n}", version=n, capability=kind)
        for kind, versions in (("sums", (1, 2, 3, 4)), ("words", (2,)))
        for n in versions
    ]
    result = mine_pairs(rows, 4, PairsSection(max_pairs=3, max_wrong_share=1))
    assert [pair.pair.prompt.id for pair in result.pairs] == ["sums4", "words2", "sums3"]
    assert result.counts["over_max_wrong"] == 2
    assert (
        mine_pairs(list(reversed(rows)), 4, PairsSection(max_pairs=3, max_wrong_share=1)) == result
    )
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
        "errors": ["", "reward_died: x"],
    }
    return {**row, **changes}


def test_rows_of_groups_and_pairs_go_through_parquet(tmp_path: Path):
    row = group_row(raw_group(), "here")
    assert row.answers[1] == Answer(1, "5", 0.0, False, "length", 9, "reward_died: x")
    row = group_row(raw_group(errors=["", ""]), "here")
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
    extra = {"state": "trained", "reason": "", "advantages": [0.5, -0.5]}
    files = [groups.groups_path(tmp_path, step) for step in (1, 2)]
    for step, file in enumerate(files, start=1):
        journal = dict.fromkeys(groups.SCHEMA.names)
        write_rows(file, [{**journal, **raw_group(version=step), **extra}], groups.SCHEMA)
    assert [row.version for row in read_groups(files)] == [1, 2]
    assert read_groups([]) == []
