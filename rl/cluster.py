"""A Ray cluster of our own on this machine, for one life of the loop."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from ground.errors import InfraError, SetupError
from ground.signals import install_signals

NAMESPACE = "packtrain"
_OBJECT_STORE_BYTES = 256 << 20


@contextmanager
def cluster(folder: Path, num_cpus: float) -> Iterator[str]:
    """Start Ray and yield its address: token authentication, no dashboard, files in `folder`.

    Args:
        num_cpus: what the actors will ask for in all.

    Raises:
        SetupError: the machine has fewer processors than that.
        InfraError: Ray does not come up.
    """
    have = os.cpu_count() or 1
    if num_cpus > have:
        raise SetupError(
            f"the fleet must fit this machine: it asks for {num_cpus:g} processors of {have}",
            where="rl.fleet",
            fix="lower rl.fleet.num_workers or rl.fleet.cpus_per_worker",
        )
    try:
        ray.init(
            num_cpus=max(math.ceil(num_cpus), 1),
            include_dashboard=False,
            object_store_memory=_OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.WARNING,
            namespace=NAMESPACE,
            _temp_dir=str(folder),
        )
    except Exception as error:  # a raylet that is slow to start is a bare Exception
        ray.shutdown()
        raise InfraError("Ray must come up on this machine", where="rl", why=str(error)) from error
    finally:
        install_signals()
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()
        install_signals()
