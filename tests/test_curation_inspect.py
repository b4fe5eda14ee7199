"""Frames of a run's curation, from files as the stages write them, with numbers by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation import inspect
from curation.config import CurriculumSection
from curation.curriculum import Curriculum, Observation
from curation.judge import Judgement
from curation.label_judge import labelled
from curation.mining import Mined, mined_row, mined_schema
from curation.pruning import SCHEMA, decision_row, prune, rule_of
from ground.records import Demonstration, Difficulty, Message, Prompt
from ground.tables import write_rows
from rl.groups import SCHEMA as GROUPS
from rl.rounds import Rounds


def judgement(score: float) -> Judgement:
    return labelled({"easy": 1 - score, "medium": 0.0, "hard": score}, 0.9)


def make_prune(run: Path, scores: Sequence[float], share: str, per: str = "capability") -> None:
    """Rows named r0, r1, … of capabilities `a` and `b` in turn, pruned as the stage does it."""
    rows = [
        Demonstration(
            f"r{n}", (Message("user", f"ask {n}"), Message("assistant", f"say {n}")), "ab"[n % 2]
        )
        for n in range(len(scores))
    ]
    judgements = [judgement(s) if s >= 0 else Judgement(reason="garbage") for s in scores]
    for name, kept in (("kept", True), ("dropped", False)):
        decisions = [d for d in prune(rows, judgements, Fraction(share), per) if d.kept == kept]
        written = [decision_row(d, "label:t", rule_of(share, per)) for d in decisions]
        write_rows(run / "prune" / f"{name}.parquet", written, SCHEMA)


SCORES = (0.1, 0.9, 0.3, 0.7, 0.5, 0.5, 0.7, 0.3, 0.9, 0.1)


def test_judged_rows_have_their_votes_rank_and_fate(tmp_path: Path) -> None:
    make_prune(tmp_path, SCORES, "0.5")
    frame = inspect.judged(tmp_path).set_index("id").sort_index()
    assert list(frame.columns) == list(inspect.JUDGED[1:])
    # a: 0.1 0.3 0.5 0.7 0.9 (r0 r2 r4 r6 r8), b the other way round; 5 of 10 go, 3 of them of a.
    assert frame["kept"].to_dict() == {
        **{"r0": False, "r2": False, "r4": False, "r6": True, "r8": True},
        **{"r1": True, "r3": True, "r5": True, "r7": False, "r9": False},
    }
    assert frame.loc["r2", ["question", "answer", "label", "score", "p_easy", "rank"]].tolist() == [
        *("ask 2", "say 2", "easy", 0.3, 0.7, 1)
    ]


def test_another_fraction_keeps_what_pruning_by_it_would_have_kept(tmp_path: Path) -> None:
    made, other = tmp_path / "made", tmp_path / "other"
    make_prune(made, (*SCORES, -1.0), "0.5")
    make_prune(other, (*SCORES, -1.0), "0.7")
    frame = inspect.fates(inspect.judged(made), [0.5, 0.7])
    for fraction, run in ((0.5, made), (0.7, other)):
        foreseen = frame[frame["fraction"] == fraction].set_index("id")["kept"].sort_index()
        decided = inspect.judged(run).set_index("id")["kept"].sort_index()
        assert foreseen.tolist() == decided.tolist()
    assert [len(part.query("kept")) for _, part in frame.groupby("fraction")] == [6, 4]


def test_the_easiest_of_all_are_counted_over_all(tmp_path: Path) -> None:
    make_prune(tmp_path, (0.1, 0.6, 0.2, 0.7, 0.3, 0.8), "0.5", per="all")
    frame = inspect.fates(inspect.judged(tmp_path), ["0.5", "0.8"])
    table = inspect.shares(frame).set_index(["fraction", "capability"])
    assert table["kept"].to_dict() == {(0.5, "a"): 0, (0.5, "b"): 3, (0.8, "a"): 0, (0.8, "b"): 2}
    assert table.loc[(0.8, "b"), "mean_score_kept"] == pytest.approx(0.75)
    assert table.loc[(0.8, "b"), "kept_share"] == pytest.approx(2 / 3)


def make_prompt(name: str, successes: int, trials: int) -> Prompt:
    return Prompt(name, (Message("user", name),), "a", "exact", "4", Difficulty(None, None, "m"))


def make_groups(run: Path, step: int, rows: Sequence[dict[str, object]]) -> None:
    path = run / "rl" / "groups" / f"step_{step:06d}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, GROUPS), path)


def group(number: int, prompt: str, passed: Sequence[bool], **facts: object) -> dict[str, object]:
    size = len(passed)
    return {
        "id": f"{prompt}.{number}",
        "prompt_id": prompt,
        "capability": "a",
        "messages": [{"role": "user", "content": f"ask \x1b[31m{prompt}"}],
        "answer": "4",
        "system": "",
        "draw": number,
        "opened_at": 0,
        "version": 0,
        "state": "trained",
        "reason": "",
        "passed": passed,
        "texts": [f"said {n}" for n in range(size)],
        "rewards": [float(right) for right in passed],
        "advantages": [float(right) - sum(passed) / size for right in passed] if size else [],
        "num_tokens": [3 + n for n in range(size)],
        "finish": ["stop"] * size,
        "errors": [""] * size,
        "reward_parts": [[{"name": "form", "value": 0.5}]] * size,
        **facts,
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two prompts, x and y; mined, drawn at versions 0 and 2, known at rounds 0 and 2."""
    mined = [
        mined_row(Mined(make_prompt(p, c, 8), c, 8), ks=[1], solved_at=0.9, judged_by="m")
        for p, c in (("x", 2), ("y", 8))
    ]
    write_rows(tmp_path / "mine" / "prompts.parquet", mined, mined_schema([1]))
    all_1 = {"state": "filtered", "reason": "all-1"}
    late = {"state": "re-admitted", "reason": "late"}
    make_groups(tmp_path, 1, [group(0, "x", [True, False]), group(1, "y", [True, True], **all_1)])
    make_groups(tmp_path, 2, [group(2, "y", [], **late)])
    again = {"opened_at": 2, "version": 2}
    make_groups(tmp_path, 3, [group(3, "x", [True, True, True, False], **again)])
    pool = [
        Prompt(p, (Message("user", p),), "a", "exact", "4", Difficulty(successes=c, trials=8))
        for p, c in (("x", 2), ("y", 8))
    ]
    curriculum = Curriculum(
        pool, CurriculumSection(decay=1, drift=0), seed=0, group_size=2, steps=2
    )
    rounds = Rounds(tmp_path / "rl" / "curriculum", every=2)
    rounds.keep(curriculum)
    curriculum.observe(1, [Observation("x", 1, 2)])
    curriculum.observe(2, [])
    rounds.keep(curriculum)
    return tmp_path


def test_groups_are_rows_with_their_step_and_what_came_of_them(run: Path) -> None:
    frame = inspect.groups(run)
    assert list(frame.columns) == list(inspect.GROUPS)
    shown = frame[["step", "group", "state", "reason", "successes", "trials", "pass_rate"]]
    assert shown.iloc[:2].to_numpy().tolist() == [
        [1, "x.0", "trained", "", 1, 2, 0.5],
        [1, "y.1", "filtered", "all-1", 2, 2, 1.0],
    ]
    assert pd.isna(frame["pass_rate"].iloc[2]) and frame["trials"].iloc[2] == 0
    assert frame["question"].iloc[0] == "ask x"  # the colour is gone


def test_rollouts_of_a_step_and_of_a_group(run: Path) -> None:
    frame = inspect.rollouts(run, group="x.3")
    assert frame["advantage"].tolist() == [0.25, 0.25, 0.25, -0.75]
    assert frame["part_form"].tolist() == [0.5] * 4
    assert frame["text"].tolist() == ["said 0", "said 1", "said 2", "said 3"]
    assert inspect.rollouts(run, step=1)["group"].tolist() == ["x.0", "x.0", "y.1", "y.1"]
    assert len(inspect.rollouts(run)) == 8


def test_another_reward_is_asked_with_what_the_run_asked_and_answered(run: Path) -> None:
    def brief(
        prompts: list[list[dict[str, str]]],
        completions: list[list[dict[str, str]]],
        answer: list[str],
        **columns: list[str],
    ) -> list[Any]:
        assert prompts[0][0]["content"] == f"ask \x1b[31m{columns['prompt_id'][0]}"
        assert set(answer) == {"4"}
        numbers = [float(turns[0]["content"].removeprefix("said ")) for turns in completions]
        return [1 - number / 2 if number < 3 else "none" for number in numbers]

    frame = inspect.rescored(run, brief)
    assert frame[frame["group"] == "x.3"]["own_reward"].tolist()[:3] == [1.0, 0.5, 0.0]
    assert frame["own_passed"].tolist()[:2] == [True, False]
    last = frame.iloc[-1]
    assert pd.isna(last["own_reward"]) and last["own_error"] == "must be a number, got str"
    assert len(inspect.rescored(run, brief, step=1)) == 4


def test_the_curriculum_round_by_round(run: Path) -> None:
    frame = inspect.curriculum(run).set_index("version")
    assert frame.loc[0, ["active", "retired", "deferred", "refused"]].tolist() == [1, 1, 0, 0]
    # x: Beta(3, 7), then 1 of 2 more: Beta(4, 8); y: Beta(9, 1) and is not observed.
    assert frame.loc[0, "mean"] == pytest.approx((0.3 + 0.9) / 2)
    assert frame.loc[2, "mean"] == pytest.approx((4 / 12 + 0.9) / 2)
    assert frame.loc[0, "target"] == pytest.approx(0.98 * 0.3 + 0.02 * 0.9)
    assert frame["drawn"].to_dict() == {0: 3, 2: 1}
    assert frame["trained"].to_dict() == {0: 1, 2: 1}
    assert frame["pass_rate"].to_dict() == {0: 0.75, 2: 0.75}


def test_the_history_of_a_prompt_is_mined_then_shown_then_believed(run: Path) -> None:
    frame = inspect.history(run, "x")
    assert frame[["version", "source"]].to_numpy().tolist() == [
        [0, "mined"],
        [0, "group"],
        [2, "group"],
        [2, "posterior"],
    ]
    assert frame["pass_rate"].tolist() == pytest.approx([0.25, 0.5, 0.75, 4 / 12])
    assert frame["outcome"].tolist()[1:3] == ["trained", "trained"]
    assert len(frame.query("low <= pass_rate <= high")) == 4
    # Beta(4, 8): deviation sqrt(32 / (144 * 13)).
    spread = frame["high"].iloc[3] - frame["low"].iloc[3]
    assert spread == pytest.approx(2 * (32 / (144 * 13)) ** 0.5)


def test_the_funnel_sums_to_what_was_drawn(tmp_path: Path) -> None:
    records = [
        {"draw": 0, "state": "pending", "version": 0, "capability": "a"},
        {"draw": 1, "state": "pending", "version": 0, "capability": "a"},
        {"draw": 2, "state": "pending", "version": 1, "capability": "b"},
        {"draw": 0, "state": "trained"},
        {"draw": 1, "state": "filtered", "reason": "all-0"},
        {"draw": 2, "state": "withdrawn", "reason": "end"},
    ]
    (tmp_path / "rl").mkdir()
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "rl" / "ledger.jsonl").write_text(lines + '{"draw": 0, "sta')
    frame = inspect.funnel(tmp_path)
    assert sorted(frame.to_numpy().tolist()) == [
        [0, "a", "filtered", "all-0", 1],
        [0, "a", "trained", "", 1],
        [1, "b", "withdrawn", "end", 1],
    ]


def test_a_run_that_has_left_nothing_or_rubbish_gives_empty_frames(tmp_path: Path) -> None:
    (tmp_path / "prune").mkdir()
    (tmp_path / "prune" / "kept.parquet").write_bytes(b"PAR1 and then nothing")
    for make in (inspect.judged, inspect.mined, inspect.groups, inspect.rollouts, inspect.rounds):
        assert make(tmp_path).empty
    assert list(inspect.curriculum(tmp_path).columns)[:2] == ["version", "active"]
    assert inspect.history(tmp_path, "x").empty and inspect.funnel(tmp_path).empty
    assert inspect.shares(inspect.fates(inspect.judged(tmp_path))).empty


def test_the_teachers_share_is_told_by_stage_step_and_capability(tmp_path: Path) -> None:
    for stage, lines in (
        ("sft", [{"step": 1, "loss": 2.0}]),
        ("taught", [{"step": 1, "loss": 2.0, "alpha/a": 0.7, "alpha/b": 0.5}]),
        ("rl", [{"step": 4, "distill_weight/a": 0.3, "teacher_kl/a": 0.02, "teacher_kl": 0.02}]),
    ):
        (tmp_path / stage).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / stage / "metrics.jsonl").write_text(text)
    frame = inspect.teacher(tmp_path)
    assert list(frame.columns) == list(inspect.TEACHER)
    assert frame.fillna(-1).to_numpy().tolist() == [
        ["taught", 1, "a", 0.7, -1],
        ["taught", 1, "b", 0.5, -1],
        ["rl", 4, "a", 0.3, 0.02],
    ]
    assert list(inspect.teacher(tmp_path / "none").columns) == list(inspect.TEACHER)


def test_evaluated_prompts_have_a_row_for_each_model(tmp_path: Path) -> None:
    """In the order of the trail, the arm behind its stage; one prompt could not be asked."""
    for place, successes in (("taught", 3), ("sft", 1)):
        rows = [
            {
                "id": name,
                "messages": [{"role": "user", "content": f"ask {name}"}],
                "capability": "a",
                "successes": successes if trials else 0,
                "trials": trials,
            }
            for name, trials in (("p0", 4), ("p1", 0))
        ]
        (tmp_path / place / "evaluation").mkdir(parents=True)
        path = tmp_path / place / "evaluation" / "prompts.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    frame = inspect.evaluated(tmp_path)
    assert list(frame.columns) == list(inspect.EVALUATED)
    assert frame["model"].tolist() == ["sft", "sft", "taught", "taught"]
    rates = frame.pivot(index="prompt_id", columns="model", values="pass_rate")
    assert rates.loc["p0"].to_dict() == {"sft": 0.25, "taught": 0.75}
    assert rates.loc["p1"].isna().all()
    assert frame["question"].tolist()[0] == "ask p0"
