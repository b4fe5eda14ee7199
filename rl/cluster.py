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

from ground.disk import require_space
from ground.errors import SetupError
from ground.signals import install_signals
from rl.preflight import ClusterStartError, check_cluster, must_answer
from rl.processes import cluster_address
from rl.room import Want, require_room

NAMESPACE = "packtrain"
"""Of a cluster of our own; in another one each run has a namespace of its own."""
_TRAVELS = "PACKTRAIN_"
"""Variables with this prefix go to our actors, which an older cluster's raylets start."""
_SHARED_MEMORY = Path("/dev/shm")
_MODELS_KEPT = 1
"""Room for a version that goes to another machine; here weights lie in the keeper's own memory."""
_OTHER_BYTES = 128 << 20


def cluster(
    folder: Path,
    num_cpus: float,
    model: Path,
    *,
    num_spare_cpus: float = 0,
    namespace: str = NAMESPACE,
) -> AbstractContextManager[str]:
    """Join or start Ray; the body gets its address.

    Args:
        folder: for the files of a cluster of our own.
        num_cpus: what the actors will ask for in all.
        num_spare_cpus: what those in waiting ask for besides; the machines need not have them.
        model: folder of the weights that will be handed over; decides the object store's size.

    Raises:
        PlacementError: the machines have fewer processors than that; Ray would wait for ever.
        SetupError: this one has less shared memory, or a cluster that we should join is none for us
            (rl/preflight.py).
        ClusterStartError: Ray does not come up, or does not answer.
    """
    address = cluster_address()
    if address:
        return _joined(address, num_cpus, namespace)
    return _started(folder, num_cpus, model, num_spare_cpus, namespace)


def system_config() -> dict[str, object]:
    """Ray's own settings, a new mapping for each start, since Ray adds to what it is given.

    Its workers' niceness is 15 otherwise: beside any other busy program, a thirtieth of a core.
    """
    return {"worker_niceness": 0}


@contextmanager
def _started(
    folder: Path, num_cpus: float, model: Path, num_spare_cpus: float, namespace: str
) -> Iterator[str]:
    """A cluster on this machine: token authentication, no dashboard, files in `folder`."""
    _require_processors(num_cpus, os.cpu_count() or 1)
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
def _joined(address: str, num_cpus: float, namespace: str) -> Iterator[str]:
    """Somebody's cluster; ours in it are the actors alone, which leave with us."""
    check_cluster(address)
    carried = {name: text for name, text in os.environ.items() if name.startswith(_TRAVELS)}
    with _connected(
        must_answer(address),
        address=address,
        namespace=namespace,
        runtime_env={"env_vars": carried},
    ):
        _require_processors(num_cpus, ray.cluster_resources().get("CPU", 0))
        yield ray.get_runtime_context().gcs_address


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


def _require_processors(wanted: float, have: float) -> None:
    require_room(
        [Want("rollout workers", wanted, "rl.fleet: workers x cpus_per_worker")],
        have,
        "processors",
        where="rl.fleet",
        fix="lower rl.fleet.num_workers or rl.fleet.cpus_per_worker",
    )


def _store_bytes(model: Path) -> int:
    """Room for the weights that are on their way, in shared memory where there is such a thing."""
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    store = _MODELS_KEPT * weights + _OTHER_BYTES
    if _SHARED_MEMORY.is_dir():
        require_space(_SHARED_MEMORY, store, "Ray's object store")
    return store
