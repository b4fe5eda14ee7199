"""Hosts of the ranks: who is given up when, and what a rank's learner says in the end. No Ray."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from launching import free_port, rank_environment

from ground import stacks
from ground.errors import (
    DataError,
    DivergedError,
    FailureKind,
    InfraError,
    PacktrainError,
    WorkersLostError,
)
from ground.roll import Roll
from rl import hosts
from rl.config import RlSection
from rl.hosts import Hosts, host, host_life
from rl.job import Job, Report
from rl.learn import rank_patience
from rl.speaker import facts_of
from rl.watchdog import stacks_folder


class Learner:
    """A learner of rank 1 that goes on until its life is over, or says at once what ended it."""

    def __init__(self, error: PacktrainError | None) -> None:
        self._error, self._is_over = error, threading.Event()

    def hear(self) -> Report:
        if self._error is not None:
            return Report(kind="failed", facts=facts_of(self._error))
        self._is_over.wait()
        return Report(kind="done")

    def ended_by(self) -> str:
        return ""

    def close(self) -> None:
        self._is_over.set()


class Bench:
    """Two ranks' hosts in one process: ours is rank 1's, a thread is rank 0."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        port = free_port()
        self.first, self.second = (
            Roll({**os.environ, **rank_environment("ddp", rank, port)}) for rank in range(2)
        )
        self._folder = folder
        self.lives: list[int] = []
        self.stacks: list[str] = []
        self.error: PacktrainError | None = None
        monkeypatch.setattr(hosts, "learner_process", self._learner_process)
        monkeypatch.setattr(hosts, "SILENT_SECONDS", 3.0)
        monkeypatch.setattr(hosts, "_BEAT_SECONDS", 0.05)
        monkeypatch.setenv(stacks.VARIABLE, "elsewhere")

    @contextmanager
    def _learner_process(
        self, job: Job, on_silence: Callable[[], None], environment: Mapping[str, str]
    ) -> Iterator[Learner]:
        self.lives.append(job.incarnation)
        self.stacks.append(os.environ[stacks.VARIABLE])
        learner = Learner(self.error)
        try:
            yield learner
        finally:
            learner.close()

    def job(self, life: int) -> Job:
        return Job(
            section=RlSection.model_validate({"steps": 4}),
            seed=0,
            run_name="toy",
            incarnation=life,
            model=self._folder,
            directory=self._folder,
            log_directory=self._folder,
        )

    def run(self, lead: Callable[[], None]) -> None:
        """Rank 0's part in a thread, rank 1's host here."""
        with ThreadPoolExecutor(1) as pool:
            led = pool.submit(lead)
            host(self.second, {})
            led.result()


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    return Bench(tmp_path, monkeypatch)


def ignore(error: PacktrainError) -> None:
    """Nobody has to be told."""


def test_a_rank_0_that_is_busy_before_and_between_lives_is_not_given_up(bench: Bench) -> None:
    """Three times it does something else for longer than a silent host may be silent."""

    def lead() -> None:
        time.sleep(4)  # imports: no beat so far
        with Hosts(bench.first) as others:
            time.sleep(4)  # reads the prompts
            for life in range(2):
                with others.life(bench.job(life), ignore):
                    time.sleep(0.3)
                time.sleep(4)  # sweeps

    bench.run(lead)
    assert bench.lives == [0, 1]
    assert bench.stacks == [str(stacks_folder(bench.job(0)))] * 2


def test_a_rank_0_that_falls_silent_is_given_up_by_name(bench: Bench) -> None:
    bench.first.beat()
    with pytest.raises(WorkersLostError, match=r"rank 0's rl.train must go on, .* for 3 s"):
        host(bench.second, {})


@pytest.mark.parametrize(
    ("error", "code", "kind"),
    [
        (DataError("bad row", where="a:3"), 3, FailureKind.DATA),
        (DivergedError("loss is nan", where="a:3"), 5, FailureKind.CODE),
    ],
)
def test_what_ended_another_rank_s_learner_ends_the_run(
    bench: Bench, error: PacktrainError, code: int, kind: FailureKind
) -> None:
    """Rank 0's own learner only sees that a rank is gone, and says so first."""
    bench.error, found = error, list[PacktrainError]()

    def lead() -> None:
        with Hosts(bench.first) as others:
            try:
                with others.life(bench.job(0), ignore):
                    raise InfraError("another of the 2 ranks is gone")
            except PacktrainError as caught:
                found.append(caught)

    bench.run(lead)
    (ended,) = found
    assert not isinstance(ended, InfraError) and ended.what == error.what
    assert (ended.where, ended.exit_code, ended.kind) == ("rank 1, a:3", code, kind)


def test_a_lost_attempt_of_another_rank_is_told_at_once_and_may_be_made_again(bench: Bench) -> None:
    bench.error, told = InfraError("its node is gone"), list[PacktrainError]()

    def lead() -> None:
        is_told = threading.Event()

        def on_lost(error: PacktrainError) -> None:
            told.append(error)
            is_told.set()

        with Hosts(bench.first) as others, pytest.raises(InfraError, match="is gone"):  # noqa: SIM117
            with others.life(bench.job(0), on_lost):
                assert is_told.wait(10)
                raise told[0]

    bench.run(lead)
    assert [type(error) for error in told] == [InfraError]


def test_a_host_of_one_life_runs_its_learner_where_its_own_files_are(
    bench: Bench, tmp_path: Path
) -> None:
    """Nothing of the run's folder is there; the next life has another host."""

    def at_home(job: Job) -> Job:
        return job.model_copy(update={"log_directory": tmp_path / "here"})

    def lead() -> None:
        with Hosts(bench.first) as others, others.life(bench.job(3), ignore):
            time.sleep(0.3)

    with ThreadPoolExecutor(1) as pool:
        led = pool.submit(lead)
        host_life(bench.second, 3, at_home, {})
        led.result()
    assert bench.lives == [3]
    assert bench.stacks == [str(tmp_path / "here" / "stacks")]


def test_what_a_silent_host_means_is_for_who_started_it_to_say(bench: Bench) -> None:
    def lost(rank: int, seconds: float) -> PacktrainError:
        return InfraError(f"rank {rank} is silent for {seconds:g} s")

    told = list[PacktrainError]()
    is_told = threading.Event()

    def on_lost(error: PacktrainError) -> None:
        told.append(error)
        is_told.set()

    bench.second.beat()
    with Hosts(bench.first, lost) as others, others.life(bench.job(0), on_lost):
        assert is_told.wait(20)
    assert [(type(error), error.what) for error in told] == [
        (InfraError, "rank 1 is silent for 3 s")
    ]


def test_a_rank_waits_for_a_publication_and_the_next_plan_in_a_row() -> None:
    section = RlSection.model_validate({"steps": 4})
    both = section.publication_seconds + section.step_deadline_seconds
    assert rank_patience(section) > both
