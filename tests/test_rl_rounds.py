"""What the curriculum knew, kept by version, and the same again after a restart."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from curation.config import CurriculumSection
from curation.curriculum import Curriculum, Observation
from ground.records import Difficulty, Message, Prompt
from rl.actors import restore_books
from rl.books import Books
from rl.config import RlSection
from rl.journal import Journal
from rl.rounds import Rounds


def make_prompt(name: str, successes: int, trials: int) -> Prompt:
    return Prompt.make(
        (Message("user", name),),
        capability="sums",
        reward="exact",
        answer="4",
        difficulty=Difficulty(successes=successes, trials=trials),
    )


POOL = [make_prompt(f"half {n}", 4, 8) for n in range(3)] + [make_prompt("solved", 8, 8)]


def make_curriculum() -> Curriculum:
    return Curriculum(POOL, CurriculumSection(decay=0.5, drift=0), seed=0, group_size=8, steps=4)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_round_says_what_is_known_of_those_that_were_seen_and_of_those_that_were_not(
    tmp_path: Path,
) -> None:
    curriculum = make_curriculum()
    curriculum.observe(1, [Observation(POOL[0].id, successes=0, trials=8)], [POOL[1].id])
    Rounds(tmp_path, every=1).keep(curriculum)
    rows = pq.read_table(tmp_path / "round_000001.parquet").to_pylist()
    seen = [
        (row["prompt_id"], row["prompts"], row["successes"], row["trials"], row["status"])
        for row in rows
    ]
    # Half of what was mined is left: 2 of 4, and 4 of 4; the observed one gets 0 of 8 on top.
    assert sorted(seen, key=str) == sorted(
        [
            (None, 1, 2.0, 4.0, "active"),
            (None, 1, 4.0, 4.0, "retired"),
            (POOL[0].id, 1, 2.0, 12.0, "active"),
            (POOL[1].id, 1, 2.0, 4.0, "refused"),
        ],
        key=str,
    )
    # Beta(3, 11): mean 3/14, variance 33 / (196 * 15).
    own = next(row for row in rows if row["prompt_id"] == POOL[0].id)
    assert own["mean"] == pytest.approx(3 / 14)
    assert own["deviation"] == pytest.approx((33 / (196 * 15)) ** 0.5)
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert next(row for row in rows if row["status"] == "retired")["share"] == pytest.approx(0.02)
    assert rows[-1]["status"] == "refused" and rows[-1]["share"] == 0


def test_a_round_says_what_its_draws_aim_at(tmp_path: Path) -> None:
    section = CurriculumSection(order="target")
    curriculum = Curriculum(POOL, section, seed=0, group_size=8, steps=3)
    curriculum.observe(1, [])
    Rounds(tmp_path, every=1).keep(curriculum)
    rows = pq.read_table(tmp_path / "round_000001.parquet").to_pylist()
    assert [row["aim"] for row in rows] == pytest.approx([0.6, 0.6])


def test_prompts_nobody_has_looked_at_share_a_row(tmp_path: Path) -> None:
    Rounds(tmp_path, every=1).keep(make_curriculum())
    rows = pq.read_table(tmp_path / "round_000000.parquet").to_pylist()
    assert [(row["prompts"], row["status"]) for row in rows] == [(3, "active"), (1, "retired")]


def test_rounds_come_every_so_many_versions(tmp_path: Path) -> None:
    curriculum, rounds = make_curriculum(), Rounds(tmp_path / "curriculum", every=2)
    for version in range(1, 6):
        rounds.keep(curriculum)
        curriculum.observe(version, [])
    assert names(tmp_path / "curriculum") == [f"round_00000{n}.parquet" for n in (0, 2, 4)]
    rounds.forget_after(2)
    assert names(tmp_path / "curriculum") == ["round_000000.parquet", "round_000002.parquet"]


def test_a_run_that_begins_again_forgets_the_rounds_of_the_run_before(tmp_path: Path) -> None:
    section = RlSection(steps=4, groups_per_step=1, curriculum=CurriculumSection(round_every=1))
    folder, journal = tmp_path / "curriculum", Journal(tmp_path / "ledger.jsonl")
    folder.mkdir()
    (folder / "round_000003.parquet").write_bytes(b"of a version that is made again")
    books = Books.of(section, POOL, 0, journal.append)
    prompts = {prompt.id: prompt for prompt in POOL}
    restore_books(books, journal, Rounds(folder, every=1), None, [], prompts)
    assert names(folder) == ["round_000000.parquet"]
    assert pq.read_table(folder / "round_000000.parquet").num_rows == 2
