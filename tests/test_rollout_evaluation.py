"""Measuring a model: what is sampled, what is counted, and how sure the figures are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from ground.chat import ChatTemplate
from ground.entry import stage_entry
from ground.errors import DataError, InfraError
from ground.model import load_tokenizer
from ground.records import Difficulty, Label, Message, Prompt, Rollout, Segment
from ground.tables import write_jsonl, write_records
from rollout import stall as rollout_stall
from rollout.config import EngineSection, EvaluateSection, SamplingSection
from rollout.engine import Completion, Request
from rollout.engines import open_engine
from rollout.evaluate import evaluate
from rollout.evaluation import (
    PROMPT_SCHEMA,
    Measured,
    choose_prompts,
    greedy_accuracy,
    measure,
    prompt_rows,
    summarise,
)
from rollout.fake_engine import FakeEngine
from rollout.heldout import shared_ids
from rollout.passk import wilson
from rollout.reward_pool import RewardPool
from rollout.seeds import sample_seed
from rollout.stall import StallClock

SAMPLING = SamplingSection(temperature=1.0, max_new_tokens=16)


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with RewardPool(2, 10.0) as pool:
        yield pool


@pytest.fixture(scope="module")
def chat(tiny_model: Path) -> ChatTemplate:
    return ChatTemplate(load_tokenizer(tiny_model))


def prompt(number: int, capability: str = "sums", label: Label | None = None) -> Prompt:
    return Prompt.make(
        (Message("user", f"{number}+0="),),
        capability=capability,
        reward="exact",
        answer=str(number),
        difficulty=Difficulty(label) if label else None,
    )


def rollout(passed: bool, *logprobs: float, **fields: object) -> Rollout:
    segment = Segment("policy", (7,) * len(logprobs), logprobs)
    return Rollout(0, (segment,), "text", "stop", float(passed), {}, passed, **fields)  # pyright: ignore[reportArgumentType]


def test_every_sample_has_its_seed_and_every_text_its_verdict(chat: ChatTemplate, pool: RewardPool):
    """Right for prompt 3 alone: the engine always says 3."""
    seen: dict[str, Request] = {}

    def answer(request: Request) -> list[int]:
        seen[request.id] = request
        return [*chat.encode_text("=>3"), chat.end_of_turn]

    prompts = [prompt(2), prompt(3)]
    engine = FakeEngine(answer)
    measured = measure(engine, chat, prompts, pool, SAMPLING, samples=3, seed=11)
    engine.close()
    assert [each.prompt for each in measured] == prompts
    assert [(each.successes, each.trials) for each in measured] == [(0, 3), (3, 3)]
    assert measured[1].rollouts[0].text == "=>3"
    assert measured[1].rollouts[0].finish == "stop"
    wanted = {sample_seed(11, p.id, "evaluate", n) for p in prompts for n in range(3)}
    assert {request.seed for request in seen.values()} == wanted and len(wanted) == 6
    assert all(request.stop_ids == chat.stop_ids for request in seen.values())


def test_a_prompt_longer_than_the_context_is_skipped_and_counted(
    chat: ChatTemplate, pool: RewardPool
):
    """#65: ten times the context; its neighbours are measured all the same."""
    engine = FakeEngine(lambda request: chat.encode_text("=>3"), max_length=60)
    long = Prompt.make((Message("user", "3" * 600),), capability="sums", reward="exact", answer="3")
    measured = measure(engine, chat, [long, prompt(3)], pool, SAMPLING, samples=2, seed=0)
    assert "must fit max_length 60" in measured[0].skipped and measured[0].trials == 0
    summary = summarise(measured, [1, 2], 0)
    assert (summary["num_prompts"], summary["num_skipped"]) == (1, 1)
    assert summary["skipped"] == {measured[0].skipped: 1}
    assert summary["pass@1"] == {"mean": 1.0, "low": pytest.approx(0.2065, abs=1e-3), "high": 1.0}
    with pytest.raises(DataError, match="nothing could be measured") as caught:
        summarise(measured[:1], [1], 0)
    assert caught.value.why == measured[0].skipped
    engine.close()


def test_summary_by_hand():
    """Two prompts: 1 of 2 and 0 of 2 solved; pass@1 (0.5 + 0) / 2, pass@2 (1 + 0) / 2."""
    measured = [
        Measured(prompt(1, "sums", "easy"), (rollout(True, -1.0, -3.0), rollout(False, -2.0))),
        Measured(
            prompt(2, "words", "hard"),
            (rollout(False, -2.0, error="reward_timeout: x"), rollout(False, -2.0)),
        ),
    ]
    summary = summarise(measured, [1, 2, 4], seed=0)
    assert summary["samples"] == 2
    assert summary["pass@1"]["mean"] == 0.25  # pyright: ignore[reportIndexIssue]
    assert summary["pass@2"]["mean"] == 0.5  # pyright: ignore[reportIndexIssue]
    assert "pass@4" not in summary
    assert summary["entropy"] == pytest.approx(10 / 5), "five tokens, -log p sums to ten"
    assert summary["mean_tokens"] == 5 / 4
    assert summary["mean_reward"] == 1 / 4
    assert summary["errors"] == {"reward_timeout": 1}
    capabilities = summary["by_capability"]
    assert isinstance(capabilities, dict)
    assert capabilities["sums"]["pass@1"]["mean"] == 0.5 and capabilities["sums"]["n"] == 1
    assert capabilities["words"]["pass@2"]["mean"] == 0.0
    assert list(summary["by_difficulty"]) == ["easy", "hard"]  # pyright: ignore[reportArgumentType]


def test_corner_cases_by_hand():
    """Eight answers: one cut off, one looping, one that skipped the work, five sound ones."""
    long = (-0.1,) * 20
    first = Measured(
        prompt(1, "sums"),
        (
            rollout(True, *long),
            rollout(True, *long),
            rollout(False, -0.1),
            rollout(False, *long),
        ),
    )
    cut = replace(rollout(False, *long), finish="length")
    looping = replace(rollout(False, *long), text="so so so so so so so")
    second = Measured(prompt(2, "words"), (cut, looping, *[rollout(False, *long)] * 2))
    summary = summarise([first, second], [1], seed=0)
    assert summary["corner_case_share"] == 3 / 8
    assert summary["faults"] == {"length_outlier": 1 / 8, "truncated": 1 / 8, "repetition": 1 / 8}
    assert summary["finish"] == {"stop": 7 / 8, "length": 1 / 8} and summary["cut_share"] == 1 / 8
    parts = summary["by_capability"]
    assert isinstance(parts, dict)
    assert [parts[name]["corner_case_share"] for name in ("sums", "words")] == [1 / 4, 1 / 2]
    (row,) = prompt_rows([first], examples=3)
    assert (row["faults"], row["num_faulty"]) == (["", "", "length_outlier"], 1)
    assert (row["finish"], row["num_tokens"]) == (["stop"] * 3, [20, 20, 1])


def test_greedy_accuracy_counts_prompts():
    measured = [
        Measured(prompt(n), (rollout(n > 5, -1.0),), greedy=rollout(n < 3, -1.0)) for n in range(10)
    ]
    measured.append(Measured(prompt(10), (), "too long"))
    estimate = wilson(3, 10)
    assert greedy_accuracy(measured) == {
        "mean": 0.3,
        "low": estimate.low,
        "high": estimate.high,
    }


def test_a_limit_chooses_the_same_prompts_for_the_same_seed():
    prompts = [prompt(n) for n in range(50)]
    chosen = choose_prompts(prompts, 10, seed=1)
    assert len(chosen) == 10 and chosen == choose_prompts(prompts[::-1], 10, seed=1)[::-1]
    assert chosen != choose_prompts(prompts, 10, seed=2)
    assert choose_prompts(prompts, None, 1) == choose_prompts(prompts, 99, 1) == prompts
    assert [p for p in prompts if p in chosen] == chosen


def test_rows_keep_the_examples_asked_for():
    measured = Measured(prompt(1, "sums", "easy"), tuple(rollout(n == 2, -1.0) for n in range(4)))
    (row,) = prompt_rows([measured], examples=3)
    assert set(row) == set(PROMPT_SCHEMA.names)
    assert row["passed"] == [False, False, True]
    assert (row["successes"], row["trials"], row["mean_reward"]) == (1, 4, 0.25)


def test_a_real_engine_measures_the_same_twice(tiny_model: Path, pool: RewardPool):
    """Real weights, real sampling: equal figures whether asked alone or in company."""
    section = EngineSection(num_slots=8, max_length=128)
    prompts = [prompt(n) for n in range(5)]
    results = []
    for part in (prompts, prompts[2:3]):
        engine, chat = open_engine(tiny_model, section)
        results.append(measure(engine, chat, part, pool, SAMPLING, samples=4, seed=5))
        engine.close()
    assert results[0][2] == results[1][0]
    texts = [each.text for measured in results[0] for each in measured.rollouts]
    assert len(set(texts)) > 10, "samples differ from each other"
    assert all(each.greedy is None for each in results[0])
    engine, chat = open_engine(tiny_model, section)
    with_greedy = measure(engine, chat, prompts, pool, SAMPLING, samples=4, seed=5, greedy=True)
    once = measure(
        engine, chat, prompts, pool, SAMPLING.model_copy(update={"temperature": 0.0}),
        samples=1, seed=9,
    )  # fmt: skip
    engine.close()
    assert [each.rollouts for each in with_greedy] == [each.rollouts for each in results[0]]
    assert [each.greedy for each in with_greedy] == [
        replace(each.rollouts[0], index=4) for each in once
    ]
    assert 1.0 < summarise(results[0], [1], 0)["entropy"] < 5.6  # pyright: ignore[reportOperatorIssue]


def test_the_entry_writes_what_the_report_reads(tiny_model: Path, tmp_path: Path):
    """`python -m rollout.evaluate` in this process, on a user's own model and prompts."""
    heldout = tmp_path / "heldout.jsonl"
    labels: list[Label] = ["easy", "hard"]
    write_records(heldout, [prompt(n, label=labels[n % 2]) for n in range(6)])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: t\nmodel: {{path: {tiny_model}}}\ndata: {{heldout: {heldout}}}\n"
        "evaluate:\n  samples: 4\n  k: [1, 4]\n  max_new_tokens: 8\n  greedy: true\n"
        "  examples: 2\n  max_prompts: 5\n  engine: {num_slots: 8, max_length: 64}\n"
    )
    run = tmp_path / "run"
    argv = [str(recipe), "--of", "base", "--run", str(run)]
    assert stage_entry("evaluate", EvaluateSection, evaluate, argv) == 0
    result = json.loads((run / "base/evaluation/evaluation.json").read_text())
    assert result["num_prompts"] == 5 and result["samples"] == 4
    assert set(result) >= {"pass@1", "pass@4", "greedy", "entropy", "mean_tokens", "model"}
    assert set(result["by_difficulty"]) == {"easy", "hard"}
    table = pq.read_table(run / "base/evaluation/prompts.parquet")
    assert table.num_rows == 5 and all(len(texts) == 2 for texts in table["texts"].to_pylist())
    assert (run / "base/evaluation/manifest.json").is_file()


def test_a_user_s_own_reward_is_found_by_the_evaluation(tiny_model: Path, tmp_path: Path):
    """The file that the recipe lists must reach the reward processes."""
    (tmp_path / "mine.py").write_text(
        "from rollout.rewards import reward\n\n\n@reward('generous')\n"
        "def generous(completions, **columns):\n    return [1.0] * len(completions)\n"
    )
    asked = [replace(prompt(n), reward="generous") for n in range(2)]
    write_records(tmp_path / "heldout.jsonl", asked)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"name: t\nmodel: {{path: {tiny_model}}}\ndata: {{heldout: heldout.jsonl}}\n"
        "rewards: [mine.py]\nevaluate:\n  samples: 2\n  k: [1]\n  max_new_tokens: 4\n"
        "  engine: {num_slots: 8, max_length: 64}\n"
    )
    argv = [str(recipe), "--of", "base", "--run", str(tmp_path / "run")]
    assert stage_entry("evaluate", EvaluateSection, evaluate, argv) == 0
    result = json.loads((tmp_path / "run/base/evaluation/evaluation.json").read_text())
    assert (result["mean_reward"], result["errors"]) == (1.0, {})


def test_questions_are_compared_without_system_and_white_space():
    heldout = [prompt(2), prompt(3), prompt(4)]
    questions = [
        (Message("system", "Be brief."), Message("user", " 3+0=\n")),
        (Message("user", "4 +0="),),
        (Message("user", "2+0="), Message("assistant", "2"), Message("user", "2+0=")),
    ]
    assert shared_ids(heldout, questions) == [heldout[1].id]


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
ASKED = [{"role": "user", "content": "3+0="}, {"role": "assistant", "content": "3"}]


@pytest.mark.parametrize(
    ("stage", "row"),
    [
        ("sft", {"messages": ASKED}),
        ("sft", {"messages": [*ASKED, *TURNS]}),
        ("rl", {"prompt": "3+0=", "answer": "3", "reward": "exact"}),
    ],
)
def test_held_out_prompts_that_are_trained_on_are_refused(
    tmp_path: Path, stage: str, row: dict[str, object], capsys: pytest.CaptureFixture[str]
):
    """Turned off, the stage trains on nothing: then it is the missing model that is refused."""
    heldout = [prompt(n) for n in range(6)]
    write_records(tmp_path / "heldout.jsonl", heldout)
    write_jsonl(tmp_path / "rows.jsonl", [row])
    (tmp_path / "model").mkdir()
    text = "name: t\nmodel: {path: model}\ndata: {sft: rows.jsonl, prompts: rows.jsonl, "
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{text}heldout: heldout.jsonl}}\nevaluate: {{}}\n{stage}: {{}}\n")
    argv = [str(recipe), "--of", "base", "--run", str(tmp_path / "run")]
    assert stage_entry("evaluate", EvaluateSection, evaluate, argv) == 3
    said = capsys.readouterr().err
    assert f"1 of 6 held-out prompts are trained on: {heldout[3].id}\n" in said
    assert "rows.jsonl asks the same questions" in said
    recipe.write_text(f"{text}heldout: heldout.jsonl}}\nevaluate: {{}}\n")
    assert stage_entry("evaluate", EvaluateSection, evaluate, argv) == 3
    assert "trained on" not in capsys.readouterr().err


def test_an_engine_counts_as_hung_only_when_nothing_comes_of_anybody(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """10 s without a completion are too long; one of another prompt comes after 6, then none."""
    now, told = [100.0], list[float]()

    class Waited(Future[Completion]):
        def result(self, timeout: float | None = None) -> Completion:
            assert timeout is not None
            told.append(timeout)
            if len(told) == 1:
                now[0] += 6.0
                other.set_result(Completion("other", Segment("policy", (), ()), "stop"))
                timeout -= 6.0
            now[0] += timeout
            raise FutureTimeoutError

    monkeypatch.setattr(rollout_stall.time, "monotonic", lambda: now[0])
    other, hung = Future[Completion](), Waited()
    clock = StallClock(10.0)
    clock.watch([[other, hung]])
    with pytest.raises(InfraError, match="none has for 10 s: prompt"):
        clock.wait(hung, prompt(1))
    assert told == [10.0, 6.0, 0.0] and now[0] == 116.0
    assert clock.wait(other, prompt(1)).id == "other"  # it is there, however long ago it came
