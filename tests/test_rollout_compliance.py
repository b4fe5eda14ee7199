"""Constraints of system instructions: drawn by seed, checked by rule, paid, never a solution."""

from __future__ import annotations

import json
import re
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from ground.chat import ChatTemplate
from ground.config import Instruction, JudgeSettings, SandboxSettings, Systems
from ground.constraints import RULES, Constraint, ConstraintName, Value
from ground.errors import DataError
from ground.model import load_tokenizer
from ground.records import Message, Prompt
from rollout.code_tests import read_tests
from rollout.compliance import Demand, compliance_rates, with_compliance
from rollout.compliance_evaluation import measure_compliance
from rollout.config import EvaluateSection, SamplingSection
from rollout.engine import Request
from rollout.fake_engine import FakeEngine
from rollout.reward_pool import RewardPool, ScoredText
from rollout.rewards import Score, call_reward, find_reward
from rollout.systems import Among, SystemInstruction, draw_system
from rollout.task import GroupTask

KEPT: list[tuple[ConstraintName, Value, str, str]] = [
    ("max_words", 3, "it's well-known now", "one two three four"),
    ("min_words", 3, "one two three", "one two"),
    ("max_sentences", 2, "It is 3.5 now. Yes!", "One. Two. three"),
    ("paragraphs", 2, "a\nb\n\n\nc", "a\n\nb\n\nc"),
    ("bullets", 2, "So:\n- a\n - b", "- a\n-b"),
    ("numbered", 2, "1. a\n2) b", "1. a\n3. b"),
    ("json_key", "answer", '{"answer": [4]}', '{"answer": 4, "x": 1}'),
    ("starts_with", "Well,", "\nWell, it is 4.", "It is, well, 4."),
    ("ends_with", "That is all.", "4. That is all.\n", "That is all. 4"),
    ("signed_by", "Ada", "It is 4.\n\n- Ada", "Ada says 4."),
    ("without_word", "and", "sand, Andes", "this And that"),
    ("with_word", "llama", "A LLAMA!", "llamas"),
    ("language", "Russian", "Ответ: четыре (x)", "the answer is четыре"),
    ("language", "Japanese", "答えは四です", "四個"),
    ("language", "Greek", "τέσσερα", "4"),
]
MIXED = Systems(
    pools={
        "chat": [
            Instruction(text="Be kind.", constraint="max_words", weight=3),
            Instruction(constraint="bullets", values=[2], heldout=[9]),
        ],
        "any": ["", "Think."],
    }
)


@pytest.mark.parametrize(("name", "value", "good", "bad"), KEPT)
def test_a_constraint_tells_who_keeps_it(name: ConstraintName, value: Value, good: str, bad: str):
    constraint = Constraint(name, value)
    assert constraint.holds(good) and not constraint.holds(bad) and not constraint.holds(" \n")


def test_every_rule_has_words_and_values_that_it_can_check():
    assert {name for name, *_ in KEPT} == set(RULES)
    for name, rule in RULES.items():
        assert not set(rule.values) & set(rule.heldout) and rule.values and rule.heldout
        Instruction(constraint=name, values=list(rule.values), heldout=list(rule.heldout))
        for words in rule.wordings:
            assert words.format(value="VALUE").count("VALUE") == 1


def test_hostile_answers_are_checked_in_bounded_time():
    texts = (
        "[" * 100_000, "a" * 200_000, "- \n" * 50_000, "1. " * 50_000, "\ud800" * 1000,
        "." * 50_000 + "x", "x" + ".'" * 50_000 + "x",
    )  # fmt: skip
    started = time.process_time()
    for name, rule in RULES.items():
        for text in texts:
            Constraint(name, rule.values[0]).holds(text)
    assert time.process_time() - started < 10


@pytest.mark.parametrize("text", ["", " \n", "!!!", ".", "\U0001f999", "- \n- \n- "])
def test_a_text_without_a_word_keeps_nothing(text: str):
    for name, rule in RULES.items():
        assert not any(Constraint(name, value).holds(text) for value in rule.values)


@pytest.mark.parametrize(
    ("text", "most"), [("Well... so?! Yes.", 3), ("3.5 is 3.5.", 1), ("a..b... c", 2), ("a.", 1)]
)
def test_sentences_end_where_their_marks_do(text: str, most: int):
    assert Constraint("max_sentences", most).holds(text)
    assert most == 1 or not Constraint("max_sentences", most - 1).holds(text)


def drawn(
    systems: Systems, capability: str, number: int, among: Among = "all"
) -> SystemInstruction:
    return draw_system(
        systems, capability, run_seed=7, prompt_id=f"p{number}", pass_=0, among=among
    )


def test_draws_follow_the_seed_and_the_weights():
    draws = [drawn(MIXED, "chat", number) for number in range(2000)]
    assert draws == [drawn(MIXED, "chat", number) for number in range(2000)]
    names = Counter(each.demand.constraint.name for each in draws if each.demand)
    assert 1420 < names["max_words"] < 1580 and names["max_words"] + names["bullets"] == 2000
    kind = [each for each in draws if each.text.startswith("Be kind. ")]
    assert len(kind) == names["max_words"]
    values = Counter(each.demand.constraint.value for each in kind if each.demand)
    assert set(values) == {20, 30, 50, 80, 120} and min(values.values()) > 230
    assert all(str(each.demand.constraint.value) in each.text for each in kind if each.demand)


def test_other_capabilities_share_a_pool_of_plain_texts():
    draws = [drawn(MIXED, "math", number) for number in range(100)]
    assert {each.text for each in draws} == {"", "Think."}
    assert all(each.demand is None for each in draws)
    assert drawn(Systems(), "math", 1) == SystemInstruction()


def test_untrained_values_are_never_those_of_training():
    def values(among: Among) -> set[tuple[str, Value]]:
        draws = [drawn(MIXED, "chat", number, among) for number in range(500)]
        found = [each.demand.constraint for each in draws if each.demand]
        return {(each.name, each.value) for each in found}

    assert values("untrained") == {("max_words", n) for n in (25, 40, 100)} | {("bullets", 9)}
    assert values("trained") == {("max_words", n) for n in (20, 30, 50, 80, 120)} | {("bullets", 2)}
    assert values("all") == values("trained")
    assert drawn(MIXED, "math", 1, "untrained") == SystemInstruction(), "nothing to check"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"values": [1]}, "belong to a constraint"),
        ({"constraint": "max_words", "values": ["ten"]}, "whole numbers above 0"),
        ({"constraint": "max_words", "values": [0]}, "whole numbers above 0"),
        ({"constraint": "language", "values": ["French"]}, "takes one of Russian"),
        ({"constraint": "ends_with", "values": ["!"]}, "takes text"),
        ({"constraint": "bullets", "values": [2], "heldout": [2]}, "both trained and held out"),
        ({"constraint": "max_wrods"}, "max_words"),
        ({"constraint": "bullets", "weight": 0}, "greater than 0"),
    ],
)
def test_a_pool_that_cannot_work_is_refused(wrong: dict[str, object], says: str):
    with pytest.raises(ValidationError, match=says):
        Systems.model_validate({"pools": {"any": [wrong]}})


def test_compliance_is_paid_and_solves_nothing():
    demand = Demand(Constraint("max_words", 2), share=0.25)
    scored = [
        ScoredText(1.0, True, {"verifier": 1.0}),
        ScoredText(1.0, True),
        ScoredText(0.0, False),
        ScoredText(0.0, False),
        ScoredText(0.0, False, error="reward_timeout: 10 s"),
    ]
    texts = ["two words", "three words now", "two words", "three words now", "two words"]
    paid = with_compliance(scored, texts, demand)
    assert [each.reward for each in paid] == [1.0, 0.75, 0.25, 0.0, 0.0]
    assert [each.passed for each in paid] == [True, True, False, False, False]
    assert paid[0].parts == {"verifier": 1.0, "task": 1.0, "compliance:max_words": 1.0}
    assert paid[4] == scored[4] and with_compliance(scored, texts, None) == scored
    rates = compliance_rates([*(each.parts for each in paid), {"compliance:bullets": 0.0}])
    assert rates == {"compliance": 0.4, "compliance/bullets": 0.0, "compliance/max_words": 0.5}
    assert compliance_rates([{"task": 1.0}]) == {}


def test_evaluation_tells_trained_from_untrained_values(tiny_model: Path):
    """The engine always says three words: within the trained limit of 5, beyond the other one."""
    chat = ChatTemplate(load_tokenizer(tiny_model))
    seen: list[str] = []

    def answer(request: Request) -> list[int]:
        seen.append(chat.decode(request.prompt_ids))
        return [*chat.encode_text("4 5 6"), chat.end_of_turn]

    pool = [Instruction(constraint="max_words", values=[5], heldout=[2], weight=9), "Be brief."]
    systems = Systems(pools={"sums": pool})
    prompts = [
        Prompt.make((Message("user", f"{n}+0="),), capability=name, reward="exact", answer=str(n))
        for n in range(3)
        for name in ("sums", "other")
    ]
    section = EvaluateSection(max_new_tokens=16, systems=2)
    with RewardPool(1, 20.0) as rewards:
        found = measure_compliance(
            FakeEngine(answer), chat, prompts, rewards, section, systems, seed=3
        )
    assert set(found) == {"trained", "untrained"} and len(seen) == 12
    assert sum("5 words" in each for each in seen) == 6 == sum("2 words" in each for each in seen)
    trained, untrained = found["trained"], found["untrained"]
    assert isinstance(trained, dict) and isinstance(untrained, dict)
    assert trained["by"]["max_words"]["n"] == 6 == untrained["n"]
    assert trained["compliance"]["mean"] == 1.0 and untrained["compliance"]["mean"] == 0.0
    assert trained["solved"]["mean"] == 0.0


def test_a_prompt_with_its_own_instruction_is_held_to_no_other():
    demand = Demand(Constraint("max_words", 2), share=0.2)

    def task(*roles: str) -> GroupTask:
        messages = tuple(Message(role, "x") for role in roles)  # pyright: ignore[reportArgumentType]
        prompt = Prompt.make(messages, capability="c", reward="exact", answer="x")
        return GroupTask("g", prompt, "At most 2 words.", SamplingSection(), (1, 2), demand)

    assert task("user").applied_demand == demand
    assert task("system", "user").applied_demand is None


def test_the_compliance_reward_counts_what_is_kept():
    answer = json.dumps(
        [{"constraint": "max_words", "value": 3}, {"constraint": "with_word", "value": "llama"}]
    )
    prompt = Prompt.make(
        (Message("user", "?"),), capability="chat", reward="compliance", answer=answer
    )
    texts = ["a llama", "three words now", "no such animal is here", ""]
    scores = call_reward(find_reward("compliance"), prompt, texts)
    assert [s.reward for s in scores if isinstance(s, Score)] == [1.0, 0.5, 0.0, 0.0]
    assert [s.passed for s in scores if isinstance(s, Score)] == [True, False, False, False]


@pytest.mark.parametrize(
    "answer", ["", "[]", "{}", '{"constraint": "rhymes", "value": 1}', '{"constraint": "bullets"}',
               '{"constraint": "bullets", "value": "two"}']
)  # fmt: skip
def test_the_compliance_reward_says_what_its_answer_must_be(answer: str):
    prompt = Prompt.make(
        (Message("user", "?"),), capability="c", reward="compliance", answer=answer
    )
    with pytest.raises(DataError, match="answer must be JSON like"):
        call_reward(find_reward("compliance"), prompt, ["x"])


def test_what_the_page_on_rewards_shows_can_be_used():
    page = (Path(__file__).parents[1] / "docs" / "rewards.md").read_text()
    blocks = re.findall(r"```(yaml|json|python)\n(.*?)```", page, re.DOTALL)
    recipe = {
        k: v for kind, text in blocks if kind == "yaml" for k, v in yaml.safe_load(text).items()
    }
    assert Systems.model_validate(recipe["systems"]).is_checked
    assert SandboxSettings.model_validate(recipe["sandbox"]) == SandboxSettings()
    assert JudgeSettings.model_validate(recipe["judge"]).tensor_parallel == 4
    layouts = [
        read_tests(text.replace("…", ""))
        for kind, text in blocks
        if kind == "json" and '"reward"' not in text
    ]
    assert [type(each).__name__ for each in layouts] == ["Scripts", "Calls", "Check"]
    assert all(f"`{name}`" in page for name in RULES)
    [own] = [text for kind, text in blocks if kind == "python"]
    assert "@reward" in own and compile(own, "docs/rewards.md", "exec")
