"""Who is given up when: silence, stuck phases, a dead pulse, lives without progress. No Ray."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ground import stacks
from ground.errors import InfraError, SetupError, WorkersLostError
from ground.faults import Faults
from ground.lease import ABANDONED, Fence
from ground.signals import Interrupted
from ground.stacks import collect
from ground.strikes import hang_gil, segv
from rl import learner_process, supervisor
from rl.actors import KeeperCheck
from rl.config import RlSection
from rl.job import Job, Report, phase
from rl.learner_process import LearnerProcess
from rl.ranks import Ranks
from rl.share import Share, Split
from rl.supervisor import Budget, _follow
from rl.watchdog import LOOP_FILE, Watchdog
from rollout.preflight import ClusterStartError

LOST = InfraError("the learner must go on, it was silent")


def make_job(folder: Path, **settings: object) -> Job:
    section = RlSection.model_validate({"steps": 4, "max_restarts": 2, **settings})
    return Job(
        section=section,
        seed=0,
        run_name="toy",
        incarnation=3,
        model=folder,
        directory=folder,
        log_directory=folder,
    )


class TestBudget:
    """Counts lives without progress; a machine that cannot start Ray is another matter."""

    def test_a_new_step_begins_the_count_anew_and_a_repeated_one_does_not(
        self, tmp_path: Path
    ) -> None:
        job, budget = make_job(tmp_path), Budget(max_restarts=2)
        for step in (1, 2, 3):
            budget.spend(LOST, job)
            budget.spend(LOST, job)
            budget.see(Report(kind="step", step=step))
        budget.spend(LOST, job)
        budget.see(Report(kind="step", step=3))
        budget.see(Report(kind="validation", step=9))
        budget.spend(LOST, job)
        with pytest.raises(WorkersLostError, match="lost 3 times without a new step") as caught:
            budget.spend(LOST, job)
        assert caught.value.exit_code == 6 and "it was silent" in caught.value.why

    def test_a_machine_too_busy_for_ray_costs_no_life_but_is_not_waited_for_for_ever(
        self, tmp_path: Path
    ) -> None:
        """#14's neighbour: Ray gives its node 30 s to start."""
        pauses: list[float] = []
        job, budget = make_job(tmp_path), Budget(max_restarts=0, sleep=pauses.append)
        slow = ClusterStartError("Ray must come up on this machine")
        for _ in range(4):
            budget.spend(slow, job)
        budget.see(Report(kind="begun"))
        for _ in range(4):
            budget.spend(slow, job)
        with pytest.raises(SetupError, match="it failed 5 times in a row"):
            budget.spend(slow, job)
        assert pauses == [2, 4, 6, 8] * 2


@pytest.fixture
def learner(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LearnerProcess]:
    """A process in the learner's place that only repeats the lines that it is told."""
    echo = (
        "import sys; sys.stdin.readline()\n"
        "for line in sys.stdin: sys.stdout.write(line); sys.stdout.flush()"
    )

    def start(command: list[str], **options: object) -> subprocess.Popen[str]:
        assert command[1:] == ["-m", "ground.imports", "rl.learn"]
        return real(  # pyright: ignore[reportCallIssue]
            [sys.executable, "-c", echo],
            **options,  # pyright: ignore[reportArgumentType]
        )

    real = subprocess.Popen
    monkeypatch.setattr(learner_process.subprocess, "Popen", start)
    monkeypatch.setattr(learner_process, "_PHASE_SLACK_SECONDS", 0.0)
    monkeypatch.setattr(learner_process, "_FIRST_WORD_SECONDS", 20.0)
    dumps = tmp_path / "dumps"
    job = make_job(tmp_path, silent_seconds=4.0, step_deadline_seconds=2.0)
    process = LearnerProcess(job, on_silence=dumps.touch)
    yield process
    process.close()


def say(learner: LearnerProcess, report: Report) -> None:
    learner.tell(report.model_dump_json())


def test_a_silent_learner_is_given_up_and_its_stacks_are_asked_for(
    learner: LearnerProcess, tmp_path: Path
) -> None:
    """#4, #5: stopped, or hanging with the interpreter's lock."""
    say(learner, Report(kind="begun"))
    assert learner.hear().kind == "begun"
    os.kill(learner._process.pid, signal.SIGSTOP)
    stopped = time.monotonic()
    say(learner, Report(kind="step", step=1))
    with pytest.raises(InfraError, match="it was silent for 4 s"):
        learner.hear()
    assert 3.9 < time.monotonic() - stopped < 30
    assert (tmp_path / "dumps").exists()


def test_a_learner_whose_heart_beats_but_whose_work_stands_still_is_given_up(
    learner: LearnerProcess,
) -> None:
    """Its heartbeat is a thread of its own, which a stuck main thread does not stop."""
    say(learner, phase("train step 3", 3))
    say(learner, Report(kind="step", step=4))
    assert learner.hear().step == 4 and learner.doing == "go on after step 4"
    say(learner, phase("have version 3 published", 4, seconds=60.0))
    time.sleep(2.2)
    say(learner, Report(kind="alive"))
    say(learner, Report(kind="step", step=4))
    assert learner.hear().step == 4, "a publication has a deadline of its own"
    say(learner, phase("train step 4", 4))
    beats = 0
    with pytest.raises(InfraError, match=r"took longer than 2 s to train step 4"):
        while beats < 400:
            say(learner, Report(kind="alive" if beats % 2 else "validation"))
            time.sleep(0.05)
            beats += 1
            if beats % 2 == 1:
                learner.hear()
    assert beats > 5


def test_a_dead_learner_is_told_from_a_silent_one(learner: LearnerProcess) -> None:
    os.kill(learner._process.pid, signal.SIGKILL)
    with pytest.raises(InfraError, match="ended with exit code -9 and no word"):
        learner.hear()


class Clock:
    def __init__(self) -> None:
        self.time = 100.0

    def __call__(self) -> float:
        return self.time


class FakeLearner:
    heard_at = 50.0
    last_report = Report(kind="step", step=2)
    doing = "train step 2"

    def __init__(self) -> None:
        self.given_up: list[InfraError] = []

    def give_up(self, error: InfraError) -> None:
        self.given_up.append(error)


STATUS = {
    "version": 2,
    "step": 2,
    "waits_for": "slot 9 (group a.9)",
    "since": 95.0,
    "buffered": 3,
    "workers": [{"name": "worker 0", "state": "suspect", "in_flight": 4}],
}


class ToldLearner:
    """Has said all that it will say; one step more once it is asked to stop."""

    def __init__(self) -> None:
        self._reports = [Report(kind="step", step=step) for step in (1, 2)]
        self.num_asked = 0

    def hear(self) -> Report:
        return self._reports.pop(0) if self._reports else Report(kind="done", facts={"steps": 3})

    def ask_to_stop(self) -> None:
        self.num_asked += 1
        self._reports.append(Report(kind="step", step=3))


@pytest.mark.parametrize("step", [1, 2])
def test_a_signal_while_a_report_is_passed_on_costs_neither_it_nor_those_after_it(
    tmp_path: Path, step: int
) -> None:
    learner, passed = ToldLearner(), list[int]()

    def on_report(report: Report) -> None:
        if report.step == step:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0)  # here at the latest Python handles it
        passed.append(report.step)

    ranks = cast(Ranks, SimpleNamespace(require_all=lambda: None))
    share = Share(make_job(tmp_path).section)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Interrupted) as caught:
            _follow(cast(LearnerProcess, learner), on_report, ranks, share)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert caught.value.number == signal.SIGTERM
    assert (passed, learner.num_asked) == ([1, 2, 3], 1)


class StubbornLearner(ToldLearner):
    """Says no more after it was asked, until it is closed."""

    def __init__(self) -> None:
        super().__init__()
        self._is_closed = threading.Event()

    def hear(self) -> Report:
        if not self._reports:
            assert self._is_closed.wait(20)
            raise LOST
        return self._reports.pop(0)

    def ask_to_stop(self) -> None:
        self.num_asked += 1

    def close(self) -> None:
        self._is_closed.set()


def test_a_learner_that_does_not_leave_is_ended_and_the_signal_still_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(supervisor, "_GRACE_SECONDS", 0.2)
    learner = StubbornLearner()
    before = signal.getsignal(signal.SIGTERM)
    ranks = cast(Ranks, SimpleNamespace(require_all=lambda: None))
    try:
        with pytest.raises(Interrupted):
            _follow(
                cast(LearnerProcess, learner),
                lambda report: os.kill(os.getpid(), signal.SIGTERM) if report.step == 2 else None,
                ranks,
                Share(make_job(tmp_path).section),
            )
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert learner.num_asked == 1 and "steps since the last checkpoint are lost" in caplog.text


def test_a_learner_that_was_asked_for_another_split_is_not_asked_again_by_a_signal(
    tmp_path: Path,
) -> None:
    """The second signal would have it leave without having saved."""
    learner, split = ToldLearner(), Split(ranks=2, workers=1)

    def on_report(report: Report) -> None:
        if report.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    share = cast(Share, SimpleNamespace(see=lambda step, numbers: split if step == 1 else None))
    ranks = cast(Ranks, SimpleNamespace(require_all=lambda: None))
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Interrupted):
            _follow(cast(LearnerProcess, learner), on_report, ranks, share)
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert learner.num_asked == 1


class TestWatchdog:
    def test_what_it_hears_lies_in_the_loop_file(self, tmp_path: Path) -> None:
        dog = Watchdog(make_job(tmp_path), lambda seconds: STATUS, FakeLearner(), Clock())
        assert dog.look()
        shown = json.loads((tmp_path / LOOP_FILE).read_text())
        assert STATUS.items() <= shown.items()
        assert (shown["life"], shown["learner"], shown["learner_step"]) == (3, "train step 2", 2)
        assert abs(shown["time"] - time.time()) < 5

    def test_a_silent_controller_is_given_up_after_its_deadline(self, tmp_path: Path) -> None:
        """#5: SIGSTOP or a native deadlock of the controller."""
        clock, learner, answers = Clock(), FakeLearner(), [STATUS]

        def pulse(seconds: float) -> Mapping[str, object]:
            clock.time += 10
            if not answers:
                raise TimeoutError
            return answers.pop()

        job = make_job(tmp_path, silent_seconds=30)
        dog = Watchdog(job, pulse, learner, clock)
        assert [dog.look() for _ in range(5)] == [True, True, True, True, False]
        [error] = learner.given_up
        assert error.what == "the controller must answer, it was silent for 40 s"
        assert json.loads((tmp_path / LOOP_FILE).read_text())["controller_silent_seconds"] == 30

    def test_a_controller_may_take_longer_for_its_first_answer(self, tmp_path: Path) -> None:
        clock, learner = Clock(), FakeLearner()

        def pulse(seconds: float) -> Mapping[str, object]:
            clock.time += 60
            raise TimeoutError

        dog = Watchdog(make_job(tmp_path, silent_seconds=30), pulse, learner, clock)
        assert [dog.look() for _ in range(4)] == [True, True, True, False]
        assert learner.given_up[0].what == "the controller must answer, it was silent for 240 s"

    def test_a_controller_that_is_gone_is_given_up_at_once(self, tmp_path: Path) -> None:
        def pulse(seconds: float) -> Mapping[str, object]:
            raise InfraError("gone")

        learner = FakeLearner()
        assert not Watchdog(make_job(tmp_path), pulse, learner).look()
        assert [error.what for error in learner.given_up] == ["gone"]

    def test_standing_still_is_named_and_each_time_after_twice_the_wait(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        """#81: a starved trainer is reported as such."""
        clock = Clock()
        job = make_job(tmp_path, watchdog_seconds=10)
        dog = Watchdog(job, lambda seconds: STATUS, FakeLearner(), clock)
        alarms = []
        for second in range(60):
            clock.time = 100.0 + second
            dog.look()
            if any("nothing has moved" in record.message for record in caplog.records):
                alarms.append(second)
                messages = [r.message for r in caplog.records if "nothing" in r.message]
                caplog.clear()
                assert "step 2 waits for slot 9 (group a.9)" in messages[0]
                assert "worker 0 is suspect with 4" in messages[0]
        assert alarms == [11, 21, 41]

    def test_a_machine_that_is_taken_away_ends_the_run_in_order_once(self, tmp_path: Path) -> None:
        """#41: of learner and controller; the run saves as after SIGTERM."""
        told, status = [], dict(STATUS)
        dog = Watchdog(
            make_job(tmp_path), lambda seconds: status, FakeLearner(), leave=lambda: told.append(1)
        )
        dog.look()
        assert not told
        status["is_taken_away"] = True
        assert dog.look() and dog.look() and len(told) == 1

    def test_whatever_moves_silences_it(self, tmp_path: Path) -> None:
        clock, settled = Clock(), iter(range(100))
        job = make_job(tmp_path, watchdog_seconds=10)
        dog = Watchdog(
            job, lambda seconds: {**STATUS, "settled": next(settled)}, FakeLearner(), clock
        )
        for second in range(60):
            clock.time = 100.0 + second
            dog.look()
        assert json.loads((tmp_path / LOOP_FILE).read_text())["unmoved_seconds"] == 0


HANGING = """
import os, sys
from ground import faults
from ground.roles import enter_role
enter_role("rollout/0")
def stuck_here(): faults.point("gen.mid")
print("up", flush=True)
stuck_here()
"""


def test_a_process_that_hangs_with_the_interpreters_lock_still_tells_where(tmp_path: Path) -> None:
    """#5"""
    plan = Faults(tmp_path).at("rollout/0", "gen.mid").do(hang_gil)
    folder = tmp_path / "stacks"
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING],
        env=os.environ | plan.environment() | {stacks.VARIABLE: str(folder)},
        cwd=Path(__file__).parents[1],
    )
    try:
        plan.wait(20)
        (folder / "learner.1.txt").write_text("learner 1 17.0\n")  # another process by now
        assert collect(folder, seconds=20) == (["rollout/0"], [])
        assert "stuck_here" in (folder / f"rollout-0.{process.pid}.txt").read_text()
        os.kill(process.pid, signal.SIGSTOP)
        assert collect(folder, seconds=0.3) == ([], ["rollout/0"])
    finally:
        process.kill()
        process.wait()
    assert collect(folder, seconds=20) == ([], [])


def test_6_a_process_that_dies_of_a_segmentation_fault_tells_where(tmp_path: Path) -> None:
    plan = Faults(tmp_path).at("rollout/0", "gen.mid").do(segv)
    folder = tmp_path / "stacks"
    done = subprocess.run(
        [sys.executable, "-c", HANGING],
        env=os.environ | plan.environment() | {stacks.VARIABLE: str(folder)},
        cwd=Path(__file__).parents[1],
        timeout=60,
    )
    assert done.returncode == -signal.SIGSEGV
    [file] = folder.iterdir()
    assert "Segmentation fault" in file.read_text() and "stuck_here" in file.read_text()


LEASED = """
import time
from ground.lease import Lease
lease = Lease("fleet", {seconds})
for _ in range({renewals}):
    time.sleep(0.05)
    lease.renew()
print("owned for", 0.05 * {renewals})
time.sleep(60)
"""


class Keeper:
    """A weight keeper that answers when it is told to."""

    def __init__(self) -> None:
        self.node, self.answers = self, list[asyncio.Future[str]]()

    def remote(self) -> asyncio.Future[str]:
        self.answers.append(asyncio.get_running_loop().create_future())
        return self.answers[-1]


def test_a_keeper_may_be_busy_for_a_while_but_not_gone_nor_silent_for_ever() -> None:
    async def scenario() -> None:
        busy = Keeper()
        check = KeeperCheck(cast(Any, busy), silent_seconds=60.0)
        check.look()
        check.look()
        assert len(busy.answers) == 1, "nobody waits, nor asks twice"
        busy.answers[0].set_result("node")
        check.look()
        busy.answers[1].set_exception(RuntimeError("killed"))
        with pytest.raises(InfraError, match="weight keeper must live") as caught:
            check.look()
        assert caught.value.why == "killed" and len(busy.answers) == 2
        silent = KeeperCheck(cast(Any, Keeper()), silent_seconds=0.0)
        silent.look()
        await asyncio.sleep(0.01)
        with pytest.raises(InfraError, match="weight keeper must live") as caught:
            silent.look()
        assert "it was silent for" in caught.value.why

    asyncio.run(scenario())


def test_a_lease_ends_a_process_whose_owner_is_silent() -> None:
    """Renewed 30 times, it outlives its lease, and ends once that has stopped."""
    for renewals in (0, 30):
        code = LEASED.format(seconds=1.0, renewals=renewals)
        line = [sys.executable, "-uc", code]
        done = subprocess.run(
            line, cwd=Path(__file__).parents[1], stdout=subprocess.PIPE, text=True, timeout=50
        )
        assert (done.returncode, done.stdout) == (ABANDONED, f"owned for {0.05 * renewals}\n")


def test_a_fence_refuses_messages_of_other_lives() -> None:
    fence = Fence(2)
    fence.check(2)
    for other in (1, 3):
        with pytest.raises(InfraError, match=f"of life 2 .* got one of life {other}"):
            fence.check(other)
