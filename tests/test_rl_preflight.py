"""Clusters that a run must not join, ports that are taken: told before Ray itself is asked."""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest
import ray
from ray_nodes import Nodes

from ground.errors import InfraError, SetupError
from rollout import preflight
from rollout.preflight import ClusterStartError, check_cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(120)]

SOON_SECONDS = 15.0
"""Of a busy machine; `ray.init` itself takes minutes."""


@pytest.fixture(scope="module")
def head() -> Iterator[Nodes]:
    """A cluster of one node that asks for a token."""
    nodes = Nodes()
    try:
        nodes.wait_for_head()
        yield nodes
    finally:
        nodes.close()


@pytest.fixture
def environment(head: Nodes, monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Ours has the cluster's token, until a test changes it."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", head.environment["RAY_AUTH_TOKEN"])
    return monkeypatch


def refused(address: str) -> SetupError:
    """The order to stop, which comes soon and is none that the supervisor would try again."""
    began = time.monotonic()
    with pytest.raises(SetupError) as caught:
        check_cluster(address)
    assert time.monotonic() - began < SOON_SECONDS
    assert not isinstance(caught.value, InfraError) and caught.value.fix
    return caught.value


def test_a_wrong_token_is_told_as_such(head: Nodes, environment: pytest.MonkeyPatch) -> None:
    """#38"""
    check_cluster(head.address)
    environment.setenv("RAY_AUTH_TOKEN", "ab" * 32)
    error = refused(head.address)
    assert error.what == f"the Ray cluster at {head.address} asks for its token and refuses ours"
    assert "InvalidAuthToken" in error.why and "RAY_AUTH_TOKEN_PATH" in error.fix


def test_a_missing_token_is_told_as_such(
    head: Nodes, environment: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """#38"""
    environment.delenv("RAY_AUTH_TOKEN")
    environment.setenv("HOME", str(tmp_path))  # where Ray looks for a token last
    environment.delenv("RAY_AUTH_MODE")
    assert "got none (RAY_AUTH_MODE is not set)" in refused(head.address).what
    environment.setenv("RAY_AUTH_MODE", "token")
    environment.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    assert f"there is none at {tmp_path / 'token'}" in refused(head.address).what


REWRITE = """
import json, sys
from ray._common.usage import usage_lib
from ray._raylet import GcsClient

gcs = GcsClient(address=sys.argv[1])
found = usage_lib.get_cluster_metadata(gcs)
changed = found | json.loads(sys.argv[2])
gcs.internal_kv_put(b"CLUSTER_METADATA", json.dumps(changed).encode(), True, b"cluster")
assert usage_lib.get_cluster_metadata(gcs) == changed != found
"""


@pytest.mark.parametrize(
    ("told", "has"),
    [
        ('{"ray_version": "2.9.3"}', f"it has Ray 2.9.3 and Python {platform.python_version()}"),
        ('{"python_version": "3.10.1"}', f"it has Ray {ray.__version__} and Python 3.10.1"),
    ],
)
def test_a_cluster_of_other_versions_is_refused_before_it_is_joined(
    head: Nodes, environment: pytest.MonkeyPatch, told: str, has: str
) -> None:
    """#37: the cluster says that it runs something else."""

    def rewrite(facts: str) -> None:
        line = [sys.executable, "-c", REWRITE, head.address, facts]
        subprocess.run(line, env=head.environment, check=True)

    rewrite(told)
    try:
        error = refused(head.address)
    finally:
        ours = {"ray_version": ray.__version__, "python_version": platform.python_version()}
        rewrite(json.dumps(ours))
    assert f"{has}, we have Ray {ray.__version__} and" in error.what
    assert "run the command with Python 3." in error.fix
    check_cluster(head.address)


def test_who_holds_the_clusters_port_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """#36: something that is not Ray, and nobody."""
    with socket.create_server(("", 0)) as taken, monkeypatch.context() as patched:
        patched.setattr(preflight, "_PROBE_SECONDS", 5.0)
        port = taken.getsockname()[1]
        with pytest.raises(ClusterStartError) as caught:
            check_cluster(f"127.0.0.1:{port}")
    assert "no answer within 5 s" in caught.value.why
    assert f"port {port} is held by " in caught.value.why and f"({os.getpid()})" in caught.value.why
    with pytest.raises(ClusterStartError, match=f"refused; nobody holds port {port}"):
        check_cluster(f"127.0.0.1:{port}")


OWN = """
import sys
from pathlib import Path
from rollout.processes import reserved

with reserved(Path(sys.argv[1]) / "left.json") as ours:
    import ray
    from rl.cluster import cluster
    from rollout.config import EngineSection, FleetSection

    fleet = FleetSection(cpus_per_worker=0.5, spare=False)
    with cluster(ours.folder, fleet, EngineSection(), Path(sys.argv[1])) as address:
        print(address, ray.get(ray.remote(lambda: 42).options(num_cpus=0.5).remote(), timeout=60))
"""


def test_a_cluster_of_our_own_needs_none_of_rays_usual_ports(tmp_path: Path) -> None:
    """#36: those of the head, the client server, the dashboard and its agent are all taken."""
    usual = (6379, 10001, 8265, 52365, 8076)
    with ExitStack() as stack:
        for port in usual:
            with suppress(OSError):  # held by somebody else: as good
                stack.enter_context(socket.create_server(("", port)))
        for port in usual:
            with pytest.raises(OSError, match="in use"), socket.create_server(("", port)):
                pass
        clean = {n: t for n, t in os.environ.items() if not n.startswith("RAY_")}
        done = subprocess.run(
            [sys.executable, "-c", OWN, str(tmp_path)],
            env=clean,
            capture_output=True,
            text=True,
            timeout=90,
        )
    assert done.returncode == 0, done.stderr
    address, answer = done.stdout.split()[-2:]
    assert answer == "42" and int(address.rpartition(":")[2]) not in usual


def test_a_cluster_that_may_let_anybody_in_is_not_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks without a token must be refused; no answer at all proves nothing."""
    ours = preflight.Answer(ray.__version__, platform.python_version())
    answers = iter([ours, preflight.Answer(silence="no answer within 20 s")])
    monkeypatch.setattr(preflight, "_ask", lambda address, environment: next(answers))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 64)
    with pytest.raises(ClusterStartError, match="must answer") as refused:
        check_cluster("192.0.2.1:6379")
    assert "asked without a token: no answer" in refused.value.why
