"""The Ray cluster that a life of the loop runs in: one of our own, or the one that we are a job of.

RAY_ADDRESS set (as in a Ray job) → join that cluster       otherwise → start one, end it
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import ray
from ray._private.state import available_resources_per_node

from distill.config import RolloutDistillSection
from ground import faults, stacks
from ground.disk import require_space
from ground.errors import SetupError
from ground.signals import install_signals
from rl.config import LearnerSection, RlSection
from rl.lean_ray import lean_ray
from rl.preflight import ClusterStartError, check_cluster, must_answer
from rl.processes import MARK, cluster_address
from rl.room import Places, Want, require_places, require_room, wait_for_room
from rl.seats import Machine, Wanted, seats
from rollout.bundle import bundle_of
from rollout.config import EngineSection, FleetSection
from rollout.judge_source import JudgeSource

NAMESPACE = "packtrain"
"""Of a cluster of our own; in another one each run has a namespace of its own."""
_TRAVELS = (MARK, faults.VARIABLE, stacks.VARIABLE)
"""Variables that go to our actors, which somebody else's raylets start; the run's token is none."""
_SHARED_MEMORY = Path("/dev/shm")
_MODELS_KEPT = 1
"""Room for a version that goes to another machine; here weights lie in the keeper's own memory."""
_OTHER_BYTES = 128 << 20
_FEWER = (
    "lower rl.fleet.num_workers (or max_workers), rl.fleet.cpus_per_worker or "
    "rl.engine.tensor_parallel (on processors alone only 1 is possible), or add machines"
)
_FEWER_RANKS = (
    "lower rl.learner.num_ranks or cpus_per_rank, rl.fleet.num_workers (or max_workers) or "
    "cpus_per_worker, or add machines"
)
_FEWER_TEACHERS = "; or lower rl.distill.num_teachers or rl.distill.cpus_per_teacher"
_FEWER_JUDGES = "; or lower judge.replicas or judge.cpus_per_replica"


@dataclass(frozen=True, slots=True)
class Others:
    """Who needs places besides workers and learner.

    Example:
        Others(distill, judge).places(nodes) → teachers and judges, each with what it takes
    """

    distill: RolloutDistillSection | None
    judge: JudgeSource | None

    @property
    def are_there(self) -> bool:
        """Whether there are any."""
        return self.distill is not None or self.judge is not None

    def places(self, nodes: Sequence[Mapping[str, float]]) -> list[Places]:
        """What each of them takes of one machine."""
        found = list[Places]()
        if teach := self.distill:
            found.append(Places("teachers", teach.num_teachers, teach.bundle))
        if judge := self.judge:
            bundle = bundle_of(judge.engine, judge.fleet.cpus_per_worker, nodes)
            found.append(Places("judges", judge.fleet.num_workers, bundle))
        return found

    def processors(self) -> list[Want]:
        """What they take of a machine's processors."""
        wants = list[Want]()
        if teach := self.distill:
            count = teach.num_teachers * teach.cpus_per_teacher
            wants.append(Want("teachers", count, "rl.distill: num_teachers x cpus_per_teacher"))
        if judge := self.judge:
            count = judge.fleet.num_workers * judge.fleet.cpus_per_worker
            wants.append(Want("judges", count, "judge: replicas x cpus_per_replica"))
        return wants

    @property
    def fewer(self) -> str:
        """Keys by which there would be fewer of them, behind those of workers."""
        return _FEWER_TEACHERS * bool(self.distill) + _FEWER_JUDGES * bool(self.judge)


def cluster(
    folder: Path,
    fleet: FleetSection,
    engine: EngineSection,
    model: Path,
    *,
    learner: LearnerSection | None = None,
    distill: RolloutDistillSection | None = None,
    judge: JudgeSource | None = None,
    namespace: str = NAMESPACE,
    is_first: bool = True,
) -> AbstractContextManager[str]:
    """Join or start Ray; the body gets its address.

    Args:
        folder: for the files of a cluster of our own.
        model: folder of the weights that will be handed over; decides the object store's size.
        learner: how its ranks are started; by default Ray has nothing to do with them.
        distill: how many teachers there are, if any.
        judge: the model behind `reward: judge`, whose replicas want room as well.
        is_first: whether there is no reason to wait for a machine that was lost.

    Raises:
        PlacementError: the machines have no room for all workers and teachers; Ray would wait for
            ever.
        SetupError: this one has less shared memory, or a cluster that we should join is none for us
            (rl/preflight.py).
        ClusterStartError: Ray does not come up, or does not answer.
    """
    address, learner = cluster_address(), learner or LearnerSection()
    others = Others(distill, judge)
    if address:
        seconds = 0.0 if is_first else learner.room_seconds
        return _joined(address, fleet, engine, others, namespace, seconds)
    return _started(folder, fleet, engine, model, namespace, learner, others)


def system_config() -> dict[str, object]:
    """Ray's own settings, a new mapping for each start, since Ray adds to what it is given.

    Its workers' niceness is 15 otherwise: beside any other busy program, a thirtieth of a core.
    """
    return {"worker_niceness": 0}


@contextmanager
def _started(
    folder: Path,
    fleet: FleetSection,
    engine: EngineSection,
    model: Path,
    namespace: str,
    learner: LearnerSection,
    others: Others,
) -> Iterator[str]:
    """A cluster on this machine: token authentication, no dashboard, files in `folder`.

    The machine need not have the processors of a spare worker.
    """
    num_cpus = _require_processors(fleet, learner, others, os.cpu_count() or 1)
    num_spare_cpus = fleet.spare * fleet.cpus_per_worker
    with _connected(
        "Ray must come up on this machine",
        address="local",
        num_cpus=max(math.ceil(num_cpus + num_spare_cpus), 1),
        include_dashboard=False,
        object_store_memory=_store_bytes(model),
        namespace=namespace,
        _temp_dir=str(folder),
        _system_config=system_config(),
    ):
        if others.are_there:
            _require_places(fleet, engine, others)
        yield ray.get_runtime_context().gcs_address


@contextmanager
def _joined(
    address: str,
    fleet: FleetSection,
    engine: EngineSection,
    others: Others,
    namespace: str,
    seconds: float,
) -> Iterator[str]:
    """Somebody's cluster; ours in it are the actors alone, which leave with us."""
    check_cluster(address)
    carried = {name: os.environ[name] for name in _TRAVELS if name in os.environ}
    with _connected(
        must_answer(address),
        address=address,
        namespace=namespace,
        runtime_env={"env_vars": carried},
    ):
        wait_for_room(lambda: _require_places(fleet, engine, others), seconds)
        yield ray.get_runtime_context().gcs_address


def _require_places(fleet: FleetSection, engine: EngineSection, others: Others) -> None:
    """Refuse what machines have no room for at once: the others, and workers in what is left."""
    nodes = [machine.resources for machine in machines()]
    bundle = bundle_of(engine, fleet.cpus_per_worker, nodes)
    fix = _FEWER + others.fewer
    require_places(fleet.most_workers, bundle, nodes, fix=fix, besides=others.places(nodes))


def seats_beside(
    others: Others, section: RlSection, bundle: Mapping[str, float], here: Sequence[Machine]
) -> list[str]:
    """Machines of the ranks, of which teachers, judges and workers all find their places too.

    Raises:
        PlacementError: with want and have, once the others have theirs.
    """
    fleet, whole = section.fleet, [machine.resources for machine in here]
    each, left = bundle_of(section.engine, fleet.cpus_per_worker, whole), whole
    for crew in others.places(whole):
        left = crew.taken_from(left)
    free = [replace(m, resources=rest) for m, rest in zip(here, left, strict=True)]
    ranks, workers = Wanted(section.learner.num_ranks, bundle), Wanted(fleet.most_workers, each)
    return seats(ranks, workers, free, fix=_FEWER_RANKS + others.fewer)


def machines() -> list[Machine]:
    """The living machines of the cluster that we are in, our own first."""
    own = ray.get_runtime_context().get_node_id()
    found = [Machine(n["NodeID"], n["Resources"]) for n in ray.nodes() if n["Alive"]]
    return sorted(found, key=lambda machine: machine.id != own)


def free_machines() -> list[Machine]:
    """The same machines with what nobody has taken of them at the moment."""
    free = available_resources_per_node()
    return [Machine(each.id, free.get(each.id, {})) for each in machines()]


@contextmanager
def _connected(purpose: str, **settings: object) -> Iterator[None]:
    """Ray while the body runs, its failures as ours and its signal handlers undone."""
    try:
        with lean_ray():
            ray.init(log_to_driver=False, logging_level=logging.WARNING, **settings)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise SetupError("Ray refuses these settings", where="rl", why=str(error)) from error
    except Exception as error:  # a raylet that is slow to start is a bare Exception
        ray.shutdown()
        raise ClusterStartError(purpose, where="rl", why=str(error)) from error
    finally:
        install_signals()
    try:
        yield
    finally:
        ray.shutdown()
        install_signals()


def _require_processors(
    fleet: FleetSection, learner: LearnerSection, others: Others, have: float
) -> float:
    """Refuse what this machine has not; returns what all want together.

    Raises:
        PlacementError: with the table.
    """
    workers = fleet.most_workers * fleet.cpus_per_worker
    wants = [Want("rollout workers", workers, "rl.fleet: workers x cpus_per_worker")]
    fix = "lower rl.fleet.num_workers or rl.fleet.cpus_per_worker"
    if ranks := learner.reserved_cpus:
        wants.append(Want("learner ranks", ranks, "rl.learner: num_ranks x cpus_per_rank"))
        fix += ", rl.learner.num_ranks or rl.learner.cpus_per_rank"
    wants += others.processors()
    fix += others.fewer
    require_room(wants, have, "processors", where="rl.fleet", fix=fix)
    return sum(want.count for want in wants)


def _store_bytes(model: Path) -> int:
    """Room for the weights that are on their way, in shared memory where there is such a thing."""
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    store = _MODELS_KEPT * weights + _OTHER_BYTES
    if _SHARED_MEMORY.is_dir():
        require_space(_SHARED_MEMORY, store, "Ray's object store")
    return store
