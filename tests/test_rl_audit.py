"""The checker sees what is wrong with a run's files; each test plants one fault."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_rl_books import ALL_WRONG, MIXED, make_books, make_group

from ground.errors import DataError
from rl.audit import audit_run
from rl.config import RlSection
from rl.consumed import Consumed, groups_path

SECTION = RlSection(steps=4, groups_per_step=2, group_size=2, max_staleness=1)


def write_run(directory: Path) -> None:
    """Four steps of two slots; the first draw of slot 2 is flat."""
    records: list[dict[str, object]] = []
    books, consumed = make_books(records), Consumed(directory / "groups")
    books.open()
    for step in range(4):
        for draw in books.waiting():
            books.send(draw)
            refill = books.settle(draw, make_group(draw, ALL_WRONG if draw.number == 4 else MIXED))
            if refill:
                books.send(refill)
                books.settle(refill, make_group(refill, MIXED))
        consumed.write(books.plan(step))
        books.publish(step + 1)
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (directory / "ledger.jsonl").write_text(lines)


def change(directory: Path, step: int, edit: Callable[[list[dict]], object]) -> None:
    path = groups_path(directory / "groups", step)
    table = pq.read_table(path)
    rows = table.to_pylist()
    edit(rows)
    pq.write_table(pa.Table.from_pylist(rows, schema=table.schema), path)


def test_a_whole_run_is_counted(tmp_path: Path) -> None:
    write_run(tmp_path)
    assert audit_run(tmp_path, SECTION) == {
        "steps": 4,
        "trained_groups": 8,
        "trained_samples": 16,
        "trained_tokens": 32,
        "filtered": 1,
        "late": 0,
        "oldest_token": 1,
        "trained_twice": 0,
        "lost": 0,
    }


def set_versions(row: Mapping, version: int) -> None:
    for segments in row["segments"]:
        segments[0]["versions"] = [{"version": version, "length": 2}]


@pytest.mark.parametrize(
    ("step", "edit", "message"),
    [
        (4, lambda rows: set_versions(rows[0], 1), r"must be of versions 2 to 3, got \[1\]"),
        (3, lambda rows: set_versions(rows[0], 3), r"must be of versions 1 to 2, got \[3\]"),
        (3, lambda rows: rows.pop(), "step 2 must consume slots 4 to 5"),
        (2, lambda rows: rows.pop(0), "slot 2 must have draw 4 as attempt 0, got 5"),
        (2, lambda rows: rows[0].update(state="trained"), "slot 2 must end with its first draw"),
        (1, lambda rows: rows[0].update(state="filtered"), "slot 0 must be refilled 1 times"),
        (1, lambda rows: rows[0]["segments"].pop(), "must have 2 rollouts"),
        (1, lambda rows: rows[0].update(prompt_id="else"), "of prompt else has id"),
        (4, lambda rows: rows[0]["segments"][0][0]["logprobs"].pop(), "a version for each token"),
        (4, lambda rows: rows[1].update(draw=5, is_again=True), "draw 5 .*has id"),
    ],
)
def test_a_fault_in_what_was_consumed_is_named(
    tmp_path: Path, step: int, edit: Callable[[list[dict]], object], message: str
) -> None:
    write_run(tmp_path)
    change(tmp_path, step, edit)
    with pytest.raises(DataError, match=message) as caught:
        audit_run(tmp_path, SECTION)
    assert caught.value.where.endswith(f"step_{step:06d}.parquet")


def test_a_group_that_is_trained_twice_is_named(tmp_path: Path) -> None:
    write_run(tmp_path)
    first = pq.read_table(groups_path(tmp_path / "groups", 1)).to_pylist()[0]

    def repeat(rows: list[dict]) -> None:
        rows[0] = {**first, "slot": 6, "attempt": 0, "is_again": True, "opened_at": 2}
        set_versions(rows[0], 2)

    change(tmp_path, 4, repeat)
    with pytest.raises(DataError, match="draw 0 was consumed before, as trained"):
        audit_run(tmp_path, SECTION)


def test_a_missing_step_and_another_ledger_are_named(tmp_path: Path) -> None:
    write_run(tmp_path)
    ledger = tmp_path / "ledger.jsonl"
    told = ledger.read_text()
    ledger.write_text(told.replace("filtered", "withdrawn"))
    with pytest.raises(DataError, match=r"must call draws \[4\] filtered"):
        audit_run(tmp_path, SECTION)
    lines = [line for line in told.splitlines() if '"draw": 14,' not in line]
    ledger.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=r"what was trained, draws \[14\] differ"):
        audit_run(tmp_path, SECTION)
    groups_path(tmp_path / "groups", 2).unlink()
    with pytest.raises(DataError, match="the file of step 2 must come here"):
        audit_run(tmp_path, SECTION)


def test_a_judged_group_may_be_smaller_than_the_others(tmp_path: Path) -> None:
    """Answers without a verdict leave their group; with any other reward none may be missing."""
    write_run(tmp_path)
    section = SECTION.model_copy(update={"group_size": 3})
    with pytest.raises(DataError, match="must have 3 rollouts"):
        audit_run(tmp_path, section)
    for step in range(1, 5):
        change(tmp_path, step, lambda rows: [row.update(reward="judge") for row in rows])
    assert audit_run(tmp_path, section)["trained_samples"] == 16
