"""A fleet on two machines whose cable is pulled, made thin, and whose second node is taken away.

The machines are namespaces (tests/ray_links.py), Ray, workers and the hand-over are real; only
tokens are not sampled. What the fleet does meanwhile stands in tests/node_scenes.py.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import psutil
import pytest
from ray_links import LinkedNodes, why_not
from rl_runs import wait_until

from rollout.cluster import system_config

pytestmark = [pytest.mark.launch, pytest.mark.timeout(600)]

RAY: dict[str, object] = system_config() | {
    "health_check_initial_delay_ms": 1000,
    "health_check_period_ms": 1000,
    "health_check_timeout_ms": 4000,
    "health_check_failure_threshold": 4,
}
RAY_SECONDS = 16.0
"""After which a node that is cut off is dead to Ray at the earliest; as Ray comes, after 60."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[LinkedNodes]:
    if why := why_not():
        pytest.skip(why)
    nodes = LinkedNodes(RAY)
    try:
        nodes.start_head()
        yield nodes
    finally:
        nodes.close()


@pytest.fixture
def nodes(cluster: LinkedNodes) -> LinkedNodes:
    """Both machines are up and joined by an ordinary cable."""
    cluster.plug()
    cluster.thicken()
    if not cluster.other_is_sound:
        cluster.start_other()
    cluster.other_is_sound = False  # until a scene has left it so
    return cluster


class Scene:
    """A scene while it is played."""

    def __init__(self, nodes: LinkedNodes, name: str) -> None:
        self._nodes, self._folder = nodes, nodes.new_folder()
        self._log = nodes.place / f"{name}.log"
        self._process = nodes.play("node_scenes", name, str(self._folder))

    def say(self, word: str) -> None:
        (self._folder / word).touch()

    def told(self, what: str) -> list[dict[str, Any]]:
        lines = self._log.read_text().splitlines()
        told = [json.loads(line) for line in lines if line.startswith('{"what"')]
        return [line for line in told if line["what"] == what]

    def wait_for(self, what: str, seconds: float = 200.0) -> dict[str, Any]:
        try:
            wait_until(lambda: bool(self.told(what)) or self._has_ended, seconds, what)
            return self.told(what)[-1]
        except (BaseException, IndexError):
            print(self._nodes.logs())
            raise

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [event for event in self.told("event") if event["kind"] == kind]

    def finish(self) -> None:
        try:
            assert self._process.wait(200) == 0
        except (AssertionError, subprocess.TimeoutExpired):
            print(self._nodes.logs())
            raise

    @property
    def _has_ended(self) -> bool:
        return self._process.poll() is not None


def workers_on(nodes: LinkedNodes) -> list[int]:
    """Processes of rollout workers on the second machine."""
    found = []
    for process in nodes.other.processes():
        with suppress(psutil.Error):
            if any("FetchingWorker" in word for word in process.cmdline()):
                found.append(process.pid)
    return found


def test_weights_come_over_a_thin_link_and_nobody_is_taken_for_dead(nodes: LinkedNodes) -> None:
    """#33: 3.1 MB at 2 Mbit/s are 12 s, of which each worker's deadline allows 5."""
    scene = Scene(nodes, "thin")
    scene.wait_for("ready")
    nodes.thin("2mbit")
    scene.say("thinned")
    published = scene.wait_for("published")
    scene.finish()
    assert published["seconds"] > 10 and published["groups"] > 8
    told = r"version 1 is still on its way to worker \d: \d\.\d of 3\.1 MB"
    assert re.search(told, nodes.logs())
    nodes.other_is_sound = True


def test_a_cut_off_worker_is_given_up_soon_and_nothing_is_lost_or_done_twice(
    nodes: LinkedNodes,
) -> None:
    """#31, #35"""
    scene = Scene(nodes, "cut")
    role = scene.wait_for("ready")["far"]
    pulled = pull(nodes)
    scene.wait_for("did without")
    nodes.plug()
    scene.wait_for("healed")
    pull(nodes)
    given_up = scene.wait_for("given up by Ray")
    first, second = (event for event in scene.events("lost") if event["role"] == role)
    for lost in (first, second):
        assert "a ping must be done within 8 s" in lost["cause"]
    assert first["end"] - pulled < RAY_SECONDS and second["end"] < given_up["time"]
    assert "weights of version 1 must be fetched from another machine" in given_up["refused"]
    wait_until(lambda: not workers_on(nodes), 30, "end of the worker that nobody pings")
    nodes.plug()
    wait_until(lambda: not nodes.other.processes(), 60, "end of the node that Ray gave up")
    nodes.start_other()
    scene.say("node is back")
    scene.wait_for("back")
    scene.finish()
    nodes.other_is_sound = True


def test_a_node_that_is_drained_is_left_in_order(nodes: LinkedNodes) -> None:
    """#41: `ray start --block` drains its node for 30 s when it is told to end."""
    scene = Scene(nodes, "drained")
    scene.wait_for("ready")
    assert len(workers_on(nodes)) == 1
    nodes.tell_other(signal.SIGTERM)
    scene.wait_for("left")
    [drained] = scene.events("drained")
    assert drained["handed_over"] == 0
    scene.finish()
    wait_until(lambda: not workers_on(nodes), 30, "end of the worker that left")
    assert not scene.events("lost")


def pull(nodes: LinkedNodes) -> float:
    """Unix seconds at which the cable was out."""
    nodes.pull()
    return time.time()
