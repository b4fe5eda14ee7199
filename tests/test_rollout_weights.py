"""Published weights outlive who published them, arrive whole, and old ones are let go."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any, cast

import pytest
import ray
import torch
from ray.actor import ActorHandle

from ground.errors import DataError, InfraError
from rollout.weights import Published, digest_of, start_keeper


def _tensors(value: float) -> dict[str, torch.Tensor]:
    return {"b": torch.full((2, 3), value), "a": torch.tensor([1.0, value], dtype=torch.bfloat16)}


def test_digest_sees_every_part_and_no_order() -> None:
    base = digest_of(_tensors(1.0))
    assert digest_of(dict(reversed(_tensors(1.0).items()))) == base
    others = [
        _tensors(2.0),
        {"b": _tensors(1.0)["b"], "c": _tensors(1.0)["a"]},
        {**_tensors(1.0), "b": torch.full((3, 2), 1.0)},
        {**_tensors(1.0), "b": torch.full((2, 3), 0x3F800000, dtype=torch.int32)},
    ]
    assert len({base, *map(digest_of, others)}) == 5


def test_weights_that_changed_on_their_way_are_refused() -> None:
    published = Published(3, digest_of(_tensors(1.0)), _tensors(1.0))
    assert published.verified(3) is published.tensors
    with pytest.raises(InfraError, match="version 4 must arrive whole, got version 3"):
        published.verified(4)
    published.tensors["b"][1, 2] += 1e-3
    with pytest.raises(InfraError, match=r"version 3 .* another digest"):
        published.verified(3)


def _get(ref: ray.ObjectRef) -> Any:
    return ray.get(ref, timeout=60)


@pytest.fixture
def keeper(ray_local: None) -> Iterator[ActorHandle]:
    keeper = cast(ActorHandle, start_keeper())
    yield keeper
    ray.kill(keeper)


class Publisher:
    """A learner in another process."""

    def publish(self, keeper: ActorHandle, version: int) -> tuple[int, str]:
        return os.getpid(), _get(keeper.publish.remote(version, _tensors(float(version))))


def test_weights_outlive_the_process_that_published_them(keeper: ActorHandle) -> None:
    publisher = ray.remote(Publisher).options(num_cpus=0).remote()
    pid, digest = _get(publisher.publish.remote(keeper, 7))
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{pid}") and time.monotonic() < deadline:
        time.sleep(0.05)

    version, ref = _get(keeper.current.remote())
    published = _get(ref)

    assert (version, published.version, published.digest) == (7, 7, digest)
    assert torch.equal(published.verified(7)["b"], torch.full((2, 3), 7.0))


def test_the_newest_two_versions_are_kept_and_versions_rise(keeper: ActorHandle) -> None:
    with pytest.raises(InfraError, match="no weights have been published"):
        _get(keeper.current.remote())
    for version in (0, 1, 5):
        _get(keeper.publish.remote(version, _tensors(float(version))))
    assert _get(keeper.versions.remote()) == [1, 5]
    with pytest.raises(DataError, match="must rise, got 5 after 5"):
        _get(keeper.publish.remote(5, _tensors(0.0)))
