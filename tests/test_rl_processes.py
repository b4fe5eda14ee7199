"""The whole loop with real processes: what is killed, what goes on, and what is left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from rl_runs import STEPS, Run, nothing_left
from safetensors.torch import load_file

from ground.checkpoints import Checkpoints, step_of
from ground.faults import Faults
from ground.storage import verify_directory
from ground.strikes import Action, corrupt, delay, enospc, hang_gil, kill9, stop
from rl.journal import read_journal
from rl.ledger import audit_ledger

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def run(tmp_path: Path, tiny_model: Path) -> Iterator[Run]:
    """A started run; at the end nothing of it may be left."""
    with nothing_left(Run(tmp_path, tiny_model)) as run:
        yield run


def test_a_killed_worker_is_replaced_and_the_run_goes_on(run: Run) -> None:
    run.wait_for_step(3)
    (victim,) = run.below("ray::RolloutWorker")
    victim.kill()
    output = run.finish()
    assert run.process.returncode == 0, output
    assert not victim.is_running()
    run.check_finished()
    restarts = [event["role"] for event in run.events("restart")]
    assert restarts.count("worker 0") == 1


def test_a_killed_command_is_resumed_from_its_checkpoint(run: Run) -> None:
    run.wait_for_step(5)
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.communicate()
    run.check_nothing_is_left()
    assert run.version < STEPS
    run.start("--resume")
    output = run.finish()
    assert run.process.returncode == 0, output
    run.check_finished()
    records = list(read_journal(run.stage / "ledger.jsonl"))
    assert any(record.get("reason") == "resumed" for record in records)


@pytest.mark.parametrize("title", ["rl.learn", "ray::ControllerActor"])
def test_a_killed_learner_or_controller_costs_only_the_way_back(run: Run, title: str) -> None:
    run.wait_for_step(5)
    (victim,) = run.below(title)
    victim.kill()
    output = run.finish()
    assert run.process.returncode == 0, output
    run.check_finished()
    restarts = [event["cause"] for event in run.events("restart")]
    assert any("the learner" in str(cause) or "is gone" in str(cause) for cause in restarts)


def test_a_terminated_run_saves_where_it_is_and_can_go_on(run: Run) -> None:
    """#12: SIGTERM, and Ray has replaced our handlers meanwhile."""
    run.wait_for_step(3)
    run.process.send_signal(signal.SIGTERM)
    output = run.finish()
    assert run.process.returncode == 143, output
    assert "continue it with --resume" in output
    *_, latest = Checkpoints(run.stage / "checkpoints").steps()
    assert step_of(latest) == run.version
    run.start("--resume")
    output = run.finish()
    assert run.process.returncode == 0, output
    run.check_finished()


def test_a_reward_that_never_differs_stops_the_run_and_says_why(
    tmp_path: Path, tiny_model: Path
) -> None:
    """#77: three steps, one that was open by then, three of the widened curriculum, of four slots
    with two draws each."""
    with nothing_left(Run(tmp_path, tiny_model, reward="same")) as run:
        output = run.finish()
        assert run.process.returncode == 5, output
        assert "at least one group in 7 steps must teach something, none did" in output
        assert "56 groups were filtered: all-1 56" in output
        assert [event["version"] for event in run.events("widened")] == [3]
        assert "teaches: from version 3 on" in run.log()


def told_stacks(log: str) -> tuple[set[str], set[str]]:
    """The roles that the log's first line about stacks names, and those that gave none."""
    found = re.search(r"stacks of (.+?) are in \S+?(?:; (.+) did not answer)?$", log, re.MULTILINE)
    assert found, log
    return set(found[1].split(", ")), set(found[2].split(", ") if found[2] else ())


@pytest.mark.parametrize(
    ("role", "point", "nth", "action", "cause"),
    [
        pytest.param("learner", "step.forward", 4, stop, "was silent for 20 s", id="#4 learner"),
        pytest.param(
            "learner", "step.forward", 4, hang_gil, "was silent for 20 s", id="#5 learner"
        ),
        pytest.param("controller", "settle", 30, hang_gil, "it was silent for", id="#5 controller"),
        pytest.param("learner", "step.forward", 4, delay(900), "to train step", id="stuck step"),
        pytest.param("keeper", "keep", 4, kill9, "keeper", id="#15 keeper"),
    ],
)
def test_whoever_hangs_or_dies_costs_only_the_way_back(
    tmp_path: Path, tiny_model: Path, role: str, point: str, nth: int, action: Action, cause: str
) -> None:
    folder = tmp_path / "faults"
    folder.mkdir()
    plan = Faults(folder).at(role, point, nth).do(action)
    stuck = action == delay(900)  # the deadline holds for the first hand-over too
    run = Run(tmp_path, tiny_model, faults=plan, rl={"step_deadline_seconds": 30} if stuck else {})
    with nothing_left(run):
        plan.wait(240)
        output = run.finish()
        assert run.process.returncode == 0, output
        assert len(run.restarts()) == 1 and cause in run.restarts()[0]
        run.check_finished()
        stacks = {
            path.name: path.read_text() for path in (run.directory / "run/log/stacks").iterdir()
        }
    if action is kill9:
        return  # whoever is told of an end by a broken call need not ask where it stood
    everybody = {"supervisor", "learner", "controller", "keeper", "rollout/0", "reward"}
    mute = {role} if action is stop else set()
    answered, silent = told_stacks(run.log())
    assert answered == everybody - mute
    assert silent == mute
    for name in answered:
        texts = [t for file, t in stacks.items() if file.startswith(name.replace("/", "-") + ".")]
        assert any("most recent call first" in text for text in texts), name
    if action in (hang_gil, delay(900)):
        [hung] = [
            text
            for name, text in stacks.items()
            if name.startswith(f"{role}.") and "strikes" in text
        ]
        assert ("_hang" in hung) == (action is hang_gil)


def test_the_whole_fleet_dead_ends_the_run_with_its_ledger_saved(
    tmp_path: Path, tiny_model: Path
) -> None:
    """#27: exit code 6 within a minute of the last worker's end."""
    folder = tmp_path / "faults"
    folder.mkdir()
    dies = Faults(folder).at("rollout/0", "gen.mid", 2).do(kill9, times=99)
    run = Run(tmp_path, tiny_model, faults=dies, rl={"fleet": {"max_restarts": 1, "spare": False}})
    with nothing_left(run):
        dies.wait(240, count=2)
        began = time.monotonic()
        output = run.finish()
        assert time.monotonic() - began < 60
        assert run.process.returncode == 6, output
        assert "0 are left after 1 restarts in a row" in output and "--resume" in output
        assert not run.restarts()
        totals = audit_ledger(read_journal(run.stage / "ledger.jsonl"))
        assert {name for name, count in totals.items() if count} == {"withdrawn"}


def test_75_a_nan_ends_the_stage_with_its_batch_kept_and_the_update_not_made(
    tmp_path: Path, tiny_model: Path
) -> None:
    """Exit code 5. The next life takes that step again, and ends as if nothing had been."""
    digests = []
    for name, nth in (("whole", 10**6), ("poisoned", 6)):
        folder = tmp_path / name
        folder.mkdir()
        nan = Faults(folder).at("learner", "step.behavior", nth).do(corrupt("nan"))
        with nothing_left(Run(folder, tiny_model, faults=nan, rl={"max_staleness": 0})) as run:
            output = run.finish()
            if nan.fired():
                assert run.process.returncode == 5, output
                assert "loss and gradient must be finite, got nan" in output
                assert verify_directory(run.stage / "diverged").facts["step"] == run.version
                kept = load_file(run.stage / "diverged" / "batch.safetensors")
                assert kept["loss_mask"].sum() > 16
                groups = sorted(path.stem for path in (run.stage / "groups").iterdir())
                assert groups[-1] == f"step_{run.version:06d}" and 4 <= run.version < STEPS
                known = [each["version"] for each in read_journal(run.stage / "digests.jsonl")]
                assert max(map(int, map(str, known))) == run.version
                audit_ledger(read_journal(run.stage / "ledger.jsonl"))
                assert not run.restarts(), "a life more would not help"
                run.start("--resume")
                output = run.finish()
            assert run.process.returncode == 0, output
            run.check_finished()
            last = {e["version"]: e["digest"] for e in read_journal(run.stage / "digests.jsonl")}
            digests.append(last)
    assert len(digests[0]) == STEPS and digests[0] == digests[1]


@pytest.mark.parametrize("point", ["journal.staged", "cut.staged", "best.staged", "export"])
def test_a_full_disk_ends_the_stage_and_the_next_life_goes_on(
    tmp_path: Path, tiny_model: Path, point: str
) -> None:
    """#42, #43: wherever the learner writes: exit code 4, and what was there before is whole."""
    full = Faults(tmp_path).at("learner", point).do(enospc)
    with nothing_left(Run(tmp_path, tiny_model, faults=full)) as run:
        output = run.finish()
        assert full.fired() and run.process.returncode == 4, output
        assert "the disk is full" in output
        for cut in Checkpoints(run.stage / "checkpoints").steps():
            verify_directory(cut)
        run.start("--resume")
        output = run.finish()
        assert run.process.returncode == 0, output
        run.check_finished()


def test_late_groups_are_dropped_and_asked_again_and_the_books_close(
    tmp_path: Path, tiny_model: Path
) -> None:
    """`late: drop` with two workers, of which one is slow now and then."""
    slow = Faults(tmp_path).at("rollout/1", "gen.begin", 2).do(delay(2), times=12)
    settings = {
        "late": "drop",
        "late_floor": 0.5,
        "fleet": {"num_workers": 2, "cpus_per_worker": 0.5, "spare": False},
    }
    with nothing_left(Run(tmp_path, tiny_model, faults=slow, rl=settings)) as run:
        output = run.finish()
        assert run.process.returncode == 0, output
        summary = run.check_finished()
        assert not run.restarts()
        paths = sorted((run.stage / "groups").glob("step_*.parquet"))
        rows = [row for path in paths for row in pq.read_table(path).to_pylist()]
        records = list(read_journal(run.stage / "ledger.jsonl"))
    late = [record["draw"] for record in records if record.get("reason") == "late"]
    assert slow.fired() and len(late) == len(set(late)) > 3, "each at most once"
    consumed = summary["consumed"]
    assert isinstance(consumed, dict)
    assert (consumed["lost"], consumed["trained_twice"], consumed["steps"]) == (0, 0, STEPS)
    ended = {r["draw"]: r["state"] for r in records}
    assert {ended[draw] for draw in late} <= {"trained", "filtered", "withdrawn"}
    assert sum(ended[draw] == "trained" for draw in late) > 0, "dropped, and trained later"
    assert sum(row["reason"] == "late" for row in rows) == len(late)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_second_signal_ends_the_run_at_once(
    tmp_path: Path, tiny_model: Path, number: signal.Signals, code: int
) -> None:
    """#13: in a step that lasts, the first waits for its end, the second does not; what was
    committed before is whole, and the run can go on."""
    lasts = Faults(tmp_path).at("learner", "step.forward", nth=5).do(delay(60))
    with nothing_left(Run(tmp_path, tiny_model, faults=lasts)) as run:
        lasts.wait(240)
        run.process.send_signal(number)
        with pytest.raises(subprocess.TimeoutExpired):
            run.process.wait(timeout=1)
        run.process.send_signal(number)
        assert run.process.wait(timeout=10) == code
        run.process.communicate()
        run.check_nothing_is_left()
        run.faults = None
        run.start("--resume")
        output = run.finish()
        assert run.process.returncode == 0, output
        run.check_finished()


def test_a_run_that_is_terminated_while_it_saves_saves(tmp_path: Path, tiny_model: Path) -> None:
    """#12: in the middle of a checkpoint; every one that is there is whole."""
    slow = Faults(tmp_path).at("learner", "cut.staged", nth=2).do(delay(2))
    with nothing_left(Run(tmp_path, tiny_model, faults=slow)) as run:
        slow.wait(240)
        run.process.send_signal(signal.SIGTERM)
        output = run.finish()
        assert run.process.returncode == 143, output
        cuts = Checkpoints(run.stage / "checkpoints").steps()
        for cut in cuts:
            verify_directory(cut)
        assert step_of(cuts[-1]) == run.version
        run.start("--resume")
        output = run.finish()
        assert run.process.returncode == 0, output
        run.check_finished()
