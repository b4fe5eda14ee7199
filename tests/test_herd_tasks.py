"""The demo's questions: right by reasoning-gym's verifier, seeded, thought through by hand."""

from __future__ import annotations

from itertools import islice

import pytest
from herd_figures import verdict

from ground.answers import final_answer
from ground.herd import scratchpads
from ground.herd.corpus import Authors, Habits, Questions, conversation
from ground.herd.families import FAMILIES, SOLVED, Family
from ground.herd.tasks import Task, draw, stream_seed
from ground.records import LABELS, Message


@pytest.mark.parametrize("family", SOLVED, ids=lambda family: family.name)
def test_a_scratchpad_ends_in_the_answer_that_the_verifier_accepts(family: Family) -> None:
    for label in LABELS:
        for task in islice(draw(family, label, "test"), 30):
            assert verdict(task, task.completion(think=True))
            assert verdict(task, task.completion(think=False))
            assert not verdict(task, task.completion(think=True, answer="no"))


def test_thinking_in_each_family_is_what_one_does_by_hand() -> None:
    assert scratchpads.running_total({"expression": "4 - 1 + 7"}) == "4;-1=3;+7=10"
    assert scratchpads.letters_so_far({"target_letter": "e", "span": ["We", "see"]}) == "W1;s3"
    animals = {"cat": 1, "bird": 2}
    assert scratchpads.legs_so_far({"animals": animals}) == "4=4;4=8"
    assert scratchpads.numbered_letters({"word": "sun"}) == "1s2u3n"
    assert scratchpads.numbered_words({"words": ["go", "on"]}) == "1g2o"


def test_turning_the_front_of_a_cube_to_the_top_keeps_left_and_right() -> None:
    colors = ("red", "blue", "gold", "pink", "cyan", "gray")
    faces = ("top", "right", "front", "left", "back", "bottom")
    start = dict(zip(faces, colors, strict=True))
    story = {"initial_state": start, "rotations": ["front"], "target_side": "back"}
    before = "top=red,right=blue,front=gold,left=pink,back=cyan,bottom=gray"
    after = "top=gold,right=blue,front=gray,left=pink,back=red,bottom=cyan"
    assert scratchpads.cube_by_cube(story) == f"{before};{after};back=red"


def test_sums_that_leave_0_to_20_are_not_asked() -> None:
    assert scratchpads.stays_small({"expression": "9 + 9 + 2 - 5"})
    assert not scratchpads.stays_small({"expression": "9 + 9 + 3 - 5"})
    assert not scratchpads.stays_small({"expression": "2 - 7 + 9"})


def test_harder_levels_ask_for_more() -> None:
    def mean_scratchpad(label: str) -> float:
        tasks = [*islice(draw(family, label, 0), 20)]  # pyright: ignore[reportArgumentType]
        return sum(len(task.scratchpad) for task in tasks) / len(tasks)

    for family in SOLVED:
        easy, medium, hard = map(mean_scratchpad, LABELS)
        assert easy < medium < hard, family.name


def test_equal_seeds_draw_equal_questions_and_others_do_not() -> None:
    def questions(*seed: object) -> list[str]:
        return [task.question for task in islice(draw(FAMILIES["chain_sum"], "hard", *seed), 20)]

    assert questions(0, "sft") == questions(0, "sft")
    assert not set(questions(0, "sft")) & set(questions(1, "sft"))
    assert stream_seed("a", 1) == stream_seed("a", 1) != stream_seed("a", 2)


def test_a_prompt_carries_what_the_verifier_needs() -> None:
    task = Task("gcd", "arithmetic", "easy", "GCD of 4 and 6?", "2", "")
    assert task.prompt.answer == '{"family":"gcd","answer":"2","metadata":{}}'
    assert task.prompt.reward == "reasoning_gym"
    assert task.prompt.difficulty is not None and task.prompt.difficulty.label == "easy"


def test_two_capabilities_at_least_have_a_family_that_the_judge_never_saw() -> None:
    assert len({family.capability for family in SOLVED}) >= 4
    unseen = [family for family in SOLVED if not family.judge_learns]
    assert len({family.capability for family in unseen}) >= 2


def test_authors_err_as_often_as_their_habits_say() -> None:
    authors = Authors(Habits(think=0.35, slip=(0.0, 0.0, 0.0), guess=(0.0, 0.0, 0.6)), "test")
    tasks = [*islice(draw(FAMILIES["spell_backward"], "hard", "test"), 2000)]
    completions = [(task, authors.answer(task)) for task in tasks]
    thought = [(task, text) for task, text in completions if not text.startswith("=>")]
    direct = [(task, text) for task, text in completions if text.startswith("=>")]
    assert len(thought) / len(tasks) == pytest.approx(0.35, abs=0.03)
    assert all(verdict(task, text) for task, text in thought)
    wrong = sum(final_answer(text) != task.answer for task, text in direct) / len(direct)
    assert wrong == pytest.approx(0.6, abs=0.04)


def test_careful_authors_make_no_mistakes() -> None:
    authors = Authors(Habits(think=0.5, slip=(1.0, 1.0, 1.0), guess=(1.0, 1.0, 1.0)), "test")
    for task in islice(draw(FAMILIES["leg_counting"], "hard", "test"), 50):
        assert final_answer(authors.answer(task, careful=True)) == task.answer


def test_forbidden_questions_are_never_asked() -> None:
    family = FAMILIES["leg_counting"]
    first = [Questions("x", families=[family]).ask(["easy"]).question for _ in range(1)]
    questions = Questions("x", families=[family], forbidden=set(first))
    assert first[0] not in {questions.ask(["easy"]).question for _ in range(300)}


def test_a_conversation_puts_the_system_instruction_first() -> None:
    task = Task("gcd", "arithmetic", "easy", "GCD of 4 and 6?", "2", "")
    assert conversation(task, "=>2", "Be brief.") == (
        Message("system", "Be brief."),
        Message("user", "GCD of 4 and 6?"),
        Message("assistant", "=>2"),
    )
