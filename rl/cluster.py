"""The Ray cluster that a life of the loop runs in: one of our own, or the one that we are a job of.

RAY_ADDRESS set (as in a Ray job) → join that cluster       otherwise → start one, end it
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import ray

from ground import faults, stacks
from ground.disk import require_space
from ground.errors import SetupError
from ground.signals import install_signals
from rl.config import LearnerSection
from rl.preflight import ClusterStartError, check_cluster, must_answer
from rl.processes import MARK, cluster_address
from rl.room import Want, require_places, require_room, wait_for_room
from rl.seats import Machine
from rollout.bundle import bundle_of
from rollout.config import EngineSection, FleetSection

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


def cluster(
    folder: Path,
    fleet: FleetSection,
    engine: EngineSection,
    model: Path,
    *,
    learner: LearnerSection | None = None,
    namespace: str = NAMESPACE,
    is_first: bool = True,
) -> AbstractContextManager[str]:
    """Join or start Ray; the body gets its address.

    Args:
        folder: for the files of a cluster of our own.
        model: folder of the weights that will be handed over; decides the object store's size.
        learner: how its ranks are started; by default Ray has nothing to do with them.
        is_first: whether there is no reason to wait for a machine that was lost.

    Raises:
        PlacementError: the machines have no room for all workers; Ray would wait for ever.
        SetupError: this one has less shared memory, or a cluster that we should join is none for us
            (rl/preflight.py).
        ClusterStartError: Ray does not come up, or does not answer.
    """
    address, learner = cluster_address(), learner or LearnerSection()
    if address:
        seconds = 0.0 if is_first else learner.room_seconds
        return _joined(address, fleet, engine, namespace, seconds)
    return _started(folder, fleet, model, namespace, learner)


def system_config() -> dict[str, object]:
    """Ray's own settings, a new mapping for each start, since Ray adds to what it is given.

    Its workers' niceness is 15 otherwise: beside any other busy program, a thirtieth of a core.
    """
    return {"worker_niceness": 0}


@contextmanager
def _started(
    folder: Path, fleet: FleetSection, model: Path, namespace: str, learner: LearnerSection
) -> Iterator[str]:
    """A cluster on this machine: token authentication, no dashboard, files in `folder`.

    The machine need not have the processors of a spare worker.
    """
    num_cpus = fleet.most_workers * fleet.cpus_per_worker + learner.reserved_cpus
    num_spare_cpus = fleet.spare * fleet.cpus_per_worker
    _require_processors(fleet, learner, os.cpu_count() or 1)
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
        yield ray.get_runtime_context().gcs_address


@contextmanager
def _joined(
    address: str, fleet: FleetSection, engine: EngineSection, namespace: str, seconds: float
) -> Iterator[str]:
    """Somebody's cluster; ours in it are the actors alone, which leave with us."""

    def require() -> None:
        nodes = [machine.resources for machine in machines()]
        bundle = bundle_of(engine, fleet.cpus_per_worker, nodes)
        require_places(fleet.most_workers, bundle, nodes, fix=_FEWER)

    check_cluster(address)
    carried = {name: os.environ[name] for name in _TRAVELS if name in os.environ}
    with _connected(
        must_answer(address),
        address=address,
        namespace=namespace,
        runtime_env={"env_vars": carried},
    ):
        wait_for_room(require, seconds)
        yield ray.get_runtime_context().gcs_address


def machines() -> list[Machine]:
    """The living machines of the cluster that we are in, our own first."""
    own = ray.get_runtime_context().get_node_id()
    found = [Machine(n["NodeID"], n["Resources"]) for n in ray.nodes() if n["Alive"]]
    return sorted(found, key=lambda machine: machine.id != own)


@contextmanager
def _connected(purpose: str, **settings: object) -> Iterator[None]:
    """Ray while the body runs, its failures as ours and its signal handlers undone."""
    try:
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


def _require_processors(fleet: FleetSection, learner: LearnerSection, have: float) -> None:
    workers = fleet.most_workers * fleet.cpus_per_worker
    wants = [Want("rollout workers", workers, "rl.fleet: workers x cpus_per_worker")]
    fix = "lower rl.fleet.num_workers or rl.fleet.cpus_per_worker"
    if ranks := learner.reserved_cpus:
        wants.append(Want("learner ranks", ranks, "rl.learner: num_ranks x cpus_per_rank"))
        fix += ", rl.learner.num_ranks or rl.learner.cpus_per_rank"
    require_room(wants, have, "processors", where="rl.fleet", fix=fix)


def _store_bytes(model: Path) -> int:
    """Room for the weights that are on their way, in shared memory where there is such a thing."""
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    store = _MODELS_KEPT * weights + _OTHER_BYTES
    if _SHARED_MEMORY.is_dir():
        require_space(_SHARED_MEMORY, store, "Ray's object store")
    return store
