"""Run directories: one writer at a time; stages absent, unfinished or done; nothing lost."""

from __future__ import annotations

import functools
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from crashpoints import crash_at_each_call, old_then_new

from ground import lock as lock_module
from ground import provenance
from ground import run as run_module
from ground.config import Section
from ground.entry import stage_entry
from ground.errors import DataError, SetupError
from ground.lock import TOKEN, RunLock, is_held, read_holder
from ground.metrics import Metrics, read_metrics
from ground.provenance import changed, folder_fingerprint, stage_settings
from ground.recipe import RecipeDocument, load_recipe
from ground.run import RunDir, is_run
from ground.storage import verify_directory

HOLD = """
import sys, time
from pathlib import Path
from ground.lock import RunLock
lock = RunLock.acquire(Path(sys.argv[1]))
print(lock.incarnation, lock.is_guest, flush=True)
time.sleep(60)
"""


def document(folder: Path, text: str = "name: t\nsft: {epochs: 1}\n") -> RecipeDocument:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return load_recipe(path)


def finished(run: RunDir, stage: str = "sft", text: str = "old", **settings: str) -> None:
    """Let a stage run to its end, writing one file."""
    settings = settings or {"sft": "1"}
    assert run.begin(stage, settings, resume=False, overwrite=True)
    (run.stage(stage) / "weights").write_text(text)
    run.finish(stage, settings, {"loss": 0.5})


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    (tmp_path / "run").mkdir()
    return RunDir(tmp_path / "run")


# --- the lock ---------------------------------------------------------------------------------


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of tmp_path."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "1 False\n"
    yield process
    process.kill()
    process.wait(timeout=10)


def test_a_second_run_is_refused_with_pid_host_and_age(
    tmp_path: Path, holder: subprocess.Popen[str]
) -> None:
    began = time.monotonic()
    with pytest.raises(SetupError) as caught:
        RunLock.acquire(tmp_path, {})
    assert time.monotonic() - began < 5
    assert caught.value.exit_code == 4
    host = os.uname().nodename
    assert caught.value.what.startswith(f"the run is held by pid {holder.pid} on {host}, started ")
    assert caught.value.what.endswith(" s ago")
    assert is_held(tmp_path)


def test_kill_9_of_the_holder_frees_the_lock(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait(timeout=10)
    with RunLock.acquire(tmp_path, {}) as lock:
        assert (lock.incarnation, lock.is_guest) == (2, False)
        assert read_holder(tmp_path) == lock.holder
    assert not (is_held(tmp_path) and read_holder(tmp_path) != lock.holder)


def test_a_child_with_the_token_is_let_in_and_one_with_another_is_not(tmp_path: Path) -> None:
    with RunLock.acquire(tmp_path, {}) as lock:
        command = [sys.executable, "-c", HOLD.replace("time.sleep(60)", ""), str(tmp_path)]
        environment = os.environ | lock.environment
        child = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
        assert child.stdout == "1 True\n"
        with pytest.raises(SetupError, match="the run is held by pid"):
            RunLock.acquire(tmp_path, {TOKEN: "0" * 32})
    with RunLock.acquire(tmp_path, {TOKEN: lock.holder.token}) as late:
        assert (late.incarnation, late.is_guest) == (2, False)


def test_a_child_that_outlives_the_killed_holder_keeps_the_lock_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent = (
        "import os, subprocess, sys\nfrom pathlib import Path\nfrom ground.lock import RunLock\n"
        "lock = RunLock.acquire(Path(sys.argv[1]))\n"
        "child = subprocess.Popen(['sleep', '60'], pass_fds=[lock.fileno()], "
        "stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\n"
        "print(child.pid, flush=True)\nos.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", parent, str(tmp_path)], capture_output=True, text=True, timeout=60
    )
    child = int(done.stdout)
    monkeypatch.setattr(lock_module, "GRACE_SECONDS", 0.3)
    try:
        with pytest.raises(SetupError) as caught:
            RunLock.acquire(tmp_path, {})
        assert "that process is gone, its children still run" in caught.value.what
        assert caught.value.what.endswith(f": pid {child}")
        monkeypatch.setattr(lock_module, "GRACE_SECONDS", 30)
    finally:
        os.kill(child, signal.SIGKILL)
    with RunLock.acquire(tmp_path, {}) as lock:
        assert lock.incarnation == 2


def test_a_waiter_that_loses_to_another_names_the_winner(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunLock.acquire(tmp_path, {}) as lock:
        winner = lock.holder
        gone = replace(winner, pid=2**22 + 1, token="0")
        (tmp_path / "lock.json").write_text(json.dumps(asdict(gone)))

        def meanwhile(_: float) -> None:
            (tmp_path / "lock.json").write_text(json.dumps(asdict(winner)))

        monkeypatch.setattr(lock_module.time, "sleep", meanwhile)
        with pytest.raises(SetupError, match=rf"the run is held by pid {winner.pid} on"):
            RunLock.acquire(tmp_path, {})


def test_a_waiter_that_wins_counts_on_from_the_last_holder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = RunLock.acquire(tmp_path, {})
    gone = replace(lock.holder, pid=2**22 + 1)
    (tmp_path / "lock.json").write_text(json.dumps(asdict(gone)))

    def meanwhile(_: float) -> None:
        (tmp_path / "lock.json").write_text(json.dumps(asdict(replace(gone, incarnation=4))))
        lock.release()

    monkeypatch.setattr(lock_module.time, "sleep", meanwhile)
    with RunLock.acquire(tmp_path, {}) as later:
        assert later.incarnation == 5


def test_crash_points_of_taking_the_lock(ram_path: Path) -> None:
    def take(place: Path) -> None:
        RunLock.acquire(place, {}).release()

    def read(place: Path) -> int:
        holder = read_holder(place)
        return holder.incarnation if holder else 0

    seen = [
        value
        for _, value in crash_at_each_call(ram_path, lambda place: None, take, read, rerun=False)
    ]
    assert seen == sorted(seen) and set(seen) == {0, 1}
    take(ram_path / "k001")
    assert [read(ram_path / name) for name in ("k001", "k002")] == [1, 0]


# --- the directory ----------------------------------------------------------------------------


def test_opening_makes_a_private_directory_with_recipe_and_environment(tmp_path: Path) -> None:
    run = RunDir(tmp_path / "runs" / "t")
    with run.open() as lock:
        assert lock.incarnation == 1
        run.describe(document(tmp_path))
    assert stat.S_IMODE(run.path.stat().st_mode) == 0o700
    assert (run.path / "recipe.yaml").read_text() == "name: t\nsft: {epochs: 1}\n"
    assert "epochs: 1" in (run.path / "recipe.resolved.yaml").read_text()
    environment = json.loads((run.path / "env.json").read_text())
    assert environment["libraries"]["pydantic"].startswith("2.")
    assert set(environment) == {"python", "platform", "host", "cpus", "memory_bytes", "libraries"}


def test_a_run_in_rays_copy_of_a_jobs_folder_is_refused(tmp_path: Path) -> None:
    copy = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    copy.mkdir(parents=True)
    with pytest.raises(SetupError, match="which Ray removes") as refused, RunDir(copy / "r").open():
        pass
    assert "--run /" in str(refused.value)
    assert list(copy.iterdir()) == [], "nothing was made"


def test_somebody_elses_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "thesis.tex").write_text("x")
    with (
        pytest.raises(SetupError, match="is not empty and is not a run of packtrain"),
        RunDir(tmp_path / "thesis").open(),
    ):
        pass
    assert os.listdir(tmp_path / "thesis") == ["thesis.tex"]


@pytest.mark.parametrize("names", [("log/",), ("recipe.yaml",), ("lock", "lock.json", "sft/")])
def test_only_our_mark_makes_a_folder_a_run(tmp_path: Path, names: tuple[str, ...]) -> None:
    place = tmp_path / "proj"
    place.mkdir()
    for name in names:
        (place / name).mkdir() if name.endswith("/") else (place / name).write_text("own")
    before = sorted(os.listdir(place))
    assert not is_run(place)
    with pytest.raises(SetupError, match="is not a run of packtrain"), RunDir(place).open():
        pass
    assert sorted(os.listdir(place)) == before


def test_crash_points_of_making_a_run(ram_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at any moment, the folder is empty or a run: it can always be opened again."""

    def opened(place: Path) -> None:
        with RunDir(place / "run").open():
            pass

    def read(place: Path) -> bool:
        run = place / "run"
        return is_run(run) if run.is_dir() and os.listdir(run) else False

    seen = crash_at_each_call(ram_path, lambda place: None, opened, read)
    old_then_new(seen, False, True, synced=False)


def test_a_run_directory_below_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with (
        pytest.raises(SetupError, match="cannot be written") as caught,
        RunDir(tmp_path / "file" / "run").open(),
    ):
        pass
    assert caught.value.why == "a part of the path is a file, not a folder"


def test_a_refused_recipe_leaves_the_description_of_the_accepted_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def enter(text: str, *flags: str) -> int:
        document(tmp_path, text)
        return stage_entry("sft", Section, lambda stage: {}, ["recipe.yaml", *flags])

    kept = tmp_path / "runs" / "t"
    assert enter("name: t\nsft: {}\n") == 0
    assert enter("name: t\nseed: 5\nsft: {}\n") == 4
    assert (kept / "recipe.yaml").read_text() == "name: t\nsft: {}\n"
    assert "seed: 5" not in (kept / "recipe.resolved.yaml").read_text()
    assert enter("name: t\nseed: 5\nsft: {}\n", "--overwrite") == 0
    assert "seed: 5" in (kept / "recipe.resolved.yaml").read_text()


# --- stages -----------------------------------------------------------------------------------


def test_a_stage_goes_from_absent_to_unfinished_to_done(run: RunDir) -> None:
    assert run.state("sft") == "absent"
    assert run.begin("sft", {"sft": "1"}, resume=False, overwrite=False)
    assert run.state("sft") == "unfinished"
    (run.stage("sft") / "weights").write_text("w")
    (run.stage("sft") / "metrics.jsonl").write_text("{}")
    run.finish("sft", {"sft": "1"}, {"loss": 0.5})
    assert run.is_done("sft")
    manifest = verify_directory(run.stage("sft"))
    assert list(manifest.files) == ["weights"]
    assert manifest.facts["summary"] == {"loss": 0.5}
    seconds = manifest.facts["seconds"]
    assert isinstance(seconds, float) and 0 <= seconds < 60
    assert not run.begin("sft", {"sft": "1"}, resume=False, overwrite=False)


def test_a_finished_stage_with_other_settings_is_refused_with_their_names(run: RunDir) -> None:
    finished(run, sft="1", seed="0")
    with pytest.raises(SetupError) as caught:
        run.begin("sft", {"sft": "2", "seed": "0", "data": "x"}, resume=True, overwrite=False)
    assert caught.value.what == "stage sft is finished, with other settings (changed: data, sft)"
    assert (
        caught.value.fix == "make it again with --overwrite, undo the change, or use another --run"
    )


def test_an_unfinished_stage_needs_resume_or_overwrite(run: RunDir) -> None:
    run.begin("sft", {"sft": "1"}, resume=False, overwrite=False)
    (run.stage("sft") / "half").write_text("x")
    with pytest.raises(SetupError) as caught:
        run.begin("sft", {"sft": "1"}, resume=False, overwrite=False)
    assert caught.value.what == "stage sft was started and not finished"
    assert caught.value.fix == "continue it with --resume, or start it again with --overwrite"
    assert run.begin("sft", {"sft": "1"}, resume=True, overwrite=False)
    assert (run.stage("sft") / "half").exists()
    assert run.begin("sft", {"sft": "2"}, resume=False, overwrite=True)
    assert not (run.stage("sft") / "half").exists()


def test_an_unfinished_stage_with_other_settings_begins_anew_unless_it_kept_something(
    run: RunDir,
) -> None:
    folder = run.stage("sft")

    def half(kept: str) -> None:
        run.begin("sft", {"sft": "1"}, resume=False, overwrite=True)
        (folder / "metrics.jsonl").write_text("{}")
        if kept:
            (folder / kept).parent.mkdir(parents=True)
            (folder / kept).write_text("x")

    half("")
    assert run.changes("sft", {"sft": "2"}) == []
    assert run.begin("sft", {"sft": "2"}, resume=True, overwrite=False)
    assert os.listdir(folder) == ["started.json"]
    assert json.loads((folder / "started.json").read_text())["settings"] == {"sft": "2"}
    for kept in (
        *("checkpoints/step_000001/manifest.json", "shards/00000000/manifest.json"),
        "groups/step_000001.parquet",
    ):
        half(kept)
        with pytest.raises(SetupError, match=r"was started with other settings \(changed: sft\)"):
            run.begin("sft", {"sft": "2"}, resume=True, overwrite=False)
        assert run.begin("sft", {"sft": "1"}, resume=True, overwrite=False)
        assert (folder / kept).exists()


@pytest.mark.parametrize("overwrite", [True, False])
def test_a_folder_of_somebody_else_is_no_stage(run: RunDir, overwrite: bool) -> None:
    run.stage("sft").mkdir()
    (run.stage("sft") / "thesis.txt").write_text("years of work")
    with pytest.raises(SetupError, match="holds files and was not made by packtrain"):
        run.begin("sft", {"sft": "1"}, resume=True, overwrite=overwrite)
    assert (run.stage("sft") / "thesis.txt").read_text() == "years of work"
    run.stage("rl").mkdir()
    (run.stage("rl") / ".started.json.staging").write_text("{")
    assert run.begin("rl", {"rl": "1"}, resume=True, overwrite=overwrite), "killed at its start"


def test_a_damaged_note_of_the_start_is_refused(run: RunDir) -> None:
    run.begin("sft", {"sft": "1"}, resume=False, overwrite=False)
    (run.stage("sft") / "started.json").write_text("{")
    with pytest.raises(DataError, match="the note of the stage's start is damaged"):
        run.begin("sft", {"sft": "1"}, resume=True, overwrite=False)


def test_overwrite_keeps_the_finished_stage_until_its_successor_is_done(run: RunDir) -> None:
    finished(run, "sft", "first")
    finished(run, "rl", "other")
    for _ in range(2):
        assert run.begin("sft", {"sft": "2"}, resume=False, overwrite=True)
        kept = run.path / ".sft.replaced"
        assert (kept / "weights").read_text() == "first"
        assert verify_directory(kept).facts["fingerprint"]
    (run.stage("sft") / "weights").write_text("second")
    run.finish("sft", {"sft": "2"}, {})
    assert (run.stage("sft") / "weights").read_text() == "second"
    assert sorted(os.listdir(run.path)) == ["rl", "sft"]
    assert (run.stage("rl") / "weights").read_text() == "other"


def test_crash_points_of_finishing_a_stage(ram_path: Path) -> None:
    def prepare(place: Path) -> None:
        RunDir(place).begin("sft", {"sft": "1"}, resume=False, overwrite=False)
        (place / "sft" / "weights").write_text("w")

    def read(place: Path) -> str:
        if RunDir(place).is_done("sft"):
            verify_directory(place / "sft")
        return RunDir(place).state("sft")

    seen = crash_at_each_call(
        ram_path, prepare, lambda place: RunDir(place).finish("sft", {"sft": "1"}, {}), read
    )
    old_then_new(seen, "unfinished", "done")


def test_crash_points_of_overwriting_never_lose_the_finished_stage(ram_path: Path) -> None:
    def read(place: Path) -> str:
        """Where the finished stage of before is found whole, until the new one is done."""
        run = RunDir(place)
        for folder in (place / "sft", place / ".sft.replaced"):
            if (folder / "manifest.json").is_file():
                verify_directory(folder)
                return (folder / "weights").read_text()
        return f"lost, {run.state('sft')}"

    seen = crash_at_each_call(
        ram_path,
        lambda place: finished(RunDir(place)),
        lambda place: finished(RunDir(place), text="new"),
        read,
    )
    old_then_new(seen, "old", "new", synced=False)


def test_crash_points_of_opening_a_run_again(
    ram_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe and env.json are whole files at any moment."""
    monkeypatch.setattr(run_module, "environment", lambda: {"python": "3.11"})
    recipe = document(ram_path)

    def opened(place: Path) -> None:
        with RunDir(place / "run").open():
            RunDir(place / "run").describe(recipe)

    def read(place: Path) -> bool:
        json.loads((place / "run" / "env.json").read_text())
        text = (place / "run" / "recipe.yaml").read_text()
        return text == "name: t\nsft: {epochs: 1}\n"

    seen = crash_at_each_call(ram_path, opened, opened, read)
    assert {value for _, value in seen} == {True}
    assert len(seen) > 20


def test_crash_points_of_appending_metrics(ram_path: Path) -> None:
    def log(place: Path, step: int) -> None:
        with Metrics(place / "metrics.jsonl") as metrics:
            metrics.log(step, {"loss": 0.5})

    def read(place: Path) -> tuple[object, ...]:
        return tuple(record["step"] for record in read_metrics(place / "metrics.jsonl"))[:2]

    seen = crash_at_each_call(
        ram_path, lambda place: log(place, 1), lambda place: log(place, 2), read
    )
    old_then_new(seen, (1,), (1, 2), synced=False)


def test_crash_points_of_rewinding_metrics(ram_path: Path) -> None:
    """Forgetting later steps never costs an earlier one."""

    def prepare(place: Path) -> None:
        with Metrics(place / "metrics.jsonl") as metrics:
            for step in (1, 2, 3):
                metrics.log(step, {"loss": 0.5})

    def rewind(place: Path) -> None:
        with Metrics(place / "metrics.jsonl") as metrics:
            metrics.rewind(2)

    def read(place: Path) -> tuple[object, ...]:
        return tuple(record["step"] for record in read_metrics(place / "metrics.jsonl"))

    old_then_new(crash_at_each_call(ram_path, prepare, rewind, read), (1, 2, 3), (1, 2))


# --- what a stage was made from ---------------------------------------------------------------


def test_settings_follow_recipe_data_and_the_stages_before(tmp_path: Path, run: RunDir) -> None:
    (tmp_path / "rows.jsonl").write_text("{}")
    text = "name: t\ndata: {sft: rows.jsonl}\nprune: {}\nsft: {epochs: 1}\nrl: {x: 1}\n"

    def settings(text: str, place: str = "sft") -> dict[str, str]:
        return stage_settings(document(tmp_path, text), run, place)

    before = settings(text)
    assert sorted(before) == ["data", "file of data.sft", "sft"]
    assert changed(before, settings(text.replace("name: t", "name: u"))) == []
    assert changed(before, settings(text.replace("x: 1", "x: 2"))) == []
    assert changed(before, settings(text.replace("epochs: 1", "epochs: 2"))) == ["sft"]
    (tmp_path / "rows.jsonl").write_text("{} ")
    assert changed(before, settings(text)) == ["file of data.sft"]
    (tmp_path / "rows.jsonl").write_text("{}")
    finished(run, "prune")
    assert changed(before, settings(text)) == ["stage prune"]
    with_prune = settings(text)
    finished(run, "prune")
    assert settings(text) == with_prune, "made again, and the same came out"
    finished(run, "prune", "new")
    assert changed(with_prune, settings(text)) == ["stage prune"]
    assert settings(text.replace("prune: {}\n", "")) == before, "turned off: not an input"
    finished(run, "rl", rl="1")
    assert "stage rl" not in settings(text)
    assert "stage rl" in settings(text, "rl/evaluation")
    assert "stage rl" not in settings(text, "base/evaluation")


def test_settings_leave_out_how_a_stage_runs(tmp_path: Path, run: RunDir) -> None:
    def settings(rl: str) -> dict[str, str]:
        return stage_settings(document(tmp_path, f"name: t\nrl: {rl}\n"), run, "rl")

    before = settings("{steps: 3, engine: {max_length: 64}}")
    slots = settings("{steps: 3, engine: {max_length: 64, num_slots: 8}, lease_seconds: 9}")
    fleet = settings("{steps: 3, engine: {max_length: 64}, fleet: {num_workers: 2, spare: false}}")
    assert before == slots == fleet
    assert changed(before, settings("{steps: 3, engine: {max_length: 65}}")) == ["rl"]
    assert changed(before, settings("{steps: 4, engine: {max_length: 64}}")) == ["rl"]


def test_an_arm_beside_a_stage_is_nothing_to_the_trail(tmp_path: Path, run: RunDir) -> None:
    """Whatever the teacher says is the arm's alone; without `as_arm` it is the stage's."""

    def settings(sft: str, place: str) -> dict[str, str]:
        text = f"name: t\ntargets: {{}}\nsft: {sft}\nrl: {{}}\n"
        return stage_settings(document(tmp_path, text), run, place)

    finished(run, "targets")
    beside, other = (f"{{epochs: 1, distill: {{k: {k}, as_arm: true}}}}" for k in (1, 2))
    assert settings(beside, "sft") == settings(other, "sft")
    assert changed(settings(beside, "taught"), settings(other, "taught")) == ["sft"]
    assert changed(settings(beside, "sft"), settings("{epochs: 2}", "sft")) == [
        "sft",
        "stage targets",
    ]
    plain, taught = settings("{epochs: 1}", "sft"), settings("{epochs: 1, distill: {k: 1}}", "sft")
    assert changed(plain, settings(beside, "sft")) == ["stage targets"]
    assert changed(plain, taught) == ["sft"]
    for place, is_input in (("sft", False), ("taught", True), ("rl", False)):
        assert ("stage targets" in settings(beside, place)) is is_input, place
    assert settings("{epochs: 1, distill: null}", "sft") == plain, "null is as good as absent"
    finished(run, "sft")
    finished(run, "taught")
    assert "stage taught" in settings(beside, "taught/evaluation")
    for place in ("sft", "taught", "sft/evaluation", "rl"):
        assert "stage taught" not in settings(beside, place), place
    assert "stage sft" not in settings(beside, "taught/evaluation")


def test_settings_follow_the_code_of_the_users_rewards(tmp_path: Path, run: RunDir) -> None:
    (tmp_path / "mine.py").write_text("def mine(): return 0")
    text = "name: t\nrewards: [mine.py]\nrl: {}\n"
    before = stage_settings(document(tmp_path, text), run, "rl")
    (tmp_path / "mine.py").write_text("def mine(): return 1")
    after = stage_settings(document(tmp_path, text), run, "rl")
    assert changed(before, after) == ["file of rewards[0]"]


def test_settings_follow_the_weights_of_the_users_models(tmp_path: Path, run: RunDir) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "model.safetensors").write_bytes(b"aaaa")
    text = "name: t\nmodel: {path: base}\nsft: {}\n"
    before = stage_settings(document(tmp_path, text), run, "sft")
    (tmp_path / "base" / "model.safetensors").write_bytes(b"aaba")
    after = stage_settings(document(tmp_path, text), run, "sft")
    assert changed(before, after) == ["folder of model"]


def test_a_file_is_read_once_as_long_as_it_stays(
    tmp_path: Path, run: RunDir, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, weights = tmp_path / "rows.jsonl", tmp_path / "base" / "model.safetensors"
    weights.parent.mkdir()
    rows.write_text("{}")
    weights.write_bytes(b"aaaa")
    read: list[str] = []
    for name in ("_whole", "_sampled"):
        monkeypatch.setattr(provenance, name, _counting(getattr(provenance, name), read))
    text = "name: t\nmodel: {path: base}\ndata: {sft: rows.jsonl}\nsft: {}\n"

    def settings(age_seconds: float) -> dict[str, str]:
        for path in (rows, weights):
            changed_at = time.time() - age_seconds
            os.utime(path, (changed_at, changed_at))
        read.clear()
        return [stage_settings(document(tmp_path, text), run, "sft") for _ in range(3)][-1]

    young = settings(0)
    assert sorted(read) == ["model.safetensors"] * 3 + ["rows.jsonl"] * 3, "may still change"
    old = settings(100)
    assert sorted(read) == ["model.safetensors", "rows.jsonl"] and old == young
    rows.write_text("[]")
    weights.write_bytes(b"aaba")
    assert changed(old, settings(50)) == ["file of data.sft", "folder of model"]
    assert sorted(read) == ["model.safetensors", "rows.jsonl"]


def _counting(function: Callable[[Path], str], read: list[str]) -> Callable[[Path], str]:
    @functools.wraps(function)
    def counted(path: Path) -> str:
        read.append(path.name)
        return function(path)

    return counted


def test_a_large_file_is_known_by_its_head_and_by_blocks_all_over_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """40 bytes beyond a limit of 8: four blocks of two bytes, from bytes 0, 10, 20 and 30."""
    monkeypatch.setattr(provenance, "_WHOLE", 8)
    monkeypatch.setattr(provenance, "_BLOCKS", 4)
    file = tmp_path / "model.safetensors"

    def named(place: int | None, size: int = 40) -> str:
        content = bytearray(size)
        if place is not None:
            content[place] = 1
        file.write_bytes(content)
        return folder_fingerprint(tmp_path)

    plain = named(None)
    seen = [place for place in range(40) if named(place) != plain]
    assert seen == [0, 1, 10, 11, 20, 21, 30, 31]
    assert named(None, 41) != plain
    assert len({named(place, 8) for place in range(8)}) == 8, "a small one is read whole"
