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
        actors = start_controller(job)
        with suppress(BrokenPipeError):
            lines_in.write(address + "\n")
            lines_in.flush()
        facts = _follow(lines_out, on_report)
        code = process.wait(_GRACE_SECONDS)
        del actors
    if facts is None:
        raise InfraError(
            f"the learner must finish, it ended with exit code {code} and no word",
            where="rl",
            why="killed from outside (signal 9: perhaps out of memory)" if code < 0 else "",
            fix=f"look at {job.log_directory / 'rl.learner.log'}",
        )
    return facts


@contextmanager
def _learner(job: Job) -> Iterator[tuple[subprocess.Popen[str], IO[str], IO[str]]]:
    """The learner's process, started first, because its imports take longer than Ray's start.

    On the way out it is asked to save if we were interrupted, and is gone in any case.
    """
    log = (job.log_directory / "rl.learner.err").open("ab")
    process = subprocess.Popen(
        [sys.executable, "-m", "rl.learn"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        text=True,
        start_new_session=True,
    )
    log.close()
    if process.stdin is None or process.stdout is None:
        raise AssertionError("both ends were asked for")
    try:
        process.stdin.write(job.model_dump_json() + "\n")
        process.stdin.flush()
        yield process, process.stdin, process.stdout
    except KeyboardInterrupt:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
        raise
    finally:
        process.kill()
        process.wait()
        with suppress(BrokenPipeError):
            process.stdin.close()
        process.stdout.close()


def _follow(lines: IO[str], on_report: Callable[[Report], None]) -> dict[str, object] | None:
    """Pass reports on until the learner is done; None when it ended without a word."""
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
