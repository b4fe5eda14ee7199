"""Judges of the kinds ifd and solve_rate, the canaries of all, and the stage around them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import make_tiny_model

from curation.canaries import Pair, canaries, mixed, rows_of, verdict
from curation.config import (
    IfdJudgeSection,
    JudgeSection,
    LabelJudgeSection,
    PruneSection,
    SolveRateJudgeSection,
)
from curation.ifd_judge import IfdJudge, judged
from curation.judge import Judgement, too_long
from curation.prune import train
from curation.solve_rate_judge import SolveRateJudge, checkable, solved
from ground.chat import ChatTemplate
from ground.entry import stage_entry
from ground.errors import DataError, InfraError
from ground.model import load_model
from ground.records import Demonstration, Message, Prompt, Rollout
from ground.tables import write_records
from rollout.config import EngineSection
from rollout.engines import open_engine
from rollout.evaluation import Measured

IFD = IfdJudgeSection(kind="ifd")
BARE = {"wording": "bare", "min_label_mass": 0.0}
"""The tiny tokenizer has a token per byte: with marks a task would not fit."""


def row(number: int, answer: str = "", capability: str = "sums") -> Demonstration:
    messages = (Message("user", f"{number}+0="), Message("assistant", answer or str(number)))
    return Demonstration(f"row{number}", messages, capability, "math", str(number))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("judge") / "judge", seed=3)


def test_the_ratio_of_two_losses():
    """.6 / 1.5 = .4; 1.8 / 1.5 = 1.2 is misaligned; equal losses are at the border and so is 1."""
    aligned = judged(0.6, 1.5)
    assert aligned.score == pytest.approx(0.4) and not aligned.is_misaligned
    strange = judged(1.8, 1.5)
    assert (strange.score, strange.is_misaligned) == (1.0, True)
    assert strange.parts == pytest.approx({"loss": 1.8, "loss_alone": 1.5, "ifd": 1.2})
    assert judged(1.5, 1.5).is_misaligned


@pytest.mark.parametrize(
    ("losses", "why"),
    [((0.1, 0.0), "certain without"), ((float("nan"), 1.0), "finite"), ((1.0, 1e400), "finite")],
)
def test_losses_without_a_ratio_are_no_judgement(losses: tuple[float, float], why: str):
    answer = judged(*losses)
    assert not answer.is_judged and why in answer.reason and not answer.is_misaligned


def test_ifd_is_that_of_the_models_own_losses(model: Path):
    """Over the last answer and its end of turn; a row that is too long leaves the others be."""
    engine, chat = open_engine(model, EngineSection(num_slots=8, max_length=128))
    earlier = (Message("user", "1+1="), Message("assistant", "two"))
    talk = replace(row(7), messages=(*earlier, *row(7, "seven").messages))
    long = replace(row(8), messages=(Message("user", "8" * 500), Message("assistant", "8")))
    found = IfdJudge(engine, chat, max_length=128).judge([row(3), long, talk])
    engine.close()
    assert [each.is_judged for each in found] == [True, False, True]
    assert found[1].reason == "longer than the judge's 128 tokens"
    network = load_model(model)
    for own, judgement in ((row(3), found[0]), (talk, found[2])):
        losses = [
            answer_loss(network, chat, messages)
            for messages in (own.messages, (Message("user", ""), own.messages[-1]))
        ]
        assert judgement.parts["loss"] == pytest.approx(losses[0], abs=1e-4)
        assert judgement.parts["ifd"] == pytest.approx(losses[0] / losses[1], abs=1e-4)


def answer_loss(network: Any, chat: ChatTemplate, messages: Sequence[Message]) -> float:
    """Cross-entropy of what comes behind the prompt, up to the token that ends the turn."""
    import torch

    ids, _ = chat.encode_demonstration(messages)
    start = len(chat.encode_prompt(messages[:-1]))
    end = ids.index(chat.end_of_turn, start) + 1
    with torch.no_grad():
        logits = network(input_ids=torch.tensor([ids])).logits[0, start - 1 : end - 1].double()
    return float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:end])))


def test_solve_rate_is_the_share_that_failed():
    """3 of 8 pass: 0.625."""
    prompt = checkable(row(1))
    assert prompt is not None
    assert prompt == Prompt("row1", row(1).question, "sums", "math", "1")
    tries = tuple(Rollout(n, (), "", "stop", passed=n < 3) for n in range(8))
    judgement = solved(Measured(prompt, tries))
    assert judgement.score == 0.625 and judgement.parts == {"successes": 3, "trials": 8}
    assert solved(Measured(prompt, (), "too long")).reason == "too long"


def test_rows_that_nothing_can_check_are_not_asked():
    asked: list[str] = []

    def nobody_passes(prompts: Sequence[Prompt]) -> list[Measured]:
        asked.extend(prompt.id for prompt in prompts)
        return [Measured(each, (Rollout(0, (), "", "stop"),)) for each in prompts]

    rows = [replace(row(1), reward=""), row(2), replace(row(3), answer=""), row(4)]
    rows.append(replace(row(5), reward="judge"))
    found = SolveRateJudge(nobody_passes).judge(rows)
    assert asked == ["row2", "row4"]
    assert [each.score for each in found] == [None, 1.0, None, 1.0, None]
    assert found[0].reason == "it has no checkable answer"
    assert found[4].reason == "its reward is a judge"


def test_canaries_stand_in_the_right_order_or_fail():
    """Of 4 pairs: right, too close, the wrong way round, one side unjudged."""
    easy, hard = row(1), row(2)
    pair = Pair((easy,), hard, 0.1)
    outcomes = [
        (Judgement(0.2), Judgement(0.4)),
        (Judgement(0.35), Judgement(0.4)),
        (Judgement(0.4), Judgement(0.2)),
        (Judgement(0.1), Judgement(reason="garbage")),
    ]
    seen = [verdict([pair], {"row1": a, "row2": b}) for a, b in outcomes]
    assert [each.share for each in seen] == [1.0, 0.0, 0.0, 0.0]
    assert seen[3].failures == ("'1+0=' has 0.10, '2+0=' no judgement (garbage)",)
    with pytest.raises(DataError, match="must get 80% of its canaries right, got 0 of 1") as caught:
        seen[2].require(0.8)
    assert "'1+0=' has 0.40, '2+0=' 0.20" in caught.value.why


def test_canaries_that_do_not_fit_say_nothing_of_the_judge():
    """Of 3 pairs one is too long: 2 of 2 right, not 2 of 3. None that fits is no test at all."""
    long = too_long(512)
    pairs = [Pair((row(n),), row(n + 10), 0.0) for n in range(3)]
    said = {f"row{n}": Judgement(0.1) for n in range(3)}
    said |= {f"row{n + 10}": Judgement(0.9) for n in range(2)} | {"row12": long}
    seen = verdict(pairs, {name: Judgement.of_json(each.as_json()) for name, each in said.items()})
    assert (seen.pairs, seen.share, seen.num_too_long) == (2, 1.0, 1)
    seen.require(1.0)
    none = verdict(pairs, dict.fromkeys(said, long))
    with pytest.raises(DataError, match="3 pairs of 3 are too long"):
        none.require(0.7)
    none.require(0.0)


def test_the_easier_wording_counts_and_so_does_an_ifd_above_one():
    pair = Pair((row(1), row(2)), row(3), 0.0)
    words = {"row1": Judgement(1.0), "row2": Judgement(0.25), "row3": Judgement(0.5)}
    assert verdict([pair], words).share == 1.0
    both_cut_off = {"row1": judged(1.1, 1), "row2": judged(1.2, 1), "row3": judged(1.3, 1)}
    assert verdict([pair], both_cut_off).share == 1.0


def test_ifd_canaries_put_an_answer_behind_another_question():
    rows = [row(n, capability="sums" if n % 2 else "words") for n in range(40)]
    pairs = canaries(IFD, rows)
    assert len(pairs) == 32 and pairs == canaries(IFD, rows[::-1])
    for pair in pairs:
        (true,) = pair.lesser
        assert true.messages[-1] == pair.greater.messages[-1]
        assert true.question != pair.greater.question
        own = int(true.question[0].content.removesuffix("+0="))
        strange = int(pair.greater.question[0].content.removesuffix("+0="))
        assert (own - strange) % 2 == 0, "of the same capability"
    assert canaries(IFD, rows[:1]) == [], "nothing to swap with"


@pytest.mark.parametrize(
    "section",
    [
        LabelJudgeSection(),
        LabelJudgeSection(wording="bare"),
        SolveRateJudgeSection(kind="solve_rate"),
    ],
    ids=repr,
)
def test_built_in_canaries_are_pairs_of_each_with_each(section: JudgeSection):
    pairs = canaries(section, [])
    lesser, greater = {p.lesser for p in pairs}, {p.greater.id for p in pairs}
    assert len(pairs) == len(lesser) * len(greater) >= 16
    assert len(rows_of(pairs)) == len({row.id for row in rows_of(pairs)})


def test_canaries_are_mixed_among_the_rows():
    assert [r.id for r in mixed([row(n) for n in range(1, 5)], [row(8), row(9)])] == [
        "row8", "row1", "row2", "row9", "row3", "row4",
    ]  # fmt: skip
    assert mixed([row(1)], []) == [row(1)]


def recipe(tmp_path: Path, teacher: Path, **section: Any) -> list[str]:
    rows = [row(n, capability="sums" if n % 3 else "words") for n in range(30)]
    write_records(tmp_path / "sft.jsonl", rows)
    document = {
        "name": "t",
        "model": {"path": str(teacher)},
        "teacher": {"path": str(teacher)},
        "data": {"sft": str(tmp_path / "sft.jsonl")},
        "prune": {"engine": {"max_length": 256, "num_slots": 64}, **section},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(document))
    return [str(path), "--run", str(tmp_path / "run")]


def run(argv: list[str]) -> int:
    return stage_entry("prune", PruneSection, train, argv)


def written(tmp_path: Path) -> dict[str, list[dict[str, Any]]]:
    stage = tmp_path / "run" / "prune"
    return {n: pq.read_table(stage / f"{n}.parquet").to_pylist() for n in ("kept", "dropped")}


@pytest.mark.parametrize("kind", ["label", "ifd", "solve_rate"])
def test_a_judge_that_knows_nothing_is_found_out(
    tmp_path: Path, model: Path, kind: str, capsys: pytest.CaptureFixture[str]
):
    """Random weights: labels of all kinds, answers no better behind their own question, no sums."""
    judge = {"kind": kind, "max_unjudged": 1.0, "min_canaries": 0.8}
    settings: dict[str, Any] = {"label": BARE, "solve_rate": {"max_new_tokens": 4}}
    assert run(recipe(tmp_path, model, judge=judge | settings.get(kind, {}))) == 3
    said = capsys.readouterr().err
    assert "a judge must get 80% of its canaries right, got " in said
    assert "in these the second should be the harder: " in said
    assert not (tmp_path / "run" / "prune" / "kept.parquet").exists()


def test_canaries_never_reach_the_data_and_other_judges_are_compared(tmp_path: Path, model: Path):
    loose = {"min_canaries": 0, "max_unjudged": 1.0}
    others = [
        {"kind": "label", **BARE},
        {"kind": "solve_rate", "samples": 2, "max_new_tokens": 4},
    ]
    judge = {"kind": "ifd", **loose}
    assert (
        run(recipe(tmp_path, model, judge=judge, calibration={"rows": 12, "judges": others})) == 0
    )
    files = written(tmp_path)
    assert {r["id"] for part in files.values() for r in part} == {f"row{n}" for n in range(30)}
    assert all(r["meta_ifd"] > 0 and r["meta_label_mass"] is None for r in files["kept"])
    stage = tmp_path / "run" / "prune"
    summary = json.loads((stage / "summary.json").read_text())
    assert summary["judged_by"].startswith("ifd:judge@") and summary["canaries"]["pairs"] == 30
    rows = pq.read_table(stage / "calibration.parquet").to_pylist()
    assert Counter(r["kind"] for r in rows) == {"ifd": 12, "label": 12, "solve_rate": 12}
    own = {r["id"]: r["difficulty"]["score"] for part in files.values() for r in part}
    assert all(r["score"] == own[r["id"]] for r in rows if r["kind"] == "ifd")
    overall = [each for each in summary["calibration"] if each["capability"] == "all"]
    assert [(each["one"], each["other"], each["rows"]) for each in overall][:2] == [
        ("ifd", "label", 12),
        ("ifd", "solve_rate", 12),
    ]


def test_a_broken_off_judge_goes_on_behind_its_last_shard(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    """Three shards of 10; broken in the third; the resumed run judges that one alone."""
    judge = {"kind": "ifd", "min_canaries": 0}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    assert run(recipe(whole, model, judge=judge, shard_size=10)) == 0
    sizes: list[int] = []
    real = IfdJudge.judge

    def breaking(self: IfdJudge, rows: Sequence[Demonstration]) -> list[Judgement]:
        sizes.append(sum(not each.id.startswith("canary/") for each in rows))
        if len(sizes) == 3:
            raise InfraError("the power fails")
        return real(self, rows)

    argv = recipe(broken, model, judge=judge, shard_size=10)
    monkeypatch.setattr(IfdJudge, "judge", breaking)
    assert run(argv) == 6
    assert run([*argv, "--resume"]) == 0
    assert sizes == [10, 10, 10, 10]
    for name in ("kept.parquet", "dropped.parquet", "summary.json"):
        first, second = (p / "run" / "prune" / name for p in (whole, broken))
        assert first.read_bytes() == second.read_bytes()
    assert not (broken / "run" / "prune" / "shards").exists()
    metrics = (broken / "run" / "prune" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in metrics][-1] == 30
    assert "rows_per_second" in json.loads(metrics[-1])
    progress = json.loads((broken / "run" / "prune" / "progress.json").read_text())
    assert (progress["step"], progress["total"]) == (30, 30)


def test_who_goes_on_regardless_keeps_what_was_judged(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
):
    """Stopped by the canaries of the first of two shards; it is not judged again."""
    sizes: list[int] = []
    real = IfdJudge.judge

    def counting(self: IfdJudge, rows: Sequence[Demonstration]) -> list[Judgement]:
        sizes.append(sum(not each.id.startswith("canary/") for each in rows))
        return real(self, rows)

    monkeypatch.setattr(IfdJudge, "judge", counting)
    argv = recipe(tmp_path, model, judge={"kind": "ifd", "min_canaries": 1.0}, shard_size=20)
    assert run(argv) == 3
    assert run([*argv, "prune.judge.min_canaries=0", "--resume"]) == 0
    assert sizes == [20, 10]


def test_a_solve_rate_judge_on_rows_without_answers_stops(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]
):
    argv = recipe(tmp_path, model, judge={"kind": "solve_rate", "min_canaries": 0, "samples": 1})
    write_records(tmp_path / "sft.jsonl", [replace(row(n), reward="") for n in range(12)])
    assert run(argv) == 3
    said = capsys.readouterr().err
    assert "at most 20% of the rows may stay unjudged, got 12 of 12" in said
    assert "it has no checkable answer" in said and "use another prune.judge.kind" in said


def test_kinds_bring_their_own_keys(tmp_path: Path):
    assert PruneSection.model_validate({"judge": {"min_label_mass": 0.5}}).judge.kind == "label"
    for judge in ({"kind": "ifd", "samples": 3}, {"kind": "votes"}):
        with pytest.raises(ValueError, match=r"samples|votes"):
            PruneSection.model_validate({"judge": judge})
    with pytest.raises(ValueError, match="max_new_tokens must be below engine"):
        PruneSection.model_validate({"judge": {"kind": "solve_rate", "max_new_tokens": 600}})
    with pytest.raises(ValueError, match="of other kinds than judge and differ"):
        PruneSection.model_validate({"judge": {"kind": "ifd"}, "calibration": {}})
    for ignored in ({"max_unjudged": 0.5}, {"min_canaries": 0}):
        with pytest.raises(ValueError, match=f"must not set {next(iter(ignored))}: "):
            calibration = {"judges": [{"kind": "ifd", **ignored}]}
            PruneSection.model_validate({"calibration": calibration})
