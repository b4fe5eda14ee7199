"""Owns every process of the loop and brings it back to life from the last checkpoint.

    life n: cluster ─▶ keeper, controller ─▶ learner begins ─▶ reports … ─▶ done
                                                  └── killed, or the controller gone ─▶ life n + 1

Learner, controller, fleet and Ray itself live and end together: whichever of them is killed, the
next life starts all of them from the same cut. (A single rollout worker is the fleet's business and
ends nothing.) What the learner could not know better than us is not tried again: a recipe, data or
divergence error, a fleet that is lost, or a defect of ours ends the stage at once.
"""

from __future__ import annotations

import logging
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from ground.errors import FailureKind, InfraError, PacktrainError, WorkersLostError
from rl.actors import start_controller
from rl.cluster import cluster
from rl.job import Job, Report
from rl.pool import Pool
from rl.processes import Reserved

_GRACE_SECONDS = 20.0
"""How long a learner may take to finish its step and save after a signal."""
_SILENT_SECONDS = 120.0
"""A learner that gives no sign of life for so long hangs: it is killed, a new life begins."""

logger = logging.getLogger("packtrain")


def supervise(
    job_of_life: Callable[[int], Job],
    pool: Pool,
    ours: Reserved,
    *,
    on_report: Callable[[Report], None],
    note: Callable[[Mapping[str, object]], None],
) -> dict[str, object]:
    """Run the loop to its end, over as many lives as the recipe allows; returns its facts.

    Args:
        job_of_life: the job of a life, by number from 0.
        on_report: receives the learner's reports.
        note: receives an event for the timeline.

    Raises:
        WorkersLostError: the last allowed life was lost as well.
    """
    life = 0
    while True:
        job = job_of_life(life)
        try:
            return _live(job, pool, ours, on_report)
        except InfraError as error:
            ours.sweep()
            if life >= job.section.max_restarts:
                raise WorkersLostError(
                    f"the loop was lost {life + 1} times, rl.max_restarts allows "
                    f"{job.section.max_restarts}",
                    where="rl",
                    why=str(error),
                    fix=f"look at {job.log_directory}, then continue with --resume",
                ) from error
            logger.warning("the loop is started again from its last checkpoint: %s", error)
            now = time.time()
            note(
                {"time": now, "kind": "restart", "role": "supervisor", "start": now, "end": now}
                | {"cause": error.what}
            )
            life += 1


def _live(
    job: Job, pool: Pool, ours: Reserved, on_report: Callable[[Report], None]
) -> dict[str, object]:
    fleet = job.section.fleet
    with (
        _learner(job) as learner,
        cluster(ours.folder, fleet.num_workers * fleet.cpus_per_worker, job.model) as address,
    ):
        controller = start_controller(job, pool)
        learner.tell(address)
        facts = _follow(learner, on_report)
        del controller  # its only handle: the actor lives as long as we hold it
    return facts


class _Learner:
    """The learner's process: lines to it, and its reports with a deadline.

    Example:
        learner.tell(address);  report = learner.hear();  …;  learner.close()
    """

    def __init__(self, job: Job) -> None:
        self._log = job.log_directory / "rl.learner.err"
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "rl.learn"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,
            )
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=self._listen, name="reports", daemon=True).start()
        self.tell(job.model_dump_json())

    def tell(self, line: str) -> None:
        """Give it a line; one that is dead already is noticed by `hear`."""
        assert self._process.stdin
        with suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def hear(self) -> Report:
        """Its next report; signs of life are passed over.

        Raises:
            InfraError: it ended without a word, or gave no sign of life in time.
        """
        while True:
            try:
                line = self._lines.get(timeout=_SILENT_SECONDS)
            except queue.Empty:
                raise self._lost(f"was silent for {_SILENT_SECONDS:g} s") from None
            if not line:
                code = self._process.wait()
                raise self._lost(f"ended with exit code {code} and no word")
            report = Report.model_validate_json(line)
            if report.kind != "alive":
                return report

    def ask_to_stop(self) -> None:
        """Ask it to finish its step and save; the reports go on until it has."""
        self._process.terminate()

    def close(self) -> None:
        """It is gone when this returns."""
        self._process.kill()
        self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _lost(self, what: str) -> InfraError:
        return InfraError(f"the learner must go on, it {what}", where="rl", fix=f"see {self._log}")


@contextmanager
def _learner(job: Job) -> Iterator[_Learner]:
    """A learner's process; started before Ray, for its imports take long; gone at the end."""
    learner = _Learner(job)
    try:
        yield learner
    finally:
        learner.close()


def _follow(learner: _Learner, on_report: Callable[[Report], None]) -> dict[str, object]:
    """Pass reports on until the learner is done; when we are interrupted, let it save first."""
    try:
        return _read_reports(learner, on_report)
    except KeyboardInterrupt:
        learner.ask_to_stop()
        killer = threading.Timer(_GRACE_SECONDS, learner.close)
        killer.start()
        try:
            _read_reports(learner, on_report)
        except PacktrainError as error:
            logger.warning("interrupted; steps since the last checkpoint are lost: %s", error)
        finally:
            killer.cancel()
        raise


def _read_reports(learner: _Learner, on_report: Callable[[Report], None]) -> dict[str, object]:
    while True:
        report = learner.hear()
        if report.kind == "failed":
            raise _error_of(report.facts)
        if report.kind == "done":
            return report.facts
        on_report(report)


def _error_of(facts: Mapping[str, object]) -> PacktrainError:
    """The learner's error with its exit code and kind; only a lost attempt keeps its type."""
    is_lost = facts["type"] == InfraError.__name__
    error = (InfraError if is_lost else PacktrainError)(
        str(facts["what"]),
        where=str(facts["where"]),
        why=str(facts["why"]),
        fix=str(facts["fix"]),
    )
    error.exit_code = int(str(facts["exit_code"]))
    error.kind = FailureKind(str(facts["kind"]))
    return error
