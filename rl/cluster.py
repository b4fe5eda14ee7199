"""A Ray cluster of our own on this machine, for one life of the loop."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from ground.disk import require_space
from ground.errors import InfraError, SetupError
from ground.signals import install_signals
from rl.room import Want, require_room

NAMESPACE = "packtrain"
_SHARED_MEMORY = Path("/dev/shm")
_MODELS_KEPT = 1
"""Room for a version that goes to another machine; here weights lie in the keeper's own memory."""
_OTHER_BYTES = 128 << 20


class ClusterStartError(InfraError):
    """Ray did not come up, as happens on a machine that is too busy: no fault of the run."""


@contextmanager
def cluster(
    folder: Path, num_cpus: float, model: Path, *, num_spare_cpus: float = 0
) -> Iterator[str]:
    """Start Ray and yield its address: token authentication, no dashboard, files in `folder`.

    Args:
        num_cpus: what the actors will ask for in all.
        num_spare_cpus: what those in waiting ask for besides; the machine need not have them.
        model: folder of the weights that will be handed over; decides the object store's size.

    Raises:
        PlacementError: the machine has fewer processors than that; Ray would wait for ever.
        SetupError: it has less shared memory.
        ClusterStartError: Ray does not come up.
    """
    require_room(
        [Want("rollout workers", num_cpus, "rl.fleet: workers x cpus_per_worker")],
        os.cpu_count() or 1,
        "processors",
        where="rl.fleet",
        fix="lower rl.fleet.num_workers or rl.fleet.cpus_per_worker",
    )
    store = _store_bytes(model)
    try:
        ray.init(
            address="local",
            num_cpus=max(math.ceil(num_cpus + num_spare_cpus), 1),
            include_dashboard=False,
            object_store_memory=store,
            log_to_driver=False,
            logging_level=logging.WARNING,
            namespace=NAMESPACE,
            _temp_dir=str(folder),
            _system_config=system_config(),
        )
    except ValueError as error:
        raise SetupError("Ray refuses these settings", where="rl", why=str(error)) from error
    except Exception as error:  # a raylet that is slow to start is a bare Exception
        ray.shutdown()
        raise ClusterStartError(
            "Ray must come up on this machine", where="rl", why=str(error)
        ) from error
    finally:
        install_signals()
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
        install_signals()


def system_config() -> dict[str, object]:
    """Ray's own settings, a new mapping for each start, since Ray adds to what it is given.

    Its workers' niceness is 15 otherwise: beside any other busy program, a thirtieth of a core.
    """
    return {"worker_niceness": 0}


def _store_bytes(model: Path) -> int:
    """Room for the weights that are on their way, in shared memory where there is such a thing."""
    weights = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    store = _MODELS_KEPT * weights + _OTHER_BYTES
    if _SHARED_MEMORY.is_dir():
        require_space(_SHARED_MEMORY, store, "Ray's object store")
    return store
