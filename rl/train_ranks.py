"""The learner's ranks as workers of Ray Train, on the machines of the cluster that have room.

    life n:  Ray joined ─▶ store held here ─▶ fit() ─┬▶ worker of rank 0, on this machine:
                                                     │  keeps its devices, for the supervisor
                                                     └▶ others: hosts (rl/hosts.py), each runs its
                                                        rank's learner ─▶ over ─▶ all leave

Ray Train starts a worker in each place and looks twice a second whether it is still there, and its
machine. The rest stays ours. Its failure handling is switched off (a lost rank costs the
life of all of them, and rl/supervisor.py decides on the next), it is given no checkpoint (the cut
is rank 0's, rl/snapshot.py, under the run's own commit protocol; Ray Train's store would have to be
seen by every machine), and it makes no process group: learners are processes of their own below
its workers, started and joined as under `accelerate launch`, so that one that hangs can be killed.

Nothing of the run is read on other machines. Config and tokenizer come along (rollout/luggage.py),
weights and moments from rank 0, and what a rank has logged goes back to the run at its end. A cut
needs nothing of that kind: whatever ZeRO has split is gathered by the ranks' own collectives.
"""

from __future__ import annotations

import json
import logging
import os
import pickle
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import ray
from ray.train import get_context
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

from ground.errors import FailureKind, InfraError, PacktrainError
from ground.launch import HELD, Launch, variables_of
from ground.roll import Roll
from rl.cluster import Others, free_machines, machines, seats_beside
from rl.hosts import Hosts, host_life
from rl.job import Job
from rl.learner_process import LearnerProcess, learner_process
from rl.ray_train import own_error, seated_trainer
from rl.seats import Machine
from rl.speaker import facts_of
from rl.watchdog import dump_stacks
from rollout.failures import sorted_failures
from rollout.luggage import Luggage, own_folder
from rollout.network import transport
from rollout.places import in_words, wait_for_room
from rollout.preflight import ClusterStartError

_DEVICES = "CUDA_VISIBLE_DEVICES"
_START_SECONDS = 180.0
"""From asking for the workers until rank 0's has said which devices it has."""
_LEAVE_SECONDS = 10.0
"""For Ray Train to end its workers in order; then they end with our connection to the cluster."""
_LOGS_SECONDS = 3.0
"""Longest wait for what a rank that was not lost has logged."""
_LOG_BYTES = 256 << 10
"""The end of each of its files that goes back."""
_POLL_SECONDS = 0.1
logger = logging.getLogger("packtrain")


@dataclass(frozen=True, slots=True)
class Order:
    """What a worker has to know.

    Example:
        Order(Launch("ddp", 0, 2), "10.0.0.7", 40123, life=0, luggage=Luggage.pack(model))
    """

    launch: Launch
    """Of rank 0; the others differ in their number alone."""
    host: str
    port: int
    """Of the store that the supervisor holds."""
    life: int
    luggage: Luggage
    has_gpus: bool = False

    def environment(self, rank: int, devices: str) -> dict[str, str]:
        """What makes a process that rank's learner on this machine."""
        launch = replace(self.launch, rank=rank)
        given = variables_of(launch, self.host, self.port, attempt=self.life) | transport()
        return {**given, _DEVICES: devices if self.has_gpus else ""}

    def of_leader(self, devices: str) -> dict[str, str]:
        """The same for rank 0; alone it is a process like any other."""
        given = self.environment(0, devices)
        return given if self.launch.num_ranks > 1 else {_DEVICES: given[_DEVICES]}


class TrainRanks:
    """See `rl.ranks.Ranks`.

    Example:
        TrainRanks(ours.folder).begun(job, cluster(…))

    Args:
        folder: for Ray Train's own notes, of which nobody has any use.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def begun(
        self, job: Job, joined: AbstractContextManager[str]
    ) -> Iterator[tuple[LearnerProcess, str]]:
        """See `Ranks.begun`; rank 0's learner begins when it is known which devices it has."""
        with (
            joined as address,
            _held(job) as (roll, order),
            self._group(job, order, roll) as group,
            Hosts(roll, _rank_lost) as hosts,
        ):
            given = order.of_leader(group.devices())
            try:
                with (
                    learner_process(job, lambda: dump_stacks(job), given) as learner,
                    group.followed(learner),
                    hosts.life(job, learner.give_up),
                ):
                    yield learner, address
            finally:
                _bring_logs_home(job, roll)

    def require_all(self) -> None:
        """No launcher tells us to leave because of another rank."""

    @contextmanager
    def _group(self, job: Job, order: Order, roll: Roll) -> Iterator[_Group]:
        """The workers, until all have left."""
        section = job.section.learner
        bundle = {"CPU": section.cpus_per_rank, "GPU": section.gpus_per_rank}
        bundle = {name: amount for name, amount in bundle.items() if amount}
        others = Others(job.section.distill, job.judge)
        places = wait_for_room(
            lambda: seats_beside(others, job.section, bundle, machines()),
            section.room_seconds if job.incarnation else 0.0,
        )
        logger.info("the learner's ranks sit on %d machines", len(set(places)))
        trainer = seated_trainer(
            work,
            {"order": pickle.dumps(order)},  # so that only workers have to know what it is
            bundle,
            places,
            name=f"life-{job.incarnation}",
            folder=self._folder / "train",
        )
        group = _Group(trainer, roll, order.life)
        try:
            yield group
        except ClusterStartError as error:
            error.why = "; ".join(filter(None, (error.why, _wanted_and_free(bundle))))
            raise
        finally:
            group.leave()


class _Group:
    """Ray Train's run of one life, followed from a thread named `train`."""

    def __init__(self, trainer: DataParallelTrainer, roll: Roll, life: int) -> None:
        self._trainer, self._roll, self._life = trainer, roll, life
        self._lock = threading.Lock()
        self._error: PacktrainError | None = None
        self._tell: Callable[[PacktrainError], None] | None = None
        self._thread = threading.Thread(target=self._fit, name="train", daemon=True)
        self._thread.start()

    def devices(self) -> str:
        """Which GPUs rank 0's worker keeps, once it is there.

        Raises:
            InfraError: a worker was lost, or did not come.
        """
        deadline = time.monotonic() + _START_SECONDS
        while (told := self._roll.heard(f"devices/{self._life}")) is None:
            if self._error:
                raise self._error
            if time.monotonic() > deadline:
                raise ClusterStartError(
                    f"Ray Train must start the learner's ranks within {_START_SECONDS:g} s",
                    where="rl.learner",
                )
            time.sleep(_POLL_SECONDS)
        return told

    @contextmanager
    def followed(self, learner: LearnerProcess) -> Iterator[None]:
        """While this lasts, rank 0's learner is given up as soon as a worker is lost."""
        with self._lock:
            self._tell = learner.give_up
            if self._error:
                learner.give_up(self._error)
        yield

    def leave(self) -> None:
        """Have the workers leave."""
        with suppress(PacktrainError):
            self._roll.tell(f"over/{self._life}", "over")
        self._thread.join(_LEAVE_SECONDS)

    def _fit(self) -> None:
        try:
            self._trainer.fit()
        except Exception as error:  # Ray Train's own, and whatever Ray says when we leave first
            with self._lock:
                self._error = own_error(error)
                if self._tell:
                    self._tell(self._error)


def work(settings: dict[str, object]) -> None:
    """What a worker does: it keeps its devices and hosts its rank's learner, for one life."""
    order: Order = pickle.loads(cast(bytes, settings["order"]))
    rank = get_context().get_world_rank()
    environment = order.environment(rank, os.environ.get(_DEVICES, ""))
    roll = Roll(environment)
    with told_home(roll, order.life):
        _work(order, roll, environment)


@contextmanager
def told_home(roll: Roll, life: int) -> Iterator[None]:
    """What would end the next life just as well is told to rank 0's supervisor (rl/hosts.py).

    Its own learner sees only that a rank is gone, and may be faster to say so than Ray Train.
    """
    rank = roll.launch.rank
    try:
        with sorted_failures("hosting the learner"):
            yield
    except PacktrainError as error:
        error.where = ", ".join(filter(None, (f"rank {rank}", error.where)))
        if error.kind is not FailureKind.INFRA:
            roll.tell(f"lost/{life}/{rank}", json.dumps(facts_of(error)))
        raise


def _work(order: Order, roll: Roll, environment: dict[str, str]) -> None:
    if roll.launch.is_main:
        roll.tell(f"devices/{order.life}", environment[_DEVICES])
        while roll.heard(f"over/{order.life}") is None:
            time.sleep(_POLL_SECONDS)
        return
    unpacked = order.luggage.unpack()
    try:
        with own_folder() as folder:

            def at_home(job: Job) -> Job:
                own = {"model": unpacked.model, "receives_weights": True}
                own |= {"directory": folder, "log_directory": folder}
                return job.model_copy(update=own | {"logs_end_in": job.log_directory})

            try:
                host_life(roll, order.life, at_home, environment)
            finally:
                roll.tell(_logs(order.life, roll.launch.rank), json.dumps(_ends_of_files(folder)))
    finally:
        unpacked.remove()


@contextmanager
def _held(job: Job) -> Iterator[tuple[Roll, Order]]:
    """The ranks' store of a life, in this process, and what the workers are told."""
    section = job.section.learner
    launch, host = Launch(section.spread, 0, section.num_ranks), ray.util.get_node_ip_address()
    ours = variables_of(launch, host, port=0, attempt=job.incarnation)
    roll = Roll({name: value for name, value in ours.items() if name != HELD})
    luggage = Luggage.pack(job.model)
    yield (
        roll,
        Order(launch, host, roll.port, job.incarnation, luggage, bool(section.gpus_per_rank)),
    )


def _wanted_and_free(bundle: Mapping[str, float]) -> str:
    """What Ray Train may have waited for: `seats` compares with all that machines have, of which
    others may have taken some."""
    try:
        return wanted_and_free(bundle, free_machines())
    except Exception:  # Ray's own: a cluster that is gone has nothing to say, the first error has
        return ""


def wanted_and_free(bundle: Mapping[str, float], free: Sequence[Machine]) -> str:
    """In words, the run's own machine first."""
    each = "; ".join(in_words(machine.resources) for machine in free)
    return f"a rank wants {in_words(bundle)}, free are now, this machine first: {each}"


def _rank_lost(rank: int, seconds: float) -> PacktrainError:
    return InfraError(
        f"rank {rank}'s Ray Train worker must go on, it gave no sign of life for {seconds:g} s",
        where="rl.learner",
    )


def _bring_logs_home(job: Job, roll: Roll) -> None:
    """Write what the other ranks have logged beside the run's own logs."""
    deadline = time.monotonic() + _LOGS_SECONDS
    for rank in range(1, roll.launch.num_ranks):
        with suppress(PacktrainError, OSError):
            left = max(deadline - time.monotonic(), 0.0)
            files = json.loads(roll.hear(_logs(job.incarnation, rank), "log", left))
            for name, text in files.items():
                with (job.log_directory / Path(name).name).open("a", encoding="utf-8") as file:
                    file.write(text)


def _logs(life: int, rank: int) -> str:
    return f"logs/{life}/{rank}"


def _ends_of_files(folder: Path) -> dict[str, str]:
    paths = [path for path in folder.rglob("*") if path.suffix in (".log", ".err", ".txt")]
    return {path.name: path.read_bytes()[-_LOG_BYTES:].decode(errors="replace") for path in paths}
