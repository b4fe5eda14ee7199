"""Files that a restart trusts: killed at each of its calls, a writer leaves the old or the new."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from crashpoints import crash_at_each_call, limited_file_size, old_then_new
from rl_doubles import PROMPT, make_group

from curation.curriculum import Observation
from ground.errors import DataError, SetupError
from rl.buffer import LATE, Outcome, Plan
from rl.consumed import Consumed, groups_path, read_plan
from rl.journal import Journal, read_journal
from rl.source import Draw
from rl.versions import Versions


def make_plan(step: int) -> Plan:
    """One trained, one flat, one broken, one late draw, and one that a restart remembered."""
    draws = [Draw(number, number, 0, step, PROMPT, number == 3) for number in range(5)]
    return Plan.of(
        step,
        [
            Outcome(draws[0], "", Observation(PROMPT.id, 2, 4), make_group(0)),
            Outcome(draws[1], "all-0", Observation(PROMPT.id, 0, 4), make_group(1)),
            Outcome(draws[2], "broken"),
            Outcome(draws[3], LATE),
            Outcome(draws[4], "all-1", Observation(PROMPT.id, 4, 4)),
        ],
    )


def test_a_plan_is_rebuilt_bit_for_bit(tmp_path: Path) -> None:
    consumed, plans = Consumed(tmp_path), [make_plan(step) for step in range(3)]
    for plan in plans:
        consumed.write(plan)
    assert list(consumed.after(0)) == plans
    assert list(consumed.after(2)) == plans[2:]
    assert repr(next(consumed.after(1))) == repr(plans[1])
    assert plans[0].filtered == {"all-0": 1, "broken": 1, LATE: 1, "all-1": 1}
    assert [path.name for path in consumed.trim(1)] == [
        "step_000003.parquet",
        "step_000002.parquet",
    ]
    assert list(consumed.after(0)) == plans[:1]


@pytest.mark.slow
def test_a_kill_at_any_call_leaves_no_step_or_the_whole_one(ram_path: Path) -> None:
    def read(folder: Path) -> int:
        return sum(plan == make_plan(step) for step, plan in enumerate(Consumed(folder).after(0)))

    seen = crash_at_each_call(
        ram_path,
        lambda folder: Consumed(folder).write(make_plan(0)),
        lambda folder: Consumed(folder).write(make_plan(1)),
        read,
    )
    old_then_new(seen, 1, 2)


def test_a_kill_while_trimming_leaves_a_beginning(ram_path: Path) -> None:
    def prepare(folder: Path) -> None:
        for step in range(4):
            Consumed(folder).write(make_plan(step))

    def read(folder: Path) -> int:
        files = Consumed(folder).files()
        assert len(files) == len(list(Consumed(folder).after(0)))
        return len(files)

    seen = crash_at_each_call(ram_path, prepare, lambda folder: Consumed(folder).trim(1), read)
    assert [value for _, value in seen] == sorted((value for _, value in seen), reverse=True)
    assert (seen[0][1], seen[-1][1]) == (4, 1)


def test_every_flipped_bit_is_refused_or_harmless(tmp_path: Path) -> None:
    plan, chance = make_plan(2), random.Random(0)
    Consumed(tmp_path).write(plan)
    path = groups_path(tmp_path, 3)
    whole, refused = path.read_bytes(), 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        try:
            assert read_plan(path) == plan
        except DataError:
            refused += 1
    assert refused > 200
    for cut in (0, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError, match="what a step consumed cannot be read"):
            read_plan(path)
    path.write_bytes(whole)
    os.rename(path, groups_path(tmp_path, 4))
    with pytest.raises(DataError, match="cannot be read") as caught:
        read_plan(groups_path(tmp_path, 4))
    assert caught.value.why == "it is the file of step 3"


def test_a_full_disk_stops_the_journal_with_a_type_and_leaves_no_half_step(tmp_path: Path) -> None:
    consumed = Consumed(tmp_path / "groups")
    with pytest.raises(SetupError, match="cannot be written"), limited_file_size(2000):
        consumed.write(make_plan(0))
    assert list((tmp_path / "groups").iterdir()) == []
    journal = Journal(tmp_path / "ledger.jsonl")
    with pytest.raises(SetupError), limited_file_size(2000):
        for number in range(1000):
            journal.append({"draw": number})
    lines = list(read_journal(tmp_path / "ledger.jsonl"))
    assert [line["draw"] for line in lines] == list(range(len(lines))) and len(lines) > 10
    assert (tmp_path / "ledger.jsonl").read_bytes().endswith(b"}\n")


def test_a_torn_line_never_runs_into_the_next_record(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    dead, alive = Journal(path), Journal(path)
    dead.append({"n": 1})
    os.write(dead._file, b'{"n": 2, "kind": "tra')
    alive.append({"n": 3})
    assert [record["n"] for record in read_journal(path)] == [1, 3]
    os.write(dead._file, b'{"n"')
    Journal(path)
    assert path.read_bytes().endswith(b'{"n": 3}\n')
    path.write_bytes(b'{"n": 1' * 2000)
    Journal(path).append({"n": 5})
    assert list(read_journal(path)) == [{"n": 5}]


def test_a_kill_at_any_call_of_an_append_leaves_whole_records(ram_path: Path) -> None:
    def write(folder: Path) -> None:
        journal = Journal(folder / "ledger.jsonl")
        for number in (1, 2):
            journal.append({"n": number})
        journal.close()

    def read(folder: Path) -> tuple[object, ...]:
        return tuple(record["n"] for record in read_journal(folder / "ledger.jsonl"))

    def prepare(folder: Path) -> None:
        (folder / "ledger.jsonl").write_text('{"n": 0}\n{"n"')

    seen = crash_at_each_call(ram_path, prepare, write, read, rerun=False)
    assert sorted({value for _, value in seen}) == [(0,), (0, 1), (0, 1, 2)]


def test_a_ledger_that_lost_synced_lines_is_refused(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "ledger.jsonl")
    with pytest.raises(DataError, match="must have at least 5 bytes, it has 0"):
        journal.rewind(5)


def test_scores_remember_every_look_and_forget_later_ones(tmp_path: Path) -> None:
    scores = Versions[float | None](tmp_path / "validation.jsonl", "pass_rate")
    for version, score in ((10, 0.5), (20, None), (30, 0.75)):
        scores.record(version, score)
    again = Versions[float | None](tmp_path / "validation.jsonl", "pass_rate")
    assert (10 in again, 20 in again, 25 in again) == (True, True, False)
    assert (again.get(10), again.get(20), again.get(30)) == (0.5, None, 0.75)
    again.forget_after(20)
    again.record(30, 0.25)
    lines = (tmp_path / "validation.jsonl").read_text().splitlines()
    assert [json.loads(line)["pass_rate"] for line in lines] == [0.5, None, 0.25]
