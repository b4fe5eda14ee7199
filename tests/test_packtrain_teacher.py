"""`packtrain teacher`: what filling takes, told first, and made without asking anything twice."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_distill_sft import Case

from distill.plan import read_note
from packtrain.cli import main


def said(case: Case, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, str]:
    """The lines of `packtrain teacher info`, by their first word."""
    line = ["teacher", "info", str(case.recipe), "--run", str(case.folder / "run"), *words]
    assert main(line) == 0
    return dict(each.split(maxsplit=1) for each in capsys.readouterr().out.splitlines())


def test_size_and_time_are_told_before_and_after(tmp_path: Path, capsys):
    """24 rows of 32 tokens, 3 of them trained; ten outcomes of 6 bytes and three numbers of 2."""
    case = Case(tmp_path)
    before = said(case, capsys)
    assert before["format"] == "topk_tail k=8 always=260, 66 bytes a token"
    assert before["wanted"] == (
        "24 rows, 24 of them new: the teacher reads 768 tokens and speaks to 72"
    )
    assert before["size"] == f"{(72 * 66 + 24 * 32) / 1000:.3g} kB more"
    assert "floating-point operations" in before["time"]
    assert case.fill() == 0
    capsys.readouterr()
    after = said(case, capsys)
    assert "24 rows, 0 of them new" in after["wanted"]
    assert after["time"] == "none: everything is there"
    assert "24 rows, 72 tokens" in after["store"] and "beside" not in after
    other = said(case, capsys, "targets.k=4")
    assert "24 of them new" in other["wanted"], "another format is another store"
    assert other["beside"].endswith("topk_tail k=8 always=260")


def test_rows_that_prune_is_still_to_choose_are_told_and_not_filled(tmp_path: Path, capsys):
    """`info` counts today's rows and says so; `fill` would leave a stage of the wrong ones."""
    case = Case(tmp_path)
    assert "rows" not in said(case, capsys)
    with case.recipe.open("a") as file:
        file.write("prune: {}\n")
    told = said(case, capsys)
    assert told["rows"].startswith("before prune: ") and "24 rows" in told["wanted"]
    run = case.folder / "run"
    assert main(["teacher", "fill", str(case.recipe), "--run", str(run)]) == 2
    message = capsys.readouterr().err
    assert "prune comes before targets and is not finished: the rows are not known yet" in message
    assert "packtrain run RECIPE fills the store in its turn" in message
    assert not (run / "targets").exists()


@pytest.mark.slow
def test_fill_makes_what_is_damaged_and_nothing_else(tmp_path: Path, capfd):
    """In a process of its own, over a stage that is done."""
    case = Case(tmp_path)
    assert case.fill() == 0
    note = read_note(case.folder / "run" / "targets" / "targets.json")
    (shard,) = note.open_store().folder.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1  # among the ids, which take most of it
    shard.write_bytes(content)
    assert main(["teacher", "fill", str(case.recipe), "--run", str(case.folder / "run")]) == 0
    assert "checksum differs; it is made again" in capfd.readouterr().err
    summary = case.summary("targets")
    assert (summary["rows"], summary["hits"], summary["passes"]) == (24, 23, 1)
    assert case.run() == 0
