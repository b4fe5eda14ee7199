"""Exact shares, easiest first, and the same bytes again."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import make_tiny_model
from hypothesis import given
from hypothesis import strategies as st

from curation.config import PruneSection
from curation.judge import Judgement
from curation.label_judge import labelled
from curation.prune import decide, train
from curation.pruning import (
    SCHEMA,
    Unjudged,
    decision_row,
    group_counts,
    prune,
    quotas,
    spread,
    stand_ins,
    summarise,
)
from ground.config import Data
from ground.entry import stage_entry
from ground.errors import DataError
from ground.records import Demonstration, Difficulty, Message, content_id
from ground.tables import read_demonstrations, write_records, write_rows

HALF = Fraction(1, 2)


def row(number: int, capability: str = "sums") -> Demonstration:
    messages = (Message("user", f"{number}+0="), Message("assistant", str(number)))
    return Demonstration(
        content_id(messages), messages, capability, difficulty=Difficulty("medium", judged_by="x")
    )


def scored(score: float) -> Judgement:
    return labelled({"easy": 1 - score, "medium": 0.0, "hard": score}, 0.9)


UNJUDGED = Judgement(reason="garbage")


def test_largest_remainders_by_hand():
    assert quotas({"a": 3, "b": 3, "c": 4}, HALF) == {"a": 2, "b": 1, "c": 2}
    assert quotas({"a": 10, "b": 30}, Fraction("0.95")) == {"a": 9, "b": 29}
    assert quotas({"a": 7}, Fraction(0)) == {"a": 0}


def test_the_share_is_what_is_written_not_the_float_beside_it():
    """0.29 as a float is a little more than 29/100, and 0.57 · 100 a little less than 57."""
    for fraction, num, dropped in (
        (0.57, 100, 57),
        (0.29, 100, 29),
        (0.95, 20, 19),
        (0.95, 21, 19),
    ):
        section = PruneSection(fraction=fraction)
        assert quotas({"a": num}, section.share) == {"a": dropped}


def test_presets():
    assert PruneSection(fraction="small").share == HALF
    assert PruneSection(fraction="behemoth").share == Fraction(19, 20)
    for fraction in (1.0, -0.1):
        with pytest.raises(ValueError, match="fraction must be at least 0 and below 1"):
            PruneSection(fraction=fraction)


@given(
    st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 60), min_size=1),
    st.fractions(0, 1, max_denominator=100).filter(lambda share: share < 1),
)
def test_the_total_is_exact_and_nobody_is_left_empty(counts: dict[str, int], share: Fraction):
    total = sum(counts.values())
    wanted = int(share * total)
    try:
        drops = quotas(counts, share)
    except DataError:
        assert total - wanted < len(counts), "refused only where not every group can keep a row"
        return
    assert sum(drops.values()) == wanted
    for name, count in counts.items():
        assert 0 <= drops[name] < count
    if min(counts.values()) > 1 / (1 - share):
        assert all(abs(drops[name] - share * count) < 1 for name, count in counts.items())


def test_a_set_that_would_be_emptied_is_refused():
    """#64: before a model is loaded."""
    with pytest.raises(DataError) as caught:
        quotas({"sums": 12, "words": 1}, Fraction("0.95"))
    assert "leaves 1 for 2 groups, the smallest being 'words' with 1" in caught.value.what
    assert "prune.per to all" in caught.value.fix


def test_easiest_go_first_and_unjudged_last():
    """Scores .9, .1, unjudged, .5: half goes, the .1 and the .5."""
    rows = [row(n) for n in range(4)]
    judgements = [scored(0.9), scored(0.1), UNJUDGED, scored(0.5)]
    decisions = prune(rows, judgements, HALF, "all")
    assert [d.row for d in decisions] == rows
    assert [d.kept for d in decisions] == [True, False, True, False]
    assert [d.rank for d in decisions] == [2, 0, 3, 1]
    assert decisions[1].reason == "rank 0 of 4 in all, the easiest 2 go"
    assert decisions[2].reason.startswith("unjudged: garbage; rank 3 of 4")
    three = prune(rows, judgements, Fraction(3, 4), "all")
    assert [d.kept for d in three] == [False, False, True, False]


def test_per_capability_each_gives_its_share_globally_only_the_easy_one():
    rows = [row(n, "easy" if n < 4 else "hard") for n in range(8)]
    judgements = [scored(n / 10) for n in range(8)]
    per = prune(rows, judgements, HALF, "capability")
    assert Counter(d.row.capability for d in per if d.kept) == {"easy": 2, "hard": 2}
    everywhere = prune(rows, judgements, HALF, "all")
    assert Counter(d.row.capability for d in everywhere if d.kept) == {"hard": 4}


def test_ties_follow_from_ids_not_from_the_order():
    rows = [row(n) for n in range(20)]
    forth = prune(rows, [scored(0.5)] * 20, HALF, "all")
    back = prune(rows[::-1], [scored(0.5)] * 20, HALF, "all")
    assert {d.row.id for d in forth if d.kept} == {d.row.id for d in back if d.kept}
    assert [d.kept for d in forth] != [False] * 10 + [True] * 10, "not simply the first ones"


def test_rows_carry_votes_rule_and_reason_and_read_back(tmp_path: Path):
    rows = [row(n) for n in range(4)]
    decisions = prune(rows, [scored(0.1), scored(0.6), scored(0.7), UNJUDGED], HALF, "capability")
    path = tmp_path / "all.parquet"
    write_rows(path, [decision_row(d, "label:t@1", "easiest 0.5") for d in decisions], SCHEMA)
    back = read_demonstrations(path, Data())
    assert [r.messages for r in back] == [r.messages for r in rows]
    assert back[2].difficulty == Difficulty("hard", 0.7, "label:t@1")
    assert back[3].difficulty == Difficulty(None, None, "label:t@1")
    columns = pq.read_table(path).to_pylist()
    assert columns[0]["meta_p_easy"] == 0.9 and columns[3]["meta_p_easy"] is None
    assert [c["meta_kept"] for c in columns] == [False, False, True, True]
    assert {c["meta_given_label"] for c in columns} == {"medium"}
    assert all(c["meta_rule"] == "easiest 0.5" and c["meta_reason"] for c in columns)


def test_unjudged_rows_go_in_proportion_first_or_last():
    """4 of 12 unjudged; 6 go: 2 of the 4 in proportion, all 4 with `drop`, none with `keep`."""
    rows = [row(n) for n in range(12)]
    judgements = [UNJUDGED if n % 3 == 0 else scored(n / 20) for n in range(12)]
    rules: list[tuple[Unjudged, int]] = [("proportional", 2), ("drop", 4), ("keep", 0)]
    for unjudged, gone in rules:
        decisions = prune(rows, judgements, HALF, "all", unjudged=unjudged)
        dropped = [d for d in decisions if not d.kept]
        assert len(dropped) == 6
        assert sum(not d.judgement.is_judged for d in dropped) == gone
        judged = sorted(d.judgement.score or 0 for d in decisions if d.judgement.is_judged)
        easiest = sorted(d.judgement.score or 0 for d in dropped if d.judgement.is_judged)
        assert easiest == judged[: 6 - gone], "the easiest of the judged ones"


@given(st.integers(0, 30), st.integers(0, 30))
def test_every_cut_takes_the_same_share_of_both(many: int, few: int):
    order = spread(list(range(many)), list(range(100, 100 + few)))
    assert sorted(order) == [*range(many), *range(100, 100 + few)]
    for cut in range(len(order) + 1):
        assert sum(each >= 100 for each in order[:cut]) == (cut * few // (many + few or 1))
    assert [each for each in order if each < 100] == list(range(many))


def test_misaligned_first_then_near_duplicates_then_the_easiest():
    """Scores .1 .2 .9 .8; the third is misaligned, the last a duplicate: they go before the .1."""
    rows = [row(n) for n in range(5)]
    strange = Judgement(1.0, parts={"ifd": 1.3}, is_misaligned=True)
    judgements = [scored(0.1), scored(0.2), strange, scored(0.8), scored(0.9)]
    decisions = prune(rows, judgements, Fraction(3, 5), "all", twins={3: 4})
    assert [d.rank for d in decisions] == [2, 3, 0, 1, 4]
    assert [d.kept for d in decisions] == [False, True, False, False, True]
    assert [d.mark for d in decisions] == ["", "", "misaligned", "duplicate", ""]
    assert decisions[2].reason.startswith("misaligned, goes first; rank 0 of 5")
    assert decisions[3].reason.startswith(f"a near-duplicate of {rows[4].id}, goes before")
    written = decision_row(decisions[3], "ifd:t@1", "r")
    assert (written["meta_mark"], written["meta_duplicate_of"]) == ("duplicate", rows[4].id)
    summary = summarise(decisions)
    assert summary["set_apart"] == {
        "duplicate": {"kept": 0, "dropped": 1},
        "misaligned": {"kept": 0, "dropped": 1},
    }
    assert summary["threshold"] == 0.1, "of what went for being easy"


def test_the_worked_example_of_the_docs():
    """docs/pruning.md: ten rows, half go; c is misaligned, e a near-duplicate of d, g unjudged."""
    scores = {"a": 0.1, "b": 0.9, "d": 0.8, "e": 0.7, "f": 0.2, "h": 0.4, "i": 0.6, "j": 0.3}
    rows = [replace(row(n), id=name) for n, name in enumerate("abcdefghij")]
    given = {name: scored(score) for name, score in scores.items()}
    given |= {"c": Judgement(1.0, is_misaligned=True), "g": UNJUDGED}
    judgements = [given[each.id] for each in rows]
    decisions = prune(rows, judgements, HALF, "all", twins={4: 3})
    order = sorted(decisions, key=lambda decision: decision.rank)
    assert [d.row.id for d in order] == list("ceafjhidbg")
    assert [d.row.id for d in order if not d.kept] == list("ceafj")


def test_the_share_holds_where_more_rows_are_marked_than_are_to_go():
    rows = [row(n) for n in range(4)]
    decisions = prune(
        rows, [scored(n / 4) for n in range(4)], HALF, "all", twins={1: 0, 2: 0, 3: 0}
    )
    assert sum(d.kept for d in decisions) == 2
    assert decisions[0].kept, "the one that stands for them all"


def test_of_the_marked_rows_the_hardest_stay():
    """Four marked with .9 .3 ? .6, the share takes two: the .3, and the next by score."""
    rows = [row(n) for n in range(6)]
    judgements = [scored(0.95), scored(0.9), scored(0.3), UNJUDGED, scored(0.6), scored(0.1)]
    decisions = prune(rows, judgements, Fraction(1, 3), "all", twins=dict.fromkeys(range(1, 5), 0))
    assert [d.rank for d in decisions] == [5, 2, 0, 3, 1, 4]
    assert [n for n, d in enumerate(decisions) if not d.kept] == [2, 4]


def test_a_shared_system_message_marks_nothing_and_many_marks_are_said_aloud(
    caplog: pytest.LogCaptureFixture,
):
    """A message of 60 words before 40 different tasks; then 39 of them are one and the same."""
    rules = Message(
        "system", " ".join(f"rule{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(60))
    )
    answer = Message("assistant", "yes")
    names = [f"{chr(97 + n % 26)}{chr(97 + n // 26)}" for n in range(40)]
    talks = [(rules, Message("user", f"Is {name} a word?"), answer) for name in names]
    rows = [Demonstration(content_id(talk), talk, "chat") for talk in talks]
    judgements = [scored(n / 40) for n in range(40)]
    section = PruneSection(fraction=0.5)
    decisions = decide(section, rows, judgements)
    assert [d.kept for d in decisions] == [False] * 20 + [True] * 20
    assert not any(d.mark for d in decisions) and not caplog.text
    same = [replace(each, messages=talks[0]) for each in rows[:39]]
    decide(section, [*same, rows[39]], judgements)
    assert "38 of 40 rows are marked near-duplicates, such as " in caplog.text


def test_the_hardest_stands_for_its_cluster_and_never_a_misaligned_one():
    rows = [row(n) for n in range(6)]
    judgements = [scored(0.1), scored(0.9), UNJUDGED, scored(0.5), scored(0.5), scored(0.2)]
    assert stand_ins([0, 0, 0, 3, 4, 5], rows, judgements) == {0: 1, 2: 1}
    strange = Judgement(1.0, is_misaligned=True)
    assert stand_ins([0, 0], rows, [strange, scored(0.1)]) == {0: 1}
    tie = stand_ins([0, 0], rows[3:5], [scored(0.5)] * 2)
    back = stand_ins([0, 0], rows[4:2:-1], [scored(0.5)] * 2)
    assert [rows[3:5][i].id for i in tie.values()] == [rows[4:2:-1][i].id for i in back.values()]


def test_summary_by_hand():
    rows = [row(n, "sums" if n < 2 else "words") for n in range(4)]
    decisions = prune(rows, [scored(0.2), scored(0.8), scored(0.4), UNJUDGED], HALF, "capability")
    summary = summarise(decisions)
    assert (summary["rows"], summary["kept"], summary["dropped"]) == (4, 2, 2)
    assert summary["mean_score_dropped"] == pytest.approx(0.3)
    assert summary["mean_score_kept"] == pytest.approx(0.8)
    assert summary["threshold"] == 0.4
    assert summary["labels"] == {"easy": 2, "hard": 1, "unjudged": 1}
    assert summary["set_apart"] == {"unjudged": {"kept": 1, "dropped": 0}}
    words = summary["by_capability"]["words"]  # pyright: ignore[reportIndexIssue]
    assert words["threshold"] == 0.4 and words["mean_score_kept"] is None


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("teacher") / "teacher", seed=1)


def recipe(tmp_path: Path, teacher: Path, **settings: Any) -> list[str]:
    data = tmp_path / "sft.jsonl"
    write_records(data, [row(n, "sums" if n % 3 else "words") for n in range(30)])
    judge = {
        "wording": "bare",
        "min_label_mass": 0.0,
        "min_canaries": 0,
        **settings.pop("judge", {}),
    }
    section = {"judge": judge, "engine": {"max_length": 256}, **settings}
    document = {
        "name": "t",
        "model": {"path": str(teacher)},
        "teacher": {"path": str(teacher)},
        "data": {"sft": str(data)},
        "prune": section,
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(document))
    return [str(path), "--run", str(tmp_path / "run")]


def test_the_stage_removes_exactly_half_and_writes_the_same_bytes_again(
    tmp_path: Path, teacher: Path
):
    argv = recipe(tmp_path, teacher)
    assert stage_entry("prune", PruneSection, train, argv) == 0
    stage = tmp_path / "run" / "prune"
    kept = read_demonstrations(stage / "kept.parquet", Data())
    dropped = read_demonstrations(stage / "dropped.parquet", Data())
    assert (len(kept), len(dropped)) == (15, 15)
    assert {r.id for r in kept} | {r.id for r in dropped} == {row(n).id for n in range(30)}
    assert group_counts(kept, "capability") == {"sums": 10, "words": 5}
    before = {name: (stage / name).read_bytes() for name in ("kept.parquet", "dropped.parquet")}
    assert stage_entry("prune", PruneSection, train, [*argv, "--overwrite"]) == 0
    assert before == {name: (stage / name).read_bytes() for name in before}
    summary = json.loads((stage / "summary.json").read_text())
    assert summary["rows"] == 30 and summary["judged_by"].startswith("label:teacher@")


def test_a_teacher_that_will_not_judge_stops_the_stage(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
):
    """#73: a random model asked for a label mass of one half."""
    argv = recipe(tmp_path, teacher, judge={"min_label_mass": 0.5})
    assert stage_entry("prune", PruneSection, train, argv) == 3
    said = capsys.readouterr().err
    assert "at most 20% of the rows may stay unjudged, got 30 of 30" in said
    assert "fix: use a teacher that answers easy, medium or hard" in said


def test_a_share_that_empties_a_capability_stops_before_the_model_loads(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
):
    """#64: the teacher's folder is no model at all, and nobody notices."""
    argv = recipe(tmp_path, tmp_path, fraction=0.97)
    assert stage_entry("prune", PruneSection, train, argv) == 3
    assert "at least one row of every group must stay" in capsys.readouterr().err
