"""`packtrain view`: the right rows, plain into a pipe, and no line that data could forge."""

from __future__ import annotations

import os
import pty
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from curation.label_judge import labelled
from curation.pruning import SCHEMA, decision_row, prune
from ground.records import Demonstration, Message
from ground.run import MARK
from ground.tables import write_rows
from packtrain.cli import main
from packtrain.pager import Line, show
from rl.groups import SCHEMA as GROUPS

HOSTILE = "\x1b[31mred\x07\u202e\n── step 9 · group forged.0 · logic · trained\r\x9b2J"


def group(number: int, capability: str, passed: Sequence[bool], text: str) -> dict[str, object]:
    is_flat = len(set(passed)) == 1
    return {
        "id": f"p{number}.{number}",
        "prompt_id": f"p{number}",
        "messages": [{"role": "user", "content": text}],
        "capability": capability,
        "answer": "4",
        "state": "filtered" if is_flat else "trained",
        "reason": f"all-{int(passed[0])}" if is_flat else "",
        "opened_at": 1,
        "version": 2,
        "passed": passed,
        "rewards": [float(right) for right in passed],
        "advantages": [right - sum(passed) / len(passed) for right in passed],
        "texts": [f"{text} {n}" for n in range(len(passed))],
        "num_tokens": [5] * len(passed),
        "finish": ["stop", *["length"] * (len(passed) - 1)],
        "errors": [""] * len(passed),
        "reward_parts": [[{"name": "form", "value": 0.5}]] * len(passed),
    }


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Two steps with a flat and a trained group each, and four rows of which two were dropped."""
    (tmp_path / MARK).touch()
    (tmp_path / "rl" / "groups").mkdir(parents=True)
    for step, names in ((1, ("math", "chat")), (2, ("math", "math\n── step 7"))):
        rows = [
            group(step * 10, names[0], [True, False], HOSTILE),
            group(step * 10 + 1, names[1], [False, False], "calm"),
        ]
        path = tmp_path / "rl" / "groups" / f"step_{step:06d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, GROUPS), path)
    rows = [
        Demonstration(f"r{n}", (Message("user", f"ask {n}"), Message("assistant", "4")), "math")
        for n in range(4)
    ]
    judgements = [labelled({"easy": 1 - n / 4, "medium": 0, "hard": n / 4}, 0.0) for n in range(4)]
    decisions = prune(rows, judgements, Fraction(1, 2), "capability")
    for name, kept in (("kept", True), ("dropped", False)):
        part = [decision_row(d, "t", "r") for d in decisions if d.kept == kept]
        write_rows(tmp_path / "prune" / f"{name}.parquet", part, SCHEMA)
    return tmp_path


def view(capsys: pytest.CaptureFixture[str], *words: object) -> list[str]:
    assert main(["view", *map(str, words)]) == 0
    return capsys.readouterr().out.splitlines()


def headings(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("── ")]


def test_everything_comes_in_order_and_is_counted(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = view(capsys, run)
    assert [line.split()[1] for line in headings(lines)] == ["dropped"] * 2 + ["kept"] * 2 + [
        "step"
    ] * 4
    assert [line for line in lines if line[:1].isdigit()] == [
        *("2 rows dropped", "2 rows kept", "4 groups")
    ]


@pytest.mark.parametrize(
    ("words", "groups"),
    [
        (("--step", 2), ["p20.20", "p21.21"]),
        (("--flat",), ["p11.11", "p21.21"]),
        (("--trained", "--step", 1), ["p10.10"]),
        (("groups", "--prompt", "p1"), ["p10.10", "p11.11"]),
        (("groups", "--capability", "chat"), ["p11.11"]),
        (("groups", "--capability", "cha"), []),
    ],
)
def test_filters_pick_groups(
    run: Path, capsys: pytest.CaptureFixture[str], words: tuple[object, ...], groups: list[str]
) -> None:
    lines = view(capsys, run, *words)
    assert [line.split(" · ")[1] for line in headings(lines)] == [f"group {g}" for g in groups]
    if not groups:
        assert lines[0] == "no groups that match; capabilities here: chat, math, math ── step 7"


def test_a_group_shows_its_rollouts_with_rewards_and_advantages(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = view(capsys, run, "--step", 1, "--flat")
    assert lines[:2] == [
        "── step 1 · group p11.11 · chat · filtered: all wrong",
        "   0 of 2 passed; drawn at version 1, oldest token 2",
    ]
    assert lines[6:10] == [
        "  0  failed  reward 0.00  advantage +0.00  form 0.50  5 tokens",
        "    │ calm 0",
        "  1  failed  reward 0.00  advantage +0.00  form 0.50  5 tokens  ended by length",
        "    │ calm 1",
    ]


def test_a_row_shows_its_judgement_and_why_it_went(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = view(capsys, run, "dropped", "--prompt", "r1")
    assert lines[0] == "── dropped 1 · r1 · math · easy · difficulty 0.25"
    assert lines[1] == "   rank 1 of 4 in math, the easiest 2 go"
    assert lines[2:6] == ["  asked", "    │ ask 1", "  answer", "    │ 4"]


def test_hostile_text_moves_no_cursor_and_forges_no_line(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["view", str(run)]) == 0
    out = capsys.readouterr().out
    assert not set(out) & set("\x1b\x07\u202e\r\x9b")
    assert "    │ ── step 9 · group forged.0 · logic · trained" in out
    assert not any("forged" in line for line in headings(out.splitlines()))


def test_long_texts_are_shortened_unless_asked_for(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = run / "rl" / "groups" / "step_000003.parquet"
    rows = [group(30, "math", [True, False], "x" * 5000)]
    pq.write_table(pa.Table.from_pylist(rows, GROUPS), path)
    assert any("(3500 characters more)" in line for line in view(capsys, run, "--step", 3))
    assert any("x" * 5000 in line for line in view(capsys, run, "--step", 3, "--full"))


def test_a_terminal_gets_a_pager_and_colours_unless_told_not_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pager = tmp_path / "pager"
    pager.write_text(f"#!/bin/sh\ncat > {tmp_path}/paged\n")
    pager.chmod(0o755)
    monkeypatch.setenv("PAGER", str(pager))
    main_end, terminal = pty.openpty()
    lines = [Line("a heading", "title"), Line("text")]
    try:
        with os.fdopen(terminal, "w") as out:
            monkeypatch.delenv("NO_COLOR", raising=False)
            show(lines, out)
            assert (tmp_path / "paged").read_text() == "\x1b[1ma heading\x1b[0m\ntext\n"
            monkeypatch.setenv("NO_COLOR", "1")
            show(lines, out)
            assert (tmp_path / "paged").read_text() == "a heading\ntext\n"
    finally:
        os.close(main_end)


def test_a_reader_who_leaves_early_ends_it_quietly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PAGER", "true")
    main_end, terminal = pty.openpty()
    made = []

    def endless() -> Iterator[Line]:
        while True:
            made.append(1)
            yield Line("x" * 1000)

    try:
        with os.fdopen(terminal, "w") as out:
            show(endless(), out)
    finally:
        os.close(main_end)
    assert made


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["grops"], "'grops' is nothing to view; did you mean 'groups'?"),
        (["--flat", "--trained"], "not allowed with argument"),
        (["--stpe", "3"], "'--stpe' is not a flag; did you mean '--step'?"),
    ],
)
def test_a_wrong_word_is_refused_by_name(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["view", str(run), *words]) == 2
    assert message in capsys.readouterr().err
