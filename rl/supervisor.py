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
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import IO

from ground.errors import (
    DataError,
    DivergedError,
    InfraError,
    PacktrainError,
    RecipeError,
    SetupError,
    WorkersLostError,
)
from rl.actors import start_controller
from rl.cluster import cluster
from rl.job import Job, Report
from rl.processes import Reserved

_TYPES: dict[str, type[PacktrainError]] = {
    kind.__name__: kind
    for kind in (
        RecipeError,
        DataError,
        SetupError,
        DivergedError,
        WorkersLostError,
        InfraError,
        PacktrainError,
    )
}
_GRACE_SECONDS = 20.0
"""How long a learner may take to finish its step and save after a signal."""

logger = logging.getLogger("packtrain")


def supervise(
    job_of_life: Callable[[int], Job],
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
            return _live(job, ours, on_report)
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


def _live(job: Job, ours: Reserved, on_report: Callable[[Report], None]) -> dict[str, object]:
    fleet = job.section.fleet
    with (
        _learner(job) as (process, lines_in, lines_out),
        cluster(ours.folder, fleet.num_workers * fleet.cpus_per_worker) as address,
    ):
        controller = start_controller(job)
        with suppress(BrokenPipeError):
            lines_in.write(address + "\n")
            lines_in.flush()
        facts = _follow(process, lines_out, on_report)
        del controller  # its only handle: the actor lives as long as we hold it
    if facts is None:
        raise InfraError(
            "the learner must finish, it ended without a word",
            where="rl",
            why=f"exit code {process.wait()} (-9: killed from outside, perhaps out of memory)",
            fix=f"look at {job.log_directory / 'rl.learner.err'}",
        )
    return facts


@contextmanager
def _learner(job: Job) -> Iterator[tuple[subprocess.Popen[str], IO[str], IO[str]]]:
    """The learner's process; started before Ray, for its imports take long; gone at the end."""
    with (job.log_directory / "rl.learner.err").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "rl.learn"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
    assert process.stdin and process.stdout
    try:
        process.stdin.write(job.model_dump_json() + "\n")
        process.stdin.flush()
        yield process, process.stdin, process.stdout
    finally:
        process.kill()
        process.wait()
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()


def _follow(
    process: subprocess.Popen[str], lines: IO[str], on_report: Callable[[Report], None]
) -> dict[str, object] | None:
    """Pass reports on until the learner is done; None when it ended without a word.

    When we are interrupted it is asked to finish its step and save, and followed until it has.
    """
    try:
        return _read_reports(lines, on_report)
    except KeyboardInterrupt:
        process.terminate()
        killer = threading.Timer(_GRACE_SECONDS, process.kill)
        killer.start()
        _read_reports(lines, on_report)
        killer.cancel()
        raise


def _read_reports(lines: IO[str], on_report: Callable[[Report], None]) -> dict[str, object] | None:
    for line in lines:
        report = Report.model_validate_json(line)
        if report.kind == "failed":
            raise _error_of(report.facts)
        if report.kind == "done":
            return report.facts
        on_report(report)
    return None


def _error_of(facts: Mapping[str, object]) -> PacktrainError:
    kind = _TYPES.get(str(facts["type"]), PacktrainError)
    return kind(
        str(facts["what"]),
        where=str(facts["where"]),
        why=str(facts["why"]),
        fix=str(facts["fix"]),
    )
