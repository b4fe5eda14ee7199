"""`packtrain run`: order, skipping, resuming, refusing; real processes through ground.entry."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from ground.entry import exit_file
from ground.errors import RecipeError, SetupError
from ground.lock import RunLock
from ground.recipe import load_recipe
from ground.run import RunDir
from packtrain import runner
from packtrain.cli import parse
from packtrain.panel import LivePanel
from packtrain.recipe import read_recipe
from packtrain.runner import Order, command, discard, require_resumable, run_steps, told_end
from packtrain.status import read_status
from packtrain.steps import Step, folders_from, launch_line, start_of, steps_of
from packtrain.validate import require_processors
from rollout.places import PlacementError

TINY = Path(__file__).parents[1] / "recipes" / "tiny" / "recipe.yaml"
STAGE = """\
import json, os, sys, time
from pathlib import Path
from ground.config import Section
from ground.console import progress
from ground.entry import stage_entry
from ground.errors import DataError

class Settings(Section):
    distill: dict = {}
    fail: bool = False
    crash: bool = False
    wait: float = 0

def train(stage):
    progress(stage.directory, 1, 2, reward=0.5)
    deadline = time.monotonic() + stage.section.wait
    while time.monotonic() < deadline:
        time.sleep(0.05)
    if stage.section.fail:
        raise DataError("answer is null", where="rows.jsonl:7", fix="give every row an answer")
    if stage.section.crash:
        os.abort()
    with (stage.run.path / "order.txt").open("a") as file:
        file.write(stage.name + "\\n")
    return {"resumed": stage.resume}

if __name__ == "__main__":
    sys.exit(stage_entry("NAME", Settings, train))
"""


MADE = '    (stage.directory / "made").write_text("other")\n'


class Trail:
    """Two small real stages, `sft` then `dpo`, run by the runner in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.recipe = folder / "recipe.yaml"
        self.recipe.write_text("name: small\nsft: {}\ndpo: {}\n")
        for name in ("sft", "dpo"):
            (folder / f"stage_{name}.py").write_text(STAGE.replace("NAME", name))

    def order(self, *overrides: str, start: str = "") -> Order:
        """The run as the command line would ask for it."""
        document = load_recipe(self.recipe, overrides)
        steps = tuple(Step(name, name, f"stage_{name}") for name in ("sft", "dpo"))
        discarded = folders_from(start) if start else ()
        return Order(document, RunDir(self.folder / "run"), steps, None, discarded)

    def run(self, *overrides: str, resume: bool = False, start: str = "") -> int:
        """What `packtrain run` does, from the check to the last stage."""
        order = self.order(*overrides, start=start)
        require_resumable(order, resume or bool(start))
        with order.run.open() as lock:
            discard(order)
            return run_steps(order, lock)

    @property
    def finished(self) -> list[str]:
        """Stages that ran to their end, in order."""
        return (self.folder / "run" / "order.txt").read_text().split()


@pytest.fixture
def trail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trail:
    """A trail whose stage modules can be found by the child processes."""
    monkeypatch.chdir(tmp_path)
    return Trail(tmp_path)


def test_the_tiny_recipe_has_thirteen_steps_in_the_order_of_the_trail() -> None:
    recipe = TINY
    assert [step.title for step in steps_of(load_recipe(recipe))] == [
        *("herd", "evaluate base", "prune", "sft", "evaluate sft", "mine", "rl", "evaluate rl"),
        *("dpo", "evaluate dpo", "targets", "taught", "evaluate taught"),
    ]


def test_without_a_herd_the_base_is_evaluated_first(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: x\nsft: {}\nevaluate: {}\n")
    assert [step.folder for step in steps_of(load_recipe(path))] == [
        *("base/evaluation", "sft", "sft/evaluation")
    ]


def test_a_word_that_is_no_truth_value_turns_no_arm_on_or_off(tmp_path: Path) -> None:
    """YAML's own `true` alone: one reading of the key, whoever asks."""
    path = tmp_path / "r.yaml"
    for word in ("yes", "1", "'true'"):
        path.write_text(f"name: x\ntargets: {{}}\nsft: {{distill: {{as_arm: {word}}}}}\n")
        with pytest.raises(RecipeError, match=r"sft\.distill\.as_arm must be true or false"):
            read_recipe(load_recipe(path))


def test_an_arm_is_made_behind_its_stage_and_evaluated(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    sections = "targets: {}\nsft: {distill: {as_arm: true}}\nrl: {}\nevaluate: {}\n"
    path.write_text(f"name: x\n{sections}")
    steps = steps_of(load_recipe(path))
    assert [step.folder for step in steps] == [
        *("base/evaluation", "sft", "sft/evaluation", "rl", "rl/evaluation"),
        *("targets", "taught", "taught/evaluation"),
    ]
    arm, after = steps[-2:]
    assert start_of(arm, ["sft"]) == "taught" and folders_from("taught") == ("taught",)
    assert folders_from("targets", ["taught"]) == ("targets", "taught")
    assert folders_from("targets")[:3] == ("targets", "sft", "taught")
    assert start_of(after, ["stage taught"]) == "evaluate"
    assert launch_line(arm, path, Path("runs/x"), [])[1:] == [
        *("-m", "sft.train", str(path), "--as", "taught", "--run", "runs/x")
    ]
    for step, launched in ((arm, True), (after, False)):
        line = launch_line(step, path, Path("runs/x"), [], Path("ddp.yaml"))
        assert ("accelerate.commands.launch" in line) is launched
    path.write_text("name: x\ntargets: {}\nsft: {distill: {}}\n")
    assert [step.title for step in steps_of(load_recipe(path))] == ["targets", "sft"]


def test_a_recipe_without_stages_is_refused(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("name: x\n")
    with pytest.raises(RecipeError, match="needs at least one stage"):
        steps_of(load_recipe(tmp_path / "r.yaml"))


def test_the_launch_line_can_be_typed_again() -> None:
    step = Step("evaluate sft", "sft/evaluation", "rollout.evaluate", ("--of", "sft"))
    line = launch_line(step, Path("r.yaml"), Path("runs/x"), ["rl.steps=3", "--resume"])
    assert line[1:] == [
        *("-m", "rollout.evaluate", "r.yaml", "--of", "sft", "--run", "runs/x"),
        *("rl.steps=3", "--resume"),
    ]
    sft = launch_line(Step("sft", "sft", "sft.train"), Path("r"), Path("d"), [], Path("zero3.yaml"))
    assert sft[1:5] == ["-m", "accelerate.commands.launch", "--config_file", "zero3.yaml"]


def test_a_launcher_s_1_becomes_the_stage_s_own_code_and_no_other_does(tmp_path: Path) -> None:
    told = tmp_path / "sft.exit"
    for written, ended, code in (
        ("4", 1, 4),
        ("0", 1, 1),
        ("5", 137, 137),
        ("0", 0, 0),
        ("x", 1, 1),
    ):
        told.write_text(written)
        assert told_end(told, ended) == (code, "")
    told.unlink(missing_ok=True)
    assert told_end(told, 1) == (1, "")


@pytest.mark.parametrize(
    ("first", "second", "told"),
    [
        ("143\nwas interrupted", "3\nbad row", (3, "rank 1: bad row")),
        ("6\nanother rank is gone", "3\nbad row", (3, "rank 1: bad row")),
        ("143\nwas interrupted", "6\nanother is gone", (6, "rank 1: another is gone")),
        ("5\nloss is nan", "5\nloss is nan", (5, "")),
        ("5\nloss is nan", "143\nwas interrupted", (5, "")),
        ("143\nwas interrupted", "143\nwas interrupted", (143, "")),
        ("", "3\nbad row", (3, "rank 1: bad row")),
    ],
)
def test_the_rank_that_failed_is_heard_above_those_that_were_ended_for_it(
    first: str, second: str, told: tuple[int, str], tmp_path: Path
) -> None:
    path = tmp_path / "sft.exit"
    path.write_text(first)
    exit_file(path, 1).write_text(second)
    assert told_end(path, 1) == told
    assert not list(tmp_path.iterdir())


def test_when_we_have_stopped_a_stage_its_ranks_losing_each_other_says_nothing(
    tmp_path: Path,
) -> None:
    path = tmp_path / "sft.exit"
    path.write_text("143\nwas interrupted")
    exit_file(path, 1).write_text("6\nanother rank is gone")
    assert told_end(path, 1, is_stopped=True) == (143, "")


def test_the_line_to_go_on_with_keeps_every_word(trail: Trail) -> None:
    order = replace(trail.order("sft.wait=1"), accelerate=Path("zero3.yaml"))
    assert order.again == (
        f"packtrain run {trail.recipe} sft.wait=1 --run {trail.folder / 'run'} "
        "--accelerate zero3.yaml --resume"
    )


def test_stages_run_in_order_once(trail: Trail, capfd: pytest.CaptureFixture[str]) -> None:
    assert trail.run() == 0
    assert trail.finished == ["sft", "dpo"]
    shown = capfd.readouterr().out
    assert "[1/2] python" in shown and "-m stage_sft" in shown
    assert "stage=sft step=1 total=2 reward=0.5" in shown
    assert trail.run() == 0
    assert "nothing to do: all 2 steps" in capfd.readouterr().out
    assert trail.finished == ["sft", "dpo"]


def test_a_failure_ends_the_run_with_its_code_and_says_how_to_go_on(
    trail: Trail, capfd: pytest.CaptureFixture[str]
) -> None:
    assert trail.run("dpo.fail=true") == 3
    shown = capfd.readouterr().err
    assert "rows.jsonl:7: answer is null" in shown
    assert "step 'dpo' failed (exit code 3)" in shown
    assert f"packtrain run {trail.recipe} dpo.fail=true --run" in shown
    status = read_status(trail.folder / "run")
    assert [(s.name, s.state) for s in status.stages] == [("sft", "done"), ("dpo", "failed")]
    assert status.stages[1].problem == "ended with exit code 3"
    with pytest.raises(SetupError, match="half finished: 1 of 2 steps are done"):
        trail.run("dpo.fail=true")
    with pytest.raises(SetupError, match="half finished"):
        trail.run()


def test_bare_output_of_a_stage_is_kept_without_secrets(
    trail: Trail, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a terminal, where the panel has the screen and the stages' output goes to a file."""
    stage = trail.folder / "stage_sft.py"
    told = 'print("token hf_abcdefghijklmnopqrst", file=sys.stderr, flush=True); os.abort()\n    '
    stage.write_text(stage.read_text().replace("    if stage.section.fail", f"    {told}if 0"))
    console = Console(file=(trail.folder / "screen").open("w"), force_terminal=True)
    monkeypatch.setattr(runner, "open_panel", lambda run, steps: LivePanel(run, steps, console))
    assert trail.run() == 134
    assert "token [redacted]" in (trail.folder / "run" / "log" / "sft.out").read_text()
    assert "| token [redacted]" in capfd.readouterr().err


def test_resuming_goes_on_behind_what_is_done(trail: Trail) -> None:
    assert trail.run("dpo.crash=true") == 134
    assert trail.run("dpo.crash=true", resume=True) == 134
    assert trail.finished == ["sft"]


def test_a_finished_stage_with_other_settings_is_refused(trail: Trail) -> None:
    assert trail.run() == 0
    with pytest.raises(SetupError, match=r"sft is finished, with other settings \(changed: sft\)"):
        trail.run("sft.wait=0.01")
    assert trail.run("sft.wait=0.01", start="herd") == 0
    assert trail.finished == ["sft", "dpo", "sft", "dpo"]


def test_one_stage_and_what_follows_is_made_again_with_the_line_that_is_printed(
    trail: Trail, capfd: pytest.CaptureFixture[str]
) -> None:
    assert trail.run() == 0
    with pytest.raises(SetupError) as caught:
        trail.run("dpo.wait=0.01")
    line = f"packtrain run {trail.recipe} dpo.wait=0.01 --run {trail.folder / 'run'} --from dpo"
    assert caught.value.fix.endswith(f"or make it and what follows again:\n    {line}")
    capfd.readouterr()
    assert trail.run("dpo.wait=0.01", start="dpo") == 0
    assert f"deleting {trail.folder / 'run' / 'dpo'}\n" in capfd.readouterr().out
    assert trail.finished == ["sft", "dpo", "dpo"]
    before = sorted(os.listdir(trail.folder / "run" / "dpo"))
    with pytest.raises(SetupError, match=r"stage sft is finished, with other settings"):
        trail.run("sft.wait=0.02", start="dpo")
    assert sorted(os.listdir(trail.folder / "run" / "dpo")) == before, "refused: nothing is gone"


def test_a_mended_setting_goes_on_where_the_stage_refused_the_old_one(
    trail: Trail, capfd: pytest.CaptureFixture[str]
) -> None:
    assert trail.run("dpo.fail=true") == 3
    assert "--resume" in capfd.readouterr().err
    assert trail.run("dpo.fail=false", resume=True) == 0
    assert trail.finished == ["sft", "dpo"]


def test_a_begun_stage_that_kept_something_is_given_up_by_the_line_that_is_printed(
    trail: Trail,
) -> None:
    assert trail.run("dpo.fail=true") == 3
    kept = trail.folder / "run" / "dpo" / "checkpoints" / "step_000001"
    kept.mkdir(parents=True)
    (kept / "manifest.json").write_text("{}")
    with pytest.raises(SetupError, match="dpo was started with other settings") as caught:
        trail.run(resume=True)
    line = f"packtrain run {trail.recipe} --run {trail.folder / 'run'} --from dpo"
    assert caught.value.fix.endswith(f"\n    {line}")
    assert trail.run(start="dpo") == 0
    assert trail.finished == ["sft", "dpo"]


@pytest.mark.parametrize(
    ("folder", "changes", "start"),
    [
        ("base/evaluation", ["evaluate"], "evaluate"),
        ("base/evaluation", ["evaluate", "seed"], "base"),
        ("sft/evaluation", ["evaluate"], "evaluate"),
        ("rl", ["rl"], "rl"),
    ],
)
def test_where_to_begin_again(folder: str, changes: list[str], start: str) -> None:
    module = "rollout.evaluate" if folder.endswith("evaluation") else "rl.train"
    assert start_of(Step("x", folder, module), changes) == start


def test_what_from_discards() -> None:
    assert folders_from("mine") == ("mine", "rl", "dpo")
    assert folders_from("base") == (
        "base/evaluation",
        "prune",
        "targets",
        *("sft", "taught"),
        *folders_from("mine"),
    )
    assert folders_from("herd") == ("herd", *folders_from("base"))
    assert folders_from("evaluate") == tuple(
        f"{p}/evaluation" for p in ("base", "sft", "taught", "rl", "dpo")
    )


def test_what_only_an_arm_reads_is_made_again_alone_and_costs_no_report(
    trail: Trail, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`--from targets` where the arm alone reads them, and a failure of theirs."""
    trail.recipe.write_text("name: small\ntargets: {}\nsft: {distill: {as_arm: true}}\n")
    (trail.folder / "stage_targets.py").write_text(STAGE.replace("NAME", "targets"))
    steps = [Step(name, name, f"stage_{name}") for name in ("sft", "targets")]
    steps.append(Step("taught", "taught", "stage_sft", ("--as", "taught")))
    monkeypatch.setattr(runner, "steps_of", lambda document: steps)
    monkeypatch.setattr(runner, "read_recipe", lambda document: document.head())
    monkeypatch.setattr(runner, "check_runnable", lambda document, recipe: None)
    run = trail.folder / "run"
    assert runner.run_recipe(load_recipe(trail.recipe), runner.Wish(run)) == 0
    made = {name: (run / name / "manifest.json").stat().st_mtime_ns for name in ("sft", "taught")}
    (run / "report.html").unlink()
    again = runner.Wish(run, start="targets")
    assert runner.run_recipe(load_recipe(trail.recipe, ["targets.fail=true"]), again) == 3
    assert not (run / "taught").exists() and (run / "report.html").exists()
    assert runner.run_recipe(load_recipe(trail.recipe), again) == 0
    now = {name: (run / name / "manifest.json").stat().st_mtime_ns for name in ("sft", "taught")}
    assert now["sft"] == made["sft"] and now["taught"] > made["taught"]
    assert trail.finished == ["sft", "targets", "sft", "targets", "sft"]


def test_a_stage_made_again_makes_those_after_it_out_of_date(trail: Trail) -> None:
    assert trail.run() == 0
    again = ["stage_sft.py", "recipe.yaml", "--run", "run", "--overwrite"]
    assert subprocess.run([sys.executable, *again], timeout=60).returncode == 0
    assert trail.run() == 0, "the same came out"
    stage = trail.folder / "stage_sft.py"
    stage.write_text(stage.read_text().replace("    return", MADE + "    return"))
    assert subprocess.run([sys.executable, *again], timeout=60).returncode == 0
    with pytest.raises(SetupError, match=r"dpo is finished, with other .*changed: stage sft\)"):
        trail.run()


def test_overwriting_removes_what_any_stage_left_and_nothing_else(
    trail: Trail, capsys: pytest.CaptureFixture[str]
) -> None:
    order = trail.order(start="herd")
    with order.run.open():
        pass
    for name in ("prune", "sft", "rl", "base/evaluation"):
        order.run.begin(name, {}, resume=False, overwrite=False)
    own = order.run.path / "mine" / "thesis.txt"
    own.parent.mkdir()
    own.write_text("years of work")
    discard(order)
    shown = capsys.readouterr().out
    assert sorted(os.listdir(order.run.path)) == [
        *("lock", "lock.json", "log", "mine", "packtrain.run")
    ]
    assert own.read_text() == "years of work"
    gone = (order.run.path / name for name in ("rl", "sft", "prune", "base/evaluation"))
    assert shown == f"deleting {', '.join(map(str, gone))}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nsft: {}\n", "sft needs model.path\n  sft needs data.sft"),
        ("name: x\nherd: {}\nrewards: [gone.py]\n", r"rewards names .*gone\.py, which is not a"),
        ("name: x\nprune: {engine: {kind: sglang}}\n", r"kind must be .*got 'sglang'"),
        ("name: x\nevaluate: {engine: {kind: sglang}}\n", r"kind must be .*got 'sglang'"),
    ],
)
def test_what_cannot_work_is_refused_before_the_run_is_made(
    trail: Trail, text: str, message: str
) -> None:
    trail.recipe.write_text(text)
    with pytest.raises(RecipeError, match=message):
        command(parse(["run", "recipe.yaml"]))
    assert not (trail.folder / "runs").exists()


def test_a_second_run_is_refused_with_pid_and_age(trail: Trail) -> None:
    run = trail.folder / "run"
    with RunDir(run).open():
        pass
    held = (
        "import sys, time; from pathlib import Path; from ground.lock import RunLock\n"
        f"lock = RunLock.acquire(Path({str(run)!r})); print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", held], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        try:
            with pytest.raises(SetupError, match=rf"held by pid {holder.pid} on .*, started \d+ s"):
                trail.run()
        finally:
            holder.kill()
    assert trail.run() == 0


def test_the_killed_command_lets_its_stage_end_and_can_be_resumed(trail: Trail) -> None:
    code = (
        "from pathlib import Path; import sys; sys.path.insert(0, sys.argv[1])\n"
        "from test_packtrain_runner import Trail\n"
        "sys.exit(Trail(Path(sys.argv[2])).run('dpo.wait=60'))"
    )
    line = [sys.executable, "-c", code, str(Path(__file__).parent), str(trail.folder)]
    note = trail.folder / "run" / "dpo" / "progress.json"
    with subprocess.Popen(line, stdout=subprocess.DEVNULL) as command:
        deadline = time.monotonic() + 60
        while not note.exists():
            assert time.monotonic() < deadline and command.poll() is None
            time.sleep(0.05)
        assert read_status(trail.folder / "run").stages[1].state == "running"
        os.kill(command.pid, signal.SIGKILL)
    assert json.loads(note.read_text())["step"] == 1
    assert read_status(trail.folder / "run").stages[1].state == "failed"
    with RunLock.acquire(
        trail.folder / "run"
    ):  # waits until the stage, told by the kernel, is gone
        pass
    assert "interrupted" in (trail.folder / "run" / "log" / "dpo.log").read_text()
    assert trail.order().run.state("dpo") == "unfinished"


def test_an_interrupted_run_returns_130_and_says_how_to_go_on(
    trail: Trail, capfd: pytest.CaptureFixture[str]
) -> None:
    pid, note = os.getpid(), trail.folder / "run" / "sft" / "progress.json"
    watcher = (
        "import os, signal, sys, time\n"
        f"while not os.path.exists({str(note)!r}): time.sleep(0.05)\n"
        f"os.kill({pid}, signal.SIGINT)"
    )
    with subprocess.Popen([sys.executable, "-c", watcher]):
        assert trail.run("sft.wait=60") == 130
    shown = capfd.readouterr().err
    assert "step 'sft' was stopped (SIGINT)" in shown
    assert "--resume" in shown


def test_replicas_that_this_machine_has_no_processors_for_are_refused_before_any_stage(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not hours later, when their stage begins; a cluster is asked when it is joined."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    recipe = read_recipe(load_recipe(TINY, ["mine.replicas=4096", "evaluate.replicas=1"]))
    with pytest.raises(PlacementError, match="they want 4096 processors") as caught:
        require_processors(recipe)
    assert "lower mine.replicas" in caught.value.fix
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.7:6379")
    require_processors(recipe)
