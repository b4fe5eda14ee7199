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
import os
import threading
import time
from collections.abc import Callable, Mapping

from ground import faults, stacks
from ground.errors import InfraError, PacktrainError, SetupError, WorkersLostError
from ground.roles import enter_role
from rl.actors import start_controller
from rl.cluster import cluster
from rl.job import Job, Report
from rl.learner_process import LearnerProcess
from rl.pool import Pool
from rl.preflight import ClusterStartError
from rl.processes import Reserved
from rl.pulse import remote_pulse
from rl.ranks import Ranks
from rl.speaker import error_of
from rl.watchdog import stacks_folder, watched

_GRACE_SECONDS = 20.0
"""How long a learner may take to finish its step and save after a signal."""
_MAX_STARTS = 5
"""Times in a row that Ray may fail to come up: that is the machine's fault and costs no life."""
_PAUSE_SECONDS = 2.0

logger = logging.getLogger("packtrain")


def supervise(
    job_of_life: Callable[[int], Job],
    pool: Pool,
    ours: Reserved,
    *,
    on_report: Callable[[Report], None],
    note: Callable[[Mapping[str, object]], None],
    ranks: Ranks,
) -> dict[str, object]:
    """Run the loop to its end, over as many lives as the recipe allows; returns its facts.

    Args:
        job_of_life: the job of a life, by number from 0.
        on_report: receives the learner's reports.
        note: receives an event for the timeline.
        ranks: who starts the learner, or those of all ranks.

    Raises:
        WorkersLostError: the last allowed life was lost as well.
        SetupError: Ray does not come up on this machine.
    """
    job = job_of_life(0)
    os.environ[stacks.VARIABLE] = str(stacks_folder(job))
    enter_role("supervisor")
    budget = Budget(job.section.max_restarts)

    def hear(report: Report) -> None:
        faults.point("report")
        budget.see(report)
        on_report(report)

    life = 0
    while True:
        job = job_of_life(life)
        try:
            faults.point("life.begin")
            return _live(job, pool, ours, hear, ranks)
        except InfraError as error:
            faults.point("sweep")
            ours.sweep()
            budget.spend(error, job)
            logger.warning("the loop is started again from its last checkpoint: %s", error)
            now = time.time()
            note(
                {"time": now, "kind": "restart", "role": "supervisor", "start": now, "end": now}
                | {"cause": error.what}
            )
            life += 1


class Budget:
    """How many lives may be lost without getting anywhere.

    Example:
        max_restarts 2: a third life lost without a new step in between → WorkersLostError
    """

    def __init__(self, max_restarts: int, sleep: Callable[[float], None] = time.sleep) -> None:
        self._max_restarts, self._sleep = max_restarts, sleep
        self._lost = self._unstarted = self._newest_step = 0

    def see(self, report: Report) -> None:
        """A step that no life made before begins the count anew."""
        if report.kind == "step" and report.step > self._newest_step:
            self._newest_step, self._lost = report.step, 0
        self._unstarted = 0

    def spend(self, error: InfraError, job: Job) -> None:
        """Count a lost life; a machine that could not start Ray is waited for instead.

        Raises:
            WorkersLostError, SetupError: no more may be lost.
        """
        if isinstance(error, ClusterStartError):
            self._unstarted += 1
            if self._unstarted >= _MAX_STARTS:
                raise SetupError(
                    f"{error.what}, it failed {self._unstarted} times in a row",
                    where="rl",
                    why=error.why,
                    fix="look at what keeps the machine busy or ended the cluster, then continue "
                    "with --resume",
                ) from error
            return self._sleep(_PAUSE_SECONDS * self._unstarted)
        self._lost += 1
        if self._lost > self._max_restarts:
            raise WorkersLostError(
                f"the loop was lost {self._lost} times without a new step, rl.max_restarts allows "
                f"{self._max_restarts}",
                where="rl",
                why=str(error),
                fix=f"look at {job.log_directory}, then continue with --resume",
            ) from error


def _live(
    job: Job, pool: Pool, ours: Reserved, on_report: Callable[[Report], None], ranks: Ranks
) -> dict[str, object]:
    joined = cluster(
        ours.folder,
        job.section.fleet,
        job.section.engine,
        job.model,
        learner=job.section.learner,
        namespace=job.namespace,
        is_first=job.incarnation == 0,
    )
    with ranks.begun(job, joined) as (learner, address):
        controller = start_controller(job, pool)
        with watched(job, remote_pulse(controller, job.incarnation), learner):
            learner.tell(address)
            facts = _follow(learner, on_report, ranks)
        del controller  # its only handle: the actor lives as long as we hold it
    return facts


def _follow(
    learner: LearnerProcess, on_report: Callable[[Report], None], ranks: Ranks
) -> dict[str, object]:
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
        ranks.require_all()
        raise


def _read_reports(
    learner: LearnerProcess, on_report: Callable[[Report], None]
) -> dict[str, object]:
    while True:
        report = learner.hear()
        if report.kind == "failed":
            raise error_of(report.facts)
        if report.kind == "done":
            return report.facts
        on_report(report)
