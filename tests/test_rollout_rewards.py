"""What rewards mean, what they may return, and whole GSM8K against its recorded verdicts."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ground.answers import final_answer
from ground.errors import DataError, RecipeError
from ground.records import Message, Prompt
from rollout.math_reward import as_number, equal_answers
from rollout.rewards import (
    Refusal,
    RewardError,
    Score,
    as_score,
    call_reward,
    find_reward,
    load_rewards,
    reward,
)

GSM8K = Path(__file__).parents[2] / "shared" / "data" / "gsm8k"
needs_gsm8k = pytest.mark.skipif(not GSM8K.is_dir(), reason="the GSM8K copy is not here")


def prompt(name: str, answer: str) -> Prompt:
    return Prompt.make((Message("user", "?"),), capability="a", reward=name, answer=answer)


def scores(name: str, answer: str, *texts: str) -> list[float]:
    results = call_reward(find_reward(name), prompt(name, answer), texts)
    return [result.reward for result in results if isinstance(result, Score)]


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("4;+5=9=>9", "9"),
        ("=>8 no =>9", "9"),
        ("4+5\n#### 9", "9"),
        (r"so $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}"),
        (r"=>1, rather \boxed{2}", "2"),
        (r"\boxed{2} rather =>1", "1"),
        ("so\nA: 18", "18"),
        ("**Answer: 4**", "4"),
        ("So the answer is 4.", "4."),
        ("=>", ""),
        ("4;+5=9", None),
        (r"\boxed{4", None),
        ("", None),
    ],
)
def test_final_answer(text: str, answer: str | None):
    assert final_answer(text) == answer


def test_exact():
    texts = ["4;+5=9=>9", "the answer is 9.", "=>09", "9", "=> 9 ", "=>"]
    assert scores("exact", "9", *texts) == [1, 1, 0, 0, 1, 0]
    assert scores("exact", "None.", "=>", "no marker", "") == [0, 0, 0]


@pytest.mark.parametrize("empty", ["", " ", ".", " .\n"])
def test_exact_refuses_a_reference_that_says_nothing(empty: str):
    asked = prompt("exact", empty)
    with pytest.raises(DataError, match="must say something") as caught:
        call_reward(find_reward("exact"), asked, ["garbage"])
    assert f"prompt {asked.id}" in caught.value.where


def test_format():
    assert scores("format", "", "4+5=>9", "4+5", "=>", "=>9\nmore") == [1, 0, 0, 0]
    assert scores("format", "[0-9]+", "9", "=>9") == [1, 0]


def test_reasoning_gym_pays_for_the_answer_only():
    answer = json.dumps({"family": "chain_sum", "answer": "9", "metadata": {}})
    assert scores("reasoning_gym", answer, "4;+5=>9", "=>8", "9", "=>1 9 19") == [1, 0, 0, 0]
    listing = call_reward(find_reward("reasoning_gym"), prompt("reasoning_gym", answer), ["=>1 9"])
    assert isinstance(listing[0], Score)
    assert 0 < listing[0].parts["verifier"] < 1, "the verifier's partial credit is shown, not paid"


@pytest.mark.parametrize("answer", ["9", "{}", '{"family": "no_such", "answer": "9"}', "[1]"])
def test_reasoning_gym_says_what_its_answer_must_be(answer: str):
    with pytest.raises(DataError, match="answer must be JSON like"):
        scores("reasoning_gym", answer, "=>9")


@pytest.mark.parametrize(
    ("given", "reference", "equal"),
    [
        ("18", "16 - 3 = 13 …\n#### 18", True),
        ("$1,000.00", "1000", True),
        ("1/3", r"\frac{1}{3}", True),
        ("0.5", r"\frac{1}{2}", True),
        (r"\frac{2}{4}", "1/2", True),
        ("1+x^2", "x^2+1", True),
        (r"2\sqrt{2}", r"\sqrt{8}", True),
        ("5 miles per hour", "5", True),
        ("$x=5$", "5", True),
        (r"\(7\)", "7", True),
        ("0.333", "1/3", False),
        ("5x", "5", False),
        ("5 10", "510", False),
        ("1.8 billion", "1.8", False),
        ("", "3", False),
        ("9" * 600, "9" * 600, False),
        ("__import__('os').system('true')", "0", False),
    ],
)
def test_math_equality(given: str, reference: str, equal: bool):
    assert equal_answers(given, reference) is equal


def test_math_refuses_a_reference_that_is_no_mathematics():
    with pytest.raises(DataError, match="must be a number or LaTeX"):
        equal_answers("3", "")


def test_numbers_are_exact():
    assert as_number("$1,234.50") == as_number("2469/2")
    assert as_number("0.1") != as_number("0.1000000000000000055511151231257827")
    assert as_number("12,34") is None
    assert as_number("1/0") is None


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, Score(1.0, True)),
        (0.999, Score(0.999, False)),
        (True, Score(1.0, True)),
        (np.float32(0.5), Score(0.5, False)),
        (np.int64(1), Score(1.0, True)),
        (np.array(1.0), Score(1.0, True)),
        (torch.tensor(0.25, requires_grad=True) * 2, Score(0.5, False)),
        (Score(0.5, True, {"a": True}), Score(0.5, True, {"a": 1.0})),
    ],
)
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")
def test_what_converts_to_a_number_is_one(value: object, expected: Score):
    result = as_score(value)
    assert result == expected
    assert isinstance(result, Score) and type(result.reward) is float


@pytest.mark.parametrize(
    "value",
    [
        math.nan, math.inf, -math.inf, None, "1", b"1", 1e7, 10**400, 1j, object,
        np.array([1.0, 2.0]), torch.tensor([1.0, 2.0]), torch.tensor(math.nan),
        Score(math.nan, True), Score(1.0, True, {"a": math.inf}),
        Score(1.0, True, {str(n): 1.0 for n in range(33)}),
    ],
    ids=repr,
)  # fmt: skip
def test_what_is_no_finite_number_is_refused_with_a_reason(value: object):
    result = as_score(value)
    assert isinstance(result, Refusal) and result.reason.strip()


@pytest.mark.parametrize("verdict", ["no", math.nan, 1, None], ids=repr)
def test_a_verdict_is_a_bool_or_no_verdict(verdict: object):
    """Python takes "no" and NaN for true: such an answer would count as solved."""
    result = as_score(Score(1.0, verdict))  # pyright: ignore[reportArgumentType]
    assert isinstance(result, Refusal) and "passed must be True or False" in result.reason


@given(
    st.one_of(st.floats(), st.integers(), st.booleans(), st.none(), st.text(), st.complex_numbers())
)
def test_only_finite_bounded_floats_come_through(value: object):
    result = as_score(value)
    if isinstance(result, Score):
        assert type(result.reward) is float and abs(result.reward) <= 1e6


@pytest.mark.parametrize(
    ("returned", "got"),
    [
        ([1.0], "1 values"),
        ([1.0] * 3, "3 values"),
        ([], "0 values"),
        (1.0, "float"),
        (None, "NoneType"),
        ("10", "str"),
        ({0: 1.0, 1: 1.0}, "dict"),
        (torch.tensor(1.0), "Tensor"),
    ],
)
def test_wrong_length_names_function_got_and_want(returned: object, got: str):
    def two_of_something(**columns: object) -> object:
        return returned

    with pytest.raises(RewardError) as caught:
        call_reward(two_of_something, prompt("x", ""), ["a", "b"])  # pyright: ignore[reportArgumentType]
    assert "a list of 2 numbers for 2 completions" in caught.value.what
    assert caught.value.what.endswith(f"got {got}")
    assert "two_of_something" in caught.value.where


def test_arrays_of_the_right_length_are_lists():
    for returned in (np.array([1.0, 0.0]), torch.tensor([1.0, 0.0]), (1.0, 0.0)):
        results = call_reward(lambda r=returned, **columns: r, prompt("x", ""), ["a", "b"])
        assert results == [Score(1.0, True), Score(0.0, False)]


def test_a_function_may_spoil_its_inputs():
    def spoiler(prompts: list, completions: list, **columns: list) -> list[float]:
        prompts[0][0]["content"] = completions[0][0]["content"] = "spoilt"
        answers = columns["answer"]
        answers.clear()
        second = completions[1][0]["content"]
        prompts.clear()
        completions.clear()
        return [0.0, float(second == "b")]

    asked, texts = prompt("x", "right"), ["a", "b"]
    assert call_reward(spoiler, asked, texts) == [Score(0.0, False), Score(1.0, True)]
    assert (asked.messages[0].content, asked.answer, texts) == ("?", "right", ["a", "b"])


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(DataError) as caught:
        find_reward("reasoning_gim")
    assert "did you mean 'reasoning_gym'?" in caught.value.fix


def test_a_built_in_name_cannot_be_taken():
    with pytest.raises(RewardError, match="'math' is registered already"):
        reward("math")(lambda **columns: [])


@pytest.mark.parametrize(
    ("source", "line", "what"),
    [
        ("import rollout\n\n1 / 0\n", 3, "ZeroDivisionError"),
        ("x = 1\ndef f(:\n", 2, "SyntaxError"),
        ("import sys\nsys.exit(0)\n", 2, "SystemExit"),
        ("from rollout.rewards import reward\n@reward('exact')\ndef f(): ...\n", 2, "exact"),
    ],
)
def test_a_reward_file_that_fails_names_its_line(tmp_path: Path, source: str, line: int, what: str):
    path = tmp_path / "mine.py"
    path.write_text(source)
    with pytest.raises(RecipeError) as caught:
        load_rewards(path)
    assert caught.value.where == f"{path}:{line}" and what in caught.value.what


def test_a_missing_reward_file_is_named(tmp_path: Path):
    with pytest.raises(RecipeError, match="does not exist"):
        load_rewards(tmp_path / "none.py")


def test_verifiers_need_no_torch():
    code = (
        "import sys\nfrom rollout.rewards import find_reward\n"
        "[find_reward(n) for n in ('exact', 'format', 'math', 'reasoning_gym')]\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


@needs_gsm8k
@pytest.mark.parametrize("split", ["train", "test"])
def test_every_gsm8k_reference_scores_one(split: str):
    lines = (GSM8K / f"{split}.jsonl").read_text().splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    assert len(answers) == {"train": 7473, "test": 1319}[split]
    assert [a for a in answers if scores("math", a, a) != [1.0]] == []


@needs_gsm8k
def test_a_wrong_number_never_scores_on_gsm8k():
    for line in (GSM8K / "test.jsonl").read_text().splitlines():
        answer = json.loads(line)["answer"]
        wrong = f"#### {answer.rpartition('#### ')[2]}7"
        assert scores("math", answer, wrong) == [0.0]


@needs_gsm8k
def test_math_agrees_with_recorded_verdicts():
    lines = (GSM8K / "example_model_solutions.jsonl").read_text().splitlines()
    agreed = total = 0
    for row in map(json.loads, lines):
        models = [row[key] for key in row if key not in ("question", "ground_truth")]
        verdicts = scores("math", row["ground_truth"], *(m["solution"] for m in models))
        agreed += sum(v == m["is_correct"] for v, m in zip(verdicts, models, strict=True))
        total += len(models)
    assert total == 5276
    assert agreed >= 0.99 * total
