"""Owns every process of the loop and brings it back to life from the last checkpoint.

    life n: cluster ─▶ keeper, controller ─▶ learner begins ─▶ reports … ─▶ done
                                                  └── killed, or the controller gone ─▶ life n + 1

Learner, controller, fleet and Ray itself live and end together: whichever of them is killed, the
next life starts all of them from the same cut, and so does one that has another number of ranks
(rl/share.py), from a cut made for it. (A single rollout worker is the fleet's business and ends
nothing.) What the learner could not know better than us is not tried again: a recipe, data or
divergence error, a fleet that is lost, or a defect of ours ends the stage at once.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping

from ground import faults, stacks
from ground.errors import InfraError, PacktrainError, WorkersLostError
from ground.roles import enter_role
from ground.signals import held_signals
from rl.actors import start_controller
from rl.cluster import cluster
from rl.job import Job, Report
from rl.learner_process import LearnerProcess
from rl.pool import Pool
from rl.pulse import remote_pulse
from rl.ranks import Ranks
from rl.share import Share, Split
from rl.speaker import error_of
from rl.watchdog import stacks_folder, watched
from rollout.cluster import MAX_STARTS, PAUSE_SECONDS, not_started
from rollout.preflight import ClusterStartError
from rollout.processes import Reserved

_GRACE_SECONDS = 20.0
"""How long a learner may take to finish its step and save after a signal."""

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

    life, recipe, split = 0, job.section, None
    share = Share(recipe)
    while True:
        job = job_of_life(life)
        if split:
            job = job.model_copy(update={"section": split.applied(recipe)})
        share.begin(job.section.learner.num_ranks)
        try:
            faults.point("life.begin")
            return _live(job, pool, ours, hear, ranks, share)
        except AnotherSplit as wish:
            ours.sweep()
            split, life = wish.split, life + 1
            note(_shared_out(job.section.learner.num_ranks, wish.split))
        except InfraError as error:
            faults.point("sweep")
            ours.sweep()
            budget.spend(error, job)
            logger.warning("the loop is started again from its last checkpoint: %s", error)
            now = time.time()
            kind = "unstarted" if isinstance(error, ClusterStartError) else "restart"
            note(
                {"time": now, "kind": kind, "role": "supervisor", "start": now, "end": now}
                | {"cause": error.what}
            )
            life += 1


class AnotherSplit(Exception):
    """A life has ended at a cut, so that the next one has another number of ranks."""

    def __init__(self, split: Split) -> None:
        super().__init__(split)
        self.split = split


def _shared_out(before: int, split: Split) -> dict[str, object]:
    """What is told of it."""
    now, cause = time.time(), f"from {before} to {split.ranks} learner ranks"
    logger.info("the devices are shared out anew: %s, workers: %d", cause, split.workers)
    event = {"time": now, "kind": "share", "role": "supervisor", "start": now, "end": now}
    return {**event, "cause": cause, "ranks": split.ranks, "workers": split.workers}


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
            if self._unstarted >= MAX_STARTS:
                raise not_started(error, self._unstarted) from error
            return self._sleep(PAUSE_SECONDS * self._unstarted)
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
    job: Job,
    pool: Pool,
    ours: Reserved,
    on_report: Callable[[Report], None],
    ranks: Ranks,
    share: Share,
) -> dict[str, object]:
    joined = cluster(
        ours.folder,
        job.section.fleet,
        job.section.engine,
        job.model,
        learner=job.section.learner,
        distill=job.section.distill,
        judge=job.judge,
        namespace=job.namespace,
        is_first=job.incarnation == 0,
    )
    with ranks.begun(job, joined) as (learner, address):
        controller = start_controller(job, pool)
        with watched(job, remote_pulse(controller, job.incarnation), learner):
            learner.tell(address)
            facts = _follow(learner, on_report, ranks, share)
        del controller  # its only handle: the actor lives as long as we hold it
    return facts


def _follow(
    learner: LearnerProcess, on_report: Callable[[Report], None], ranks: Ranks, share: Share
) -> dict[str, object]:
    """Pass reports on until the learner is done; when we are asked to end, let it save first.

    A signal breaks nothing off here: a report that was read and not passed on would be lost.

    Raises:
        AnotherSplit: the learner was asked to save and leave, and has done so.
        Interrupted: so have we.
    """
    wishes: list[Split] = []
    facts: dict[str, object] = {}
    failure: PacktrainError | None = None
    with _Parting(learner) as parting:

        def hear(report: Report) -> None:
            on_report(report)
            if wishes or report.kind != "step":
                return
            if split := share.see(report.step, report.numbers):
                wishes.append(split)
                parting.ask()

        with held_signals(parting.insist) as pending:
            try:
                facts = _read_reports(learner, hear)
            except PacktrainError as error:
                failure = error
            if pending.requested:
                if failure:
                    logger.warning(
                        "interrupted; steps since the last checkpoint are lost: %s", failure
                    )
                ranks.require_all()
    if failure:
        raise failure
    if wishes and not facts:
        raise AnotherSplit(wishes[0])
    return facts


class _Parting:
    """Has a learner save and leave: asked once, and killed when we have to go and it does not.

        going on → asked → gone      insisted on: killed after `_GRACE_SECONDS`

    `ask` and `insist` may be called in a signal's handler, in which no thread may be begun and no
    lock taken that its main thread holds; hence the thread that waits from the beginning.
    """

    def __init__(self, learner: LearnerProcess) -> None:
        self._learner = learner
        self._left_to_ask = [learner]  # a list gives its last element to one caller only
        self._is_insisted_on, self._is_over = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="parting", daemon=True)

    def ask(self) -> None:
        """Ask it to finish its step and save; asked again, it would leave without having saved."""
        try:
            learner = self._left_to_ask.pop()
        except IndexError:
            return
        learner.ask_to_stop()

    def insist(self) -> None:
        """Ask it, and wait no longer than `_GRACE_SECONDS` for its end."""
        self.ask()
        self._is_insisted_on.set()

    def _watch(self) -> None:
        self._is_insisted_on.wait()
        if not self._is_over.wait(_GRACE_SECONDS):
            self._learner.close()

    def __enter__(self) -> _Parting:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._is_insisted_on.set()


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
