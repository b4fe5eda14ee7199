"""Faults of form: each rule by hand, with the neighbour that is none."""

from __future__ import annotations

import pytest

from ground.records import Finish, Rollout, Segment
from rollout.quality import (
    Fault,
    breaks_format,
    fault_of,
    foreign_scripts,
    format_marks,
    is_looping,
    is_refusal,
    typical,
)


def rollout(
    text: str,
    num_tokens: int,
    *,
    passed: bool = True,
    finish: Finish = "stop",
    reward: float | None = None,
    error: str = "",
) -> Rollout:
    segment = Segment("policy", (7,) * num_tokens)
    worth = float(passed) if reward is None else reward
    return Rollout(0, (segment,), text, finish, worth, passed=passed, error=error)


def test_typical_is_the_right_answer_of_middle_length():
    """Of 3, 20 and 22 tokens the one of 20: the short one is a lucky guess."""
    guess, worked, longer = (rollout(f"=>{n}", n) for n in (3, 20, 22))
    assert typical([guess, longer, worked]) is worked
    assert typical([worked, guess]) is worked
    better = rollout("=>9", 30, reward=1.5)
    assert typical([guess, better, worked]) is better
    for unfit in (
        rollout("=>3", 9, passed=False),
        rollout("=>3", 9, finish="length"),
        rollout("=>3 =>3 =>3", 9),
        rollout(" ", 9),
    ):
        assert typical([unfit]) is None and typical([unfit, guess]) is guess


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        (rollout("1;2=>3", 10), None),
        (rollout("1;2=>4", 10, passed=False), None),
        (rollout("1;2=>3", 10, finish="length"), "truncated"),
        (rollout("1;2=>3", 10, finish="aborted"), None),
        (rollout("=>3 =>3 =>3", 10), "repetition"),
        (rollout("это=>3", 10), "language_mix"),
        (rollout("Sorry, no =>3", 10), None),
        (rollout("Sorry, no =>3", 10, passed=False), "needless_refusal"),
        (rollout("3", 10), None),
        (rollout("3", 10, passed=False), "format_break"),
        (rollout("3", 10, passed=False, error="reward_died: x"), None),
        (rollout("1;2=>3", 20), None),
        (rollout("1;2=>3", 21), "length_outlier"),
        (rollout("=>3", 1), None),
        (rollout("=>4", 2, passed=False), "length_outlier"),
        (rollout("=>4", 3, passed=False), None),
    ],
)
def test_faults_beside_a_typical_answer_of_ten_tokens(answer: Rollout, fault: Fault | None):
    assert fault_of(answer, rollout("1;1=>3", 10)) == fault


def test_without_a_right_answer_only_what_shows_by_itself_is_a_fault():
    assert fault_of(rollout("это", 99, passed=False), None) is None
    assert fault_of(rollout("a", 1, passed=False, finish="length"), None) == "truncated"


def test_what_was_asked_in_is_no_foreign_script():
    assert fault_of(rollout("это=>3", 10), rollout("=>3", 10), "сколько?") is None


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
    assert format_marks("so \\boxed{4}") == {"\\boxed{": 1}
    assert format_marks("Answer : 4 => x => y") == {"answer:": 1, "=>": 2}


@pytest.mark.parametrize(
    ("text", "model", "broken"),
    [
        ("4;+5=8=>8", "4;+5=9=>9", False),
        ("9", "4;+5=9=>9", True),
        ("=>", "=>9", True),
        ("=>8 =>9", "=>9", True),
        ("a => b => c", "a => b => 9", False),
        ("the answer is 4", "the answer is 9", False),
        ("about 4", "the answer is 9", True),
        ("```x```", "```y``` and ```z```", False),
    ],
)
def test_broken_format(text: str, model: str, broken: bool):
    assert breaks_format(text, model) is broken


@pytest.mark.parametrize(
    ("text", "refusal"),
    [
        ("I'm sorry, but I can't help with that.", True),
        ("Sorry, no.", True),
        ("I cannot answer this.", True),
        ("Unfortunately, I am unable to say.", True),
        ("As an AI language model, I …", True),
        ("I apologize, this is beyond me.", True),
        ("I can count them: 4", False),
        ("The sorry state of affairs", False),
        ("She said: I cannot", False),
        ("We canter home", False),
    ],
)
def test_refusals_by_their_opening(text: str, refusal: bool):
    assert is_refusal(text) is refusal


@pytest.mark.parametrize(
    ("text", "known", "foreign"),
    [
        ("nine 九个", "nine", {"CJK"}),
        ("九", "nine", set()),
        ("ひらがなカタカナ", "漢字", set()),
        ("2πr, αβ, naïve, ½", "two", set()),
        ("девять и 九个", "девять", {"CJK"}),
        ("nine", "九个", set()),
    ],
)
def test_foreign_scripts(text: str, known: str, foreign: set[str]):
    assert foreign_scripts(text, known) == foreign
