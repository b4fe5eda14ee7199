"""The controller as a Ray actor: builds its parts from a job and serves the learner."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from itertools import chain
from typing import cast

import ray
from ray.actor import ActorHandle, ActorProxy

from ground.errors import DataError, InfraError
from ground.lease import Fence, Lease
from ground.logs import setup_logging
from ground.records import Prompt
from ground.roles import enter_role
from rl.balance import Balance
from rl.books import Books
from rl.buffer import Outcome, Plan
from rl.controller import Controller
from rl.job import Job
from rl.journal import Journal
from rl.pool import Pool
from rl.rounds import Rounds
from rl.teacher_worker import TeacherConfig
from rl.teachers import RayTeacher, Teachers
from rollout.fleet import Fleet
from rollout.judge_fleet import JUDGES, JudgedFleet, as_judge_event
from rollout.judge_worker import IN_HAND, JudgeConfig, JudgeWorker
from rollout.ray_machines import RayMachines
from rollout.ray_worker import RayWorker, fleet_of, worker_bundle
from rollout.roster import Event
from rollout.systems import draw_system
from rollout.task import WorkerConfig
from rollout.weights import Published, WeightKeeper, on_this_machine, start_keeper, this_node


class ControllerActor:
    """One asyncio actor with source, buffer, ledger and fleet; its calls overlap.

    It owns fleet and weight keeper: they end with it, the learner's end does not touch them. It
    ends itself when its supervisor is silent, and takes no messages of another life of the run.
    """

    def __init__(self, job: Job, pool: Pool) -> None:
        setup_logging(job.log_directory / "rl.controller.log")
        logging.getLogger("ray").setLevel(logging.WARNING)
        enter_role("controller")
        section = job.section
        self._fence = Fence(job.incarnation)
        self._lease = Lease("supervisor", section.lease_seconds)
        self._ledger = Journal(job.directory / "ledger.jsonl", buffered=True)
        self._events = Journal(job.directory / "events.jsonl")
        self._prompts = {prompt.id: prompt for prompt in pool.training}
        self._books = Books.of(section, pool.training, job.seed, self._ledger.append)
        self._rounds = Rounds(job.directory / "curriculum", section.curriculum.round_every)
        config = WorkerConfig(
            job.model,
            section.engine,
            section.fleet,
            job.rewards,
            job.sandbox,
            incarnation=job.incarnation,
            lease_seconds=section.lease_seconds,
        )
        self._machines = machines = RayMachines(worker_bundle(config))
        self._fleet = Fleet(
            fleet_of(config),
            lambda: RayWorker(config, avoided=machines.avoided),
            self._events.append,
            machines,
            full_at=section.engine.num_slots / section.group_size,
        )
        self._judged = self._with_judge(job)
        self._teachers = _teachers(job, self._events.append)
        overlaps = section.max_staleness > 0
        self._balance = Balance(
            self._fleet, section.fleet, overlaps=overlaps, teachers=self._teachers
        )
        self._keeper = start_keeper()
        self._keeper_check = KeeperCheck(self._keeper, section.silent_seconds)
        self._controller = Controller(
            self._books,
            self._judged or self._fleet,
            section,
            seed=job.seed,
            validation=pool.validation,
            system_of=lambda prompt, pass_: draw_system(
                job.systems,
                prompt.capability,
                run_seed=job.seed,
                prompt_id=prompt.id,
                pass_=pass_,
            ),
            in_flight=section.groups_in_flight,
            note=self._events.append,
            teachers=self._teachers,
        )

    async def keeper(self) -> ActorProxy[WeightKeeper]:
        """The actor that takes published weights."""
        return self._keeper

    async def start(self) -> None:
        """Bring workers, judges and teachers up; weights come with `begin`."""
        others = [each.start() for each in (self._judged, self._teachers) if each]
        await asyncio.gather(self._fleet.start(), *others)

    async def begin(
        self,
        incarnation: int,
        version: int,
        saved: Mapping[str, object] | None,
        replayed: Sequence[Sequence[Outcome]],
    ) -> None:
        """Hand the first weights over and start sampling.

        Args:
            saved: the books of the cut that the learner went on from, if there was one.
            replayed: what became of the draws of each step that it repeated since.
        """
        self._fence.check(incarnation)
        restore_books(self._books, self._ledger, self._rounds, saved, replayed, self._prompts)
        await self._controller.begin(version, await self._weights(version))

    async def next_batch(
        self, incarnation: int, step: int, step_seconds: float
    ) -> tuple[Plan, dict[str, float]]:
        """See `Controller.next_batch`; with the speeds that were measured meanwhile.

        Raises:
            WorkersLostError: the fleet has failed, even if this step's groups are all there.
        """
        self._fence.check(incarnation)
        plan, gauges = await self._controller.next_batch(step)
        judge = self._judged.gauges() if self._judged else {}
        return plan, gauges | self._balance.turn(step_seconds, plan.rollouts) | judge

    async def publish(self, incarnation: int, version: int, evaluate: bool) -> float | None:
        """See `Controller.publish`; the weights lie with the keeper."""
        self._fence.check(incarnation)
        weights = await self._weights(version)
        score = await self._controller.publish(version, weights, evaluate=evaluate)
        self._rounds.keep(self._books.curriculum)
        self._ledger.flush()
        return score

    async def evaluate(self, incarnation: int, version: int) -> float | None:
        """See `Controller.evaluate`."""
        self._fence.check(incarnation)
        return await self._controller.evaluate(version)

    async def leave(self, incarnation: int) -> None:
        """See `Controller.leave`."""
        self._fence.check(incarnation)
        self._controller.leave()

    async def state(self, incarnation: int) -> dict[str, object]:
        """The books, and how far the ledger's file goes with them."""
        self._fence.check(incarnation)
        return {**self._controller.state(), "ledger_bytes": self._ledger.sync()}

    async def pulse(self, incarnation: int) -> dict[str, object]:
        """How it is, asked by the supervisor once a second; renews the lease.

        Raises:
            InfraError: the keeper is gone, and with it what a lost worker would need to come back.
        """
        self._fence.check(incarnation)
        self._lease.renew()
        self._keeper_check.look()
        is_taken_away = this_node() in self._machines.leaving
        status = {**self._controller.status(), "is_taken_away": is_taken_away}
        others = [each.stats() for each in (self._judged, self._teachers) if each]
        return {**status, "fleet": self._fleet.stats(), "others": list(chain(*others))}

    async def close(self, incarnation: int, reason: str) -> dict[str, int]:
        """End sampling and fleet; returns the ledger's closing sums."""
        self._fence.check(incarnation)
        sums = await self._controller.close(reason)
        others = [each.close() for each in (self._judged, self._teachers) if each]
        await asyncio.gather(self._fleet.close(), *others)
        self._ledger.close()
        self._events.close()
        return sums

    def _with_judge(self, job: Job) -> JudgedFleet | None:
        """The fleet with judges behind it, where a prompt wants one."""
        if job.judge is None:
            return None
        config = JudgeConfig.of(
            job.judge, incarnation=job.incarnation, lease_seconds=job.section.lease_seconds
        )
        machines = RayMachines(worker_bundle(config))
        judges = Fleet(
            config.fleet,
            lambda: RayWorker(config, JudgeWorker, machines.avoided),
            lambda event: self._events.append(as_judge_event(event)),
            machines,
            crew=JUDGES,
            most_each=IN_HAND,
        )
        return JudgedFleet(self._fleet, judges, job.judge.settings)

    async def _weights(self, version: int) -> Published:
        answer = cast(Awaitable[tuple[int, Published]], self._keeper.current.remote())
        current, published = await answer
        if current != version:
            raise DataError(f"the keeper must have version {version}, it has {current}", where="rl")
        return published


def _teachers(job: Job, note: Callable[[Event], None]) -> Teachers | None:
    """Those that the recipe wants; none come up before `start`."""
    section, teaching = job.section, job.teaching
    if section.distill is None or teaching is None:
        return None
    config = TeacherConfig(section.distill, teaching, job.incarnation, section.lease_seconds)
    machines = RayMachines(config.bundle)

    def spawn() -> RayTeacher:
        return RayTeacher(config, machines.avoided)

    return Teachers(section.distill, section.fleet, spawn, note, machines)


class KeeperCheck:
    """Asks the keeper for a sign of life and looks at its answer the next time.

    It may be busy with gigabytes of weights, so nobody waits for it here; but not for ever.
    """

    def __init__(self, keeper: ActorProxy[WeightKeeper], silent_seconds: float) -> None:
        self._keeper, self._silent_seconds = keeper, silent_seconds
        self._answer: asyncio.Future[str] | None = None
        self._asked = 0.0

    def look(self) -> None:
        """Look at the last answer, and ask again.

        Raises:
            InfraError: the keeper is gone, or silent for too long.
        """
        answer = self._answer
        if answer is not None and not answer.done():
            silent = time.monotonic() - self._asked
            if silent > self._silent_seconds:
                raise self._lost(f"it was silent for {silent:.0f} s")
            return
        if answer is not None and (answer.cancelled() or answer.exception()):
            raise self._lost("cancelled" if answer.cancelled() else str(answer.exception()))
        self._asked = time.monotonic()
        self._answer = asyncio.ensure_future(cast(Awaitable[str], self._keeper.node.remote()))

    def _lost(self, why: str) -> InfraError:
        return InfraError("the weight keeper must live, it is gone", where="controller", why=why)


def restore_books(
    books: Books,
    ledger: Journal,
    rounds: Rounds,
    saved: Mapping[str, object] | None,
    replayed: Sequence[Sequence[Outcome]],
    prompts: Mapping[str, Prompt],
) -> None:
    """Bring new books to where the learner is: the cut, then the journaled steps since.

    The ledger's file and the rounds go back to the cut with them, and are written again from there.
    """
    if saved is None:
        ledger.rewind(0)
        books.open()
    else:
        ledger.rewind(cast(int, saved["ledger_bytes"]))
        books.load_state_dict(saved, prompts)
    rounds.forget_after(books.version)
    rounds.keep(books.curriculum)
    for outcomes in replayed:
        books.replay(outcomes)
        rounds.keep(books.curriculum)


def start_controller(job: Job, pool: Pool) -> ActorHandle:
    """Start the controller of a job and, in the background, its workers.

    It runs where the run directory is: here.
    """
    options = {"name": job.controller_name, "num_cpus": 0, "max_restarts": 0}
    actor = (
        ray.remote(ControllerActor)
        .options(**options, max_concurrency=1000, scheduling_strategy=on_this_machine())
        .remote(job, pool)
    )
    actor.start.remote()
    return cast(ActorHandle, actor)
