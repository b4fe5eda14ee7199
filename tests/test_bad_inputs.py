"""Bad inputs from the user's end: one clear error, the right exit code, nothing lost.

What the rooms refuse is tested in full beside them; here it comes through the command line.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fabricated import fabricate_run

from ground.run import RunDir
from packtrain.cli import main

ROOT = Path(__file__).parents[1]
GOOD = """\
name: mine
model: {path: model}
data: {sft: sft.jsonl, prompts: prompts.jsonl, heldout: heldout.jsonl}
sft:
  trainer: {learning_rate: 1e-5}
mine: {samples: 16}
rl:
  steps: 10
evaluate: {}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder: a recipe that is right, and the files that it names."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    for name in ("sft", "prompts", "heldout"):
        row = {"prompt": "2+2=", "completion": "4", "reward": "exact", "answer": "4"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "recipe.yaml").write_text(GOOD)
    return tmp_path


def refusal(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Exit code and message of a command that must refuse, in one piece and without a traceback."""
    code = main(words)
    shown = capsys.readouterr()
    assert shown.err.startswith("packtrain: ") and shown.err.count("packtrain: ") == 1, shown.err
    assert "Traceback" not in shown.err and shown.out == ""
    return code, shown.err.removeprefix("packtrain: ")


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder with its hash."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_recipe_is_right_to_begin_with(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["validate", "recipe.yaml"]) == 0
    assert capsys.readouterr().out.startswith("recipe.yaml: valid; run 'mine' has 6 steps")


WRONG_LINES = {
    "nmae: mine": "recipe.yaml:1: nmae is not a key; did you mean 'name'?",
    "name: a/b": "recipe.yaml:1: name must match",
    "name: {x: 1}": "recipe.yaml:1: name must be text",
    "name: mine\nseed: one": "recipe.yaml:2: seed must be a whole number, got 'one'",
    "name: mine\nseed: 1.5": "recipe.yaml:2: seed must be a whole number",
    "name: mine\nsink: [wandb]": "recipe.yaml:2: sink is not a key; did you mean 'sinks'?",
    "name: mine\nsinks: [wadb]": "recipe.yaml:2: sinks[0] must be 'trackio', 'wandb'",
    "name: mine\nevalute: {}": "recipe.yaml:2: evalute is not a key; did you mean 'evaluate'?",
    "name: mine\nextends: base.yaml": "recipe.yaml:2: extends names 'base.yaml', which is not a",
    "name: mine\nname: yours": "recipe.yaml:2: ",
    "name: !!python/object/apply:os.system [ls]": "recipe.yaml:1: ",
    "name: [mine": "not valid YAML",
}


@pytest.mark.parametrize("line", WRONG_LINES)
def test_a_wrong_line_of_the_head(
    folder: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    (folder / "recipe.yaml").write_text(GOOD.replace("name: mine", line))
    code, message = refusal(capsys, "validate", "recipe.yaml")
    assert code == 2
    assert WRONG_LINES[line] in message


WRONG_OVERRIDES = {
    "sft.trianer={}": "sft.trianer is not a key; did you mean 'trainer'?",
    "sft.trainer.learning_rat=1": "is not a key; did you mean 'learning_rate'?",
    "sft.trainer.learning_rate=fast": "sft.trainer.learning_rate must be a number, got 'fast'",
    "sft.trainer.learning_rate=0": "sft.trainer.learning_rate must be greater than 0, got 0",
    "sft.trainer.learning_rate=.nan": "sft.trainer.learning_rate must be",
    "sft.trainer.rows_per_step=50": "rows_per_step must be a multiple of rows_per_pass, got 50",
    "sft.max_length=true": "sft.max_length must be a whole number, got 'true'",
    "mine.samples=4": "k must lie within 1 and samples (4)",
    "mine.max_new_tokens=512": "mine max_new_tokens must be below engine.max_length (512)",
    "evaluate.engine.max_length=128": "max_new_tokens must be below engine.max_length (128)",
    "rl.sampling.max_new_tokens=600": "sampling.max_new_tokens must be below engine",
    "mine.samples=many": "mine.samples must be a whole number, got 'many'",
    "mine.k=[]": "mine.k is wrong: list should have at least 1 item",
    "rl.group_szie=8": "rl.group_szie is not a key; did you mean 'group_size'?",
    "rl.group_size=1": "rl.group_size must be at least 2, got 1",
    "rl.max_staleness=-1": "rl.max_staleness must be at least 0, got -1",
    "rl.steps=null": "rl.steps must be a whole number",
    "rl.loss.kind=ppo": "rl.loss has a 'kind' that must be 'aipo', 'cispo', 'clip', 'decoupled'",
    "rl.loss={kind: clip, rho_max: 3}": "rl.loss.rho_max is not a key",
    "rl.advantages={kind: pass_at_k, k: 8}": "advantages.k must be below group_size (8), got 8",
    "rl.sampling.temperature=0": "must be positive in RL, got 0",
    "rl.sampling.top_p=0.9": "rl.sampling.top_p is not a key",
    "rl.engine.kind=sglang": "rl.engine.kind must be",
    "rl=fast": "rl must be a mapping",
    "evaluate.samples=0": "evaluate.samples must be at least 1, got 0",
    "prune.fraction=1": "fraction must be at least 0 and below 1",
    "prune.fraction=half": "prune.fraction must be",
    "targets={}": "targets needs sft.distill: nothing else reads what it stores",
    "sft.distill={}": "sft.distill needs targets",
    "model.path=gone": "model.path names",
    "model.path=sft.jsonl": "sft.jsonl, which must be a folder with config.json in it",
    "model.path=/": "model.path names /, which must be a folder with config.json in it",
    "rl=null & dpo={}": "dpo needs rl: its pairs are mined from the groups that rl sampled",
    "seed=-1": "seed must be at least 0, got -1",
    "herd={}": "data.sft stands beside herd, which makes its own: leave one of the two out",
    "data.heldout=null": "evaluate needs data.heldout",
    "data.sft=gone.jsonl": "gone.jsonl, which does not exist",
    "seed": "unexpected argument 'seed'",
    "seed=": "seed needs a value",
    "name.x=1": "name is not a mapping",
}


@pytest.mark.parametrize("override", WRONG_OVERRIDES)
def test_a_wrong_override(folder: Path, capsys: pytest.CaptureFixture[str], override: str) -> None:
    code, message = refusal(capsys, "validate", "recipe.yaml", *override.split(" & "))
    assert code == 2
    assert WRONG_OVERRIDES[override] in message


def test_a_validation_slice_as_large_as_the_pool_of_the_herd(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """7 families x 3 levels x 4 rows are 84 prompts."""
    (folder / "made.yaml").write_text("name: made\nherd: {prompts_per_level: 4}\nrl: {steps: 1}\n")
    _, message = refusal(capsys, "validate", "made.yaml")
    assert "rl.validation.prompts must be below the 84 prompts that herd makes, got 96" in message
    assert main(["validate", "made.yaml", "rl.validation.prompts=83"]) == 0


def test_all_errors_come_at_once(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = GOOD.replace("steps: 10", "stpes: 10\n  group_size: 0").replace(
        "mine: {", "mine: {kk: 1, "
    )
    (folder / "recipe.yaml").write_text(f"{wrong}sead: 3\n")
    _, message = refusal(capsys, "validate", "recipe.yaml")
    assert sorted(line.split()[1] for line in message.splitlines()) == [
        *("mine.kk", "rl.group_size", "rl.steps", "rl.stpes", "sead")
    ]


@pytest.mark.parametrize(
    ("words", "code", "fragment"),
    [
        (("validate", "gone.yaml"), 2, "gone.yaml: cannot read the recipe"),
        (("validate", "."), 2, "a recipe is a regular file"),
        (("run", "recipe.yaml", "--resum"), 2, "did you mean '--resume'?"),
        (("run", "recipe.yaml", "--accelerate", "no.yaml"), 2, "--accelerate names no.yaml, which"),
        (("run", "recipe.yaml", "--from", "rll"), 2, "no stage of this recipe; did you mean 'rl'?"),
        (("run", "recipe.yaml", "--from", "dpo"), 2, "name one of base, sft, mine, rl, evaluate"),
        (("status", "runs/none"), 3, "this is not a run directory"),
        (("report", "model"), 3, "this is not a run directory"),
        (("status", "other"), 3, "other: this is not a run directory"),
        (("report", "other"), 3, "other: this is not a run directory"),
        (("recipes", "cp", "tiny", "x"), 2, "'tiny' is not a recipe"),
    ],
)
def test_a_wrong_word(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    code: int,
    fragment: str,
) -> None:
    (folder / "other" / "herd").mkdir(parents=True)
    found, message = refusal(capsys, *words)
    assert found == code
    assert fragment in message


def test_a_refused_recipe_leaves_no_trace(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(folder)
    assert refusal(capsys, "run", "recipe.yaml", "rl.group_szie=8")[0] == 2
    assert snapshot(folder) == before
    assert not (folder / "runs").exists()


def test_a_directory_of_somebody_else_is_not_touched(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "thesis").mkdir()
    (folder / "thesis" / "chapter.txt").write_text("years of work")
    before = snapshot(folder)
    for flags in ((), ("--resume",), ("--overwrite",)):
        code, message = refusal(capsys, "run", "recipe.yaml", "--run", "thesis", *flags)
        assert code == 4
        assert "not empty and is not a run of packtrain" in message
    assert snapshot(folder) == before


def test_folders_that_are_named_like_ours_are_not_touched(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proj = folder / "proj"
    for name in (
        "log/a.txt",
        "sft/thesis.txt",
        "base/own.txt",
        "evaluation/x",
        "lock",
        "lock.json",
    ):
        (proj / name).parent.mkdir(parents=True, exist_ok=True)
        (proj / name).write_text("years of work")
    (folder / "proj2").mkdir()
    (folder / "proj2" / "recipe.yaml").write_text("flour, water, salt")
    before = snapshot(folder)
    for place in ("proj", "proj2"):
        for flags in ((), ("--resume",), ("--overwrite",), ("--from", "sft")):
            code, message = refusal(capsys, "run", "recipe.yaml", "--run", place, *flags)
            assert code == 4
            assert f"{place}: the directory is not empty and is not a run" in message
            assert snapshot(folder) == before


def test_a_folder_that_was_put_into_a_run_is_not_touched(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunDir(folder / "runs" / "mine").open():
        (folder / "runs" / "mine" / "sft").mkdir()
        (folder / "runs" / "mine" / "sft" / "thesis.txt").write_text("years of work")
    before = snapshot(folder)
    for flags in ((), ("--resume",), ("--overwrite",), ("--from", "sft")):
        code, message = refusal(capsys, "run", "recipe.yaml", *flags)
        assert code == 4
        assert "runs/mine/sft: the folder holds files and was not made by packtrain" in message
    assert snapshot(folder) == before


def test_a_half_finished_run_needs_a_word_and_stays_as_it_is(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fabricate_run(folder / "runs" / "mine", num_prompts=4)
    (run / "rl" / "manifest.json").unlink()
    (folder / "made.yaml").write_text((folder / "runs" / "made.yaml").read_text())
    before = snapshot(folder)
    code, message = refusal(capsys, "run", "made.yaml", "--run", str(run))
    assert code == 4
    assert "the run is half finished: 9 of 10 steps are done" in message
    assert snapshot(folder) == before


def test_a_folder_that_hides_our_modules_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "rollout").mkdir()
    code, message = refusal(capsys, "run", "recipe.yaml")
    assert code == 4
    assert f"{folder / 'rollout'} would hide packtrain's own modules" in message


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    place = tmp_path / "small"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_is_named_and_the_old_report_stays(
    small_disk: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fabricate_run(folder / "runs" / "made", num_prompts=8)
    report = small_disk / "report.html"
    report.write_text("the old one")
    code, message = refusal(capsys, "report", str(run), "--output", str(report))
    assert code == 4
    assert str(small_disk) in message and "full" in message
    assert report.read_text() == "the old one"
    assert [path.name for path in small_disk.iterdir()] == ["report.html"]


def test_a_run_on_a_full_disk_is_refused(
    small_disk: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (small_disk / "ballast").write_bytes(bytes(64 * 1024 - 4096 * 2))
    code, message = refusal(capsys, "run", "recipe.yaml", "--run", str(small_disk / "run"))
    assert code == 4
    assert "full" in message


def test_a_report_into_a_folder_that_is_not_there(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fabricate_run(folder / "runs" / "made", num_prompts=4)
    code, message = refusal(capsys, "report", str(run), "--output", "no/such/r.html")
    assert code == 4
    assert message.startswith("no/such/r.html: cannot be written\n  why: its folder does not exist")
    assert not (folder / "no").exists()


def test_a_file_size_limit_is_named(folder: Path) -> None:
    run = fabricate_run(folder / "runs" / "made", num_prompts=4)
    code = "import sys; from packtrain.cli import main; sys.exit(main())"
    line = [sys.executable, "-c", code, "report", str(run)]

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    done = subprocess.run(line, capture_output=True, text=True, preexec_fn=limit, timeout=60)
    assert done.returncode == 4, done.stderr
    assert "larger than the limit" in done.stderr
    assert not (run / "report.html").exists()
