"""How a stage starts and ends: exit codes, one clear message, signals, ranks, nothing lost."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from launching import free_port, rank_environment

from ground.config import Section
from ground.entry import Stage, stage_entry
from ground.errors import (
    DataError,
    DivergedError,
    InfraError,
    PacktrainError,
    RecipeError,
    SetupError,
    WorkersLostError,
)
from ground.lock import RunLock
from ground.metrics import read_metrics
from ground.roll import Roll
from ground.run import RunDir
from ground.signals import Interrupted, held_signals, install_signals
from ground.sinks import Sink

SECRET = "hf_abcdefghijklmnopqrstuvwx"


class SftSection(Section):
    epochs: int = 1


def train(stage: Stage[SftSection]) -> dict[str, object]:
    """A stage that writes one file and one number."""
    stage.metrics.log(1, {"loss": 0.5})
    (stage.directory / "weights").write_text(f"epochs {stage.section.epochs}")
    return {"epochs": stage.section.epochs, "resumed": stage.resume}


def failing(error: BaseException) -> Callable[[Stage[SftSection]], dict[str, object]]:
    def function(stage: Stage[SftSection]) -> dict[str, object]:
        (stage.directory / "half").write_text("x")
        raise error

    return function


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A current directory with a recipe in it; signal handlers and log handlers come back."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.yaml").write_text("name: demo\nsft: {epochs: 2}\n")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    before = logging.getLogger().handlers[:]
    factory = logging.getLogRecordFactory()
    yield tmp_path
    for number, handler in handlers.items():
        signal.signal(number, handler)
    logging.setLogRecordFactory(factory)
    logging.getLogger().handlers[:] = before


def enter(*arguments: str, function: Callable[..., dict[str, object]] = train) -> int:
    return stage_entry("sft", SftSection, function, ["recipe.yaml", *arguments])


def test_a_stage_runs_to_its_manifest_and_a_second_call_has_nothing_to_do(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert enter("sft.epochs=3") == 0
    run = RunDir(place / "runs" / "demo")
    assert run.manifest("sft").facts["summary"] == {"epochs": 3, "resumed": False}
    assert (run.stage("sft") / "weights").read_text() == "epochs 3"
    assert [record["loss"] for record in read_metrics(run.stage("sft") / "metrics.jsonl")] == [0.5]
    assert (run.path / "log" / "sft.log").is_file()
    assert capsys.readouterr().err == ""
    written = (run.stage("sft") / "manifest.json").stat().st_mtime_ns
    assert enter("sft.epochs=3") == 0
    assert capsys.readouterr().err == "packtrain: sft is finished already; nothing to do\n"
    assert (run.stage("sft") / "manifest.json").stat().st_mtime_ns == written


def test_other_settings_are_refused_and_overwrite_makes_the_stage_again(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert enter() == 0
    assert enter("seed=5") == 4
    assert capsys.readouterr().err == (
        "packtrain: runs/demo/sft: stage sft is finished, with other settings (changed: seed)\n"
        "  fix: make it again with --overwrite, undo the change, or use another --run\n"
    )
    assert enter("seed=5", "--overwrite") == 0
    assert enter("seed=5", "--run", "elsewhere") == 0
    assert RunDir(place / "elsewhere").is_done("sft")


def test_trackers_tell_an_arm_from_its_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    """As runs of one project; their metrics have the same keys."""
    names: list[str] = []

    def opened(wanted: list[str], directory: Path, run_name: str) -> list[Sink]:
        names.append(f"{directory.name} as {run_name}")
        return []

    monkeypatch.setattr("ground.entry.open_sinks", opened)

    class Distilled(SftSection):
        distill: object = None

    arm = ("sft.distill={as_arm: true}", "--as", "taught")
    for arguments in ((), arm):
        line = ["recipe.yaml", *arguments]
        assert stage_entry("sft", Distilled, train, line) == 0
    assert names == ["sft as demo/sft", "taught as demo/taught"]


def test_what_a_stage_s_own_processes_wrote_is_kept_without_secrets(place: Path) -> None:
    def learn(stage: Stage[SftSection]) -> dict[str, object]:
        (stage.run.path / "log" / "sft.learner.err").write_text(f"token {SECRET} used\n")
        raise InfraError("the learner is gone")

    assert enter(function=learn) == 6
    assert (place / "runs/demo/log/sft.learner.err").read_text() == "token [redacted] used\n"


def test_what_a_herd_makes_is_not_named_beside_it(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert enter("herd={}", "data.sft=rows.jsonl", "model.path=base") == 2
    assert capsys.readouterr().err == (
        "packtrain: recipe.yaml: model stands beside herd, which makes its own: "
        "leave one of the two out\n"
        "  data.sft stands beside herd, which makes its own: leave one of the two out\n"
    )
    assert not (place / "runs").exists()


ERRORS: list[tuple[PacktrainError, int]] = [
    (RecipeError("x"), 2),
    (DataError("x"), 3),
    (SetupError("x"), 4),
    (DivergedError("x"), 5),
    (WorkersLostError("x"), 6),
    (InfraError("x"), 6),
]


@pytest.mark.parametrize(("error", "code"), ERRORS, ids=[type(e).__name__ for e, _ in ERRORS])
def test_each_error_has_its_exit_code_and_is_said_once(
    error: PacktrainError, code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    error.where, error.fix = "data.jsonl:3", "mend it"
    assert enter(function=failing(error)) == code
    assert capfd.readouterr().err == "packtrain: data.jsonl:3: x\n  fix: mend it\n"


def test_a_full_disk_in_the_middle_of_a_stage_is_no_defect(
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert enter(function=failing(OSError(errno.ENOSPC, "No space left on device"))) == 4
    said = capfd.readouterr().err
    assert said.startswith("packtrain: runs/demo/sft: the disk is full (")
    assert said.endswith("fix: free some space and continue with --resume\n")
    assert enter(function=failing(FileExistsError(errno.EEXIST, "exists", "runs/demo"))) == 4
    assert enter("--overwrite", function=failing(FileExistsError(errno.EEXIST, "", "runs"))) == 1


def test_a_defect_gives_its_traceback_without_secrets_and_the_stage_stays_resumable(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert enter(function=failing(ValueError(f"bad token {SECRET}"))) == 1
    said = capfd.readouterr().err
    assert said.startswith("packtrain: sft failed by a defect of packtrain:\nTraceback")
    assert said.count("ValueError: bad token [redacted]") == 1
    log = (place / "runs" / "demo" / "log" / "sft.log").read_text()
    assert "Traceback" in log and SECRET not in log + said
    assert enter() == 4
    assert "was started and not finished" in capfd.readouterr().err
    assert enter("--resume") == 0
    facts = RunDir(place / "runs" / "demo").manifest("sft").facts
    assert facts["summary"] == {"epochs": 2, "resumed": True}


def test_recipe_errors_of_head_and_section_come_at_once_and_make_no_run(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "recipe.yaml").write_text("name: demo\nsede: 1\nsft: {epoch: 2}\n")
    assert enter("sft.epochs=many") == 2
    assert capsys.readouterr().err == (
        "packtrain: override 1 (sft.epochs=…): sft.epochs must be a whole number, got 'many'\n"
        "recipe.yaml:2: sede is not a key; did you mean 'seed'?\n"
        "recipe.yaml:3: sft.epoch is not a key; did you mean 'epochs'?\n"
    )
    assert not (place / "runs").exists()


def test_an_earlier_stage_that_is_on_and_not_finished_is_warned_of(
    place: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (place / "recipe.yaml").write_text("name: demo\nprune: {}\nsft: {}\nrl: {}\n")
    assert enter() == 0
    assert "sft goes without prune, which is not finished" in capfd.readouterr().err


def test_a_locked_run_is_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert enter() == 0
    with RunLock.acquire(place / "runs" / "demo", {}) as lock:
        assert enter("seed=2", "--overwrite") == 4
        assert f"the run is held by pid {os.getpid()}" in capsys.readouterr().err
        assert enter() == 4
        os.environ.update(lock.environment)
        try:
            assert enter() == 0
        finally:
            del os.environ["PACKTRAIN_RUN_TOKEN"]


def test_evaluations_live_beside_their_model_and_start_afresh(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "recipe.yaml").write_text("name: demo\nsft: {}\nevaluate: {epochs: 2}\n")

    def evaluate(stage: Stage[SftSection]) -> dict[str, object]:
        assert not (stage.directory / "half").exists()
        (stage.directory / "evaluation.json").write_text("{}")
        return {"of": stage.of}

    def run_it(function: Callable[..., dict[str, object]]) -> int:
        return stage_entry("evaluate", SftSection, function, ["recipe.yaml", "--of", "sft"])

    assert enter() == 0
    assert run_it(failing(DataError("x"))) == 3
    assert run_it(evaluate) == 0
    run = RunDir(place / "runs" / "demo")
    assert run.manifest("sft/evaluation").facts["summary"] == {"of": "sft"}
    assert list(run.manifest("sft/evaluation").files) == ["evaluation.json"]
    assert run.is_done("sft")
    assert (run.path / "log" / "sft.evaluation.log").is_file()
    with pytest.raises(SystemExit) as caught:
        stage_entry("evaluate", SftSection, evaluate, ["recipe.yaml", "--of", "mine"])
    assert caught.value.code == 2


def test_other_ranks_work_without_lock_manifest_or_voice(
    place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDir(place / "runs" / "demo")
    seen: list[tuple[Path, bool]] = []

    def work(stage: Stage[SftSection]) -> dict[str, object]:
        stage.metrics.log(1, {"loss": 1.0})
        seen.append((stage.directory, stage.incarnation == 1))
        return {}

    def as_rank_1(stage: Stage[SftSection]) -> dict[str, object]:
        """Rank 0's own work, in the middle of which another rank comes and goes."""
        monkeypatch.setenv("RANK", "1")
        assert enter(function=work) == 0
        assert enter(function=failing(DataError("x"))) == 3
        monkeypatch.setenv("RANK", "0")
        assert run.state("sft") == "unfinished"
        (stage.directory / "half").unlink()
        return train(stage)

    for name, value in rank_environment("ddp", 0, free_port()).items():
        monkeypatch.setenv(name, value)
    holder = Roll(os.environ)  # as the launcher does, which outlives every rank
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    assert enter(function=as_rank_1) == 0
    assert seen == [(run.stage("sft").relative_to(place), True)]
    assert capsys.readouterr().err == ""
    assert list(run.manifest("sft").files) == ["weights"]
    assert (run.path / "log" / "sft.rank1.log").is_file()
    monkeypatch.setenv("RANK", "1")
    assert enter(function=work) == 0 and len(seen) == 1
    assert holder.heard("sft/verdict") == "stop"


# --- signals ----------------------------------------------------------------------------------

PROGRAM = """
import sys, time, os
from ground.config import Section
from ground.entry import stage_entry
from ground.signals import held_signals

class SftSection(Section):
    epochs: int = 1
    mode: str = "plain"

def train(stage):
    (stage.directory / "pid").write_text(str(os.getpid()))
    if stage.section.mode == "held":
        with held_signals() as pending:
            print("ready", flush=True)
            while not pending.requested:
                time.sleep(0.01)
            (stage.directory / "saved").write_text("after the step")
    elif stage.section.mode == "stubborn":
        for turn in range(9):
            try:
                if not turn:
                    print("ready", flush=True)
                time.sleep(60)
            except BaseException:
                print("saving", flush=True)
    else:
        print("ready", flush=True)
        time.sleep(60)
    return {}

sys.exit(stage_entry("sft", SftSection, train))
"""


def start(place: Path, mode: str) -> subprocess.Popen[str]:
    (place / "stage.py").write_text(PROGRAM)
    process = subprocess.Popen(
        [sys.executable, "stage.py", "recipe.yaml", f"sft.mode={mode}"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=place,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [(signal.SIGTERM, 143, "SIGTERM"), (signal.SIGINT, 130, "SIGINT")],
)
def test_a_signal_ends_the_stage_resumably(place: Path, number: int, code: int, name: str) -> None:
    process = start(place, "plain")
    process.send_signal(number)
    _, said = process.communicate(timeout=30)
    assert process.returncode == code
    assert said == f"packtrain: sft was interrupted ({name}); continue it with --resume\n"
    run = RunDir(place / "runs" / "demo")
    assert run.state("sft") == "unfinished"
    RunLock.acquire(run.path, {}).release()


def test_a_held_signal_lets_the_step_be_saved_first(place: Path) -> None:
    process = start(place, "held")
    process.terminate()
    process.communicate(timeout=30)
    assert process.returncode == 143
    assert (place / "runs" / "demo" / "sft" / "saved").read_text() == "after the step"


def test_a_second_signal_leaves_at_once(place: Path) -> None:
    process = start(place, "stubborn")
    process.terminate()
    assert process.stdout is not None and process.stdout.readline() == "saving\n"
    process.terminate()
    process.communicate(timeout=10)
    assert process.returncode == 143


def test_kill_9_leaves_a_run_that_the_next_call_can_resume(place: Path) -> None:
    process = start(place, "plain")
    process.kill()
    process.communicate(timeout=30)
    assert enter("sft.mode=plain") == 2, "mode is no key of this section"
    section_keys = json.loads((place / "runs/demo/sft/started.json").read_text())["settings"]
    assert sorted(section_keys) == ["sft"]
    assert enter() == 4
    assert enter("--overwrite") == 0


def test_handlers_can_be_put_back_after_a_library_took_them() -> None:
    install_signals()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    install_signals()
    with pytest.raises(Interrupted) as caught:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    assert caught.value.exit_code == 143


def test_held_signals_give_the_handlers_back() -> None:
    install_signals()
    before = signal.getsignal(signal.SIGTERM)
    with held_signals() as pending:
        assert signal.getsignal(signal.SIGTERM) != before
    assert not pending.requested
    assert signal.getsignal(signal.SIGTERM) == before
    with pytest.raises(Interrupted), held_signals() as pending:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        assert pending.requested
