"""The Ray cluster that processes of ours live in: one of our own, or the one that we are a job of.

RAY_ADDRESS set (as in a Ray job) → join that cluster       otherwise → start one, end it

What they need of it is compared with what there is first: Ray would wait for ever.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import ray

from ground import faults, stacks
from ground.disk import require_space
from ground.errors import SetupError
from ground.signals import install_signals
from rollout.lean_ray import lean_ray
from rollout.places import Need, require_room, wait_for_room
from rollout.preflight import ClusterStartError, check_cluster, must_answer
from rollout.processes import MARK, cluster_address

NAMESPACE = "packtrain"
"""Of a cluster of our own; in another one each run has a namespace of its own."""
_TRAVELS = (MARK, faults.VARIABLE, stacks.VARIABLE)
"""Variables that go to our actors, which somebody else's raylets start; the run's token is none."""
_SHARED_MEMORY = Path("/dev/shm")
_OTHER_BYTES = 128 << 20
"""In the object store, beside weights on their way."""
MAX_STARTS = 5
"""Times in a row that Ray may fail to come up: that is the machine's fault and no one else's."""
PAUSE_SECONDS = 2.0

logger = logging.getLogger("packtrain")


def cluster(
    folder: Path, need: Need, *, namespace: str = NAMESPACE, seconds: float = 0.0
) -> AbstractContextManager[str]:
    """Join or start Ray; the body gets its address.

    Args:
        folder: for the files of a cluster of our own.
        seconds: to wait for a machine that was lost, in a cluster that is joined.

    Raises:
        PlacementError: the machines have no room for all of ours.
        SetupError: this one has less shared memory, or a cluster that we should join is none for us
            (rollout/preflight.py).
        ClusterStartError: Ray does not come up, or does not answer.
    """
    if address := cluster_address():
        return _joined(address, need, namespace, seconds)
    return _started(folder, need, namespace)


@contextmanager
def patiently(
    enter: Callable[[], AbstractContextManager[str]],
    sweep: Callable[[], object],
    sleep: Callable[[float], None] = time.sleep,
) -> Iterator[str]:
    """A cluster that may need more than one try: a busy machine, a head that starts anew.

    Args:
        sweep: ends what a try has left behind.

    Raises:
        SetupError: it failed so many times in a row.
    """
    with ExitStack() as stack:
        for number in range(1, MAX_STARTS + 1):
            try:
                address = stack.enter_context(enter())
                break
            except ClusterStartError as error:
                if number == MAX_STARTS:
                    raise not_started(error, number) from error
                logger.warning("trying again: %s", error)
                sweep()
                sleep(PAUSE_SECONDS * number)
        yield address


def not_started(error: ClusterStartError, number: int) -> SetupError:
    """The end of all tries.

    Args:
        number: of tries.
    """
    return SetupError(
        f"{error.what}, it failed {number} times in a row",
        where=error.where,
        why=error.why,
        fix="look at what keeps the machine busy or ended the cluster, then continue with --resume",
    )


def system_config() -> dict[str, object]:
    """Ray's own settings, a new mapping for each start, since Ray adds to what it is given.

    Its workers' niceness is 15 otherwise: beside any other busy program, a thirtieth of a core.
    """
    return {"worker_niceness": 0}


def living() -> list[Mapping[str, Any]]:
    """The living machines of the cluster that we are in, as Ray describes them."""
    return [node for node in ray.nodes() if node["Alive"]]


def resources() -> list[Mapping[str, float]]:
    """What each of them has."""
    return [node["Resources"] for node in living()]


@contextmanager
def _started(folder: Path, need: Need, namespace: str) -> Iterator[str]:
    """A cluster on this machine: token authentication, no dashboard, files in `folder`."""
    have = os.cpu_count() or 1
    require_room(need.processors, have, "processors", where=need.where, fix=need.fix)
    num_cpus = sum(want.count for want in need.processors) + need.spare_cpus
    with _connected(
        "Ray must come up on this machine",
        address="local",
        num_cpus=max(math.ceil(num_cpus), 1),
        include_dashboard=False,
        object_store_memory=_store_bytes(need),
        namespace=namespace,
        _temp_dir=str(folder),
        _system_config=system_config(),
    ):
        if need.checks_own:
            need.check(resources())
        yield ray.get_runtime_context().gcs_address


@contextmanager
def _joined(address: str, need: Need, namespace: str, seconds: float) -> Iterator[str]:
    """Somebody's cluster; ours in it are the actors alone, which leave with us."""
    check_cluster(address)
    carried = {name: os.environ[name] for name in _TRAVELS if name in os.environ}
    with _connected(
        must_answer(address),
        address=address,
        namespace=namespace,
        runtime_env={"env_vars": carried},
    ):
        wait_for_room(lambda: need.check(resources()), seconds)
        yield ray.get_runtime_context().gcs_address


@contextmanager
def _connected(purpose: str, **settings: object) -> Iterator[None]:
    """Ray while the body runs, its failures as ours and its signal handlers undone."""
    try:
        with lean_ray():
            ray.init(log_to_driver=False, logging_level=logging.WARNING, **settings)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise SetupError("Ray refuses these settings", where="Ray", why=str(error)) from error
    except Exception as error:  # a raylet that is slow to start is a bare Exception
        ray.shutdown()
        raise ClusterStartError(purpose, where="Ray", why=str(error)) from error
    finally:
        install_signals()
    try:
        yield
    finally:
        ray.shutdown()
        install_signals()


def _store_bytes(need: Need) -> int:
    """Room for the weights that are on their way, in shared memory where there is such a thing."""
    store = need.weights_bytes + _OTHER_BYTES
    if _SHARED_MEMORY.is_dir():
        require_space(_SHARED_MEMORY, store, "Ray's object store")
    return store
