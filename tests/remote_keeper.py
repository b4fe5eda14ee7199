"""A keeper of weights in a process of its own, for tests; importable without transformers."""

from __future__ import annotations

import numpy as np
import ray
from numpy.typing import NDArray
from ray.actor import ActorProxy

from rollout.weights import Published, WeightKeeper


class RemoteKeeper:
    """As an outbox calls it."""

    def __init__(self, actor: ActorProxy[WeightKeeper]) -> None:
        self._actor = actor

    def node(self) -> str:
        return ray.get(self._actor.node.remote(), timeout=60)

    def buffers(self, size: int, at_least: int = 0) -> list[str]:
        return ray.get(self._actor.buffers.remote(size, at_least), timeout=60)

    def publish(self, published: Published) -> None:
        ray.get(self._actor.publish.remote(published), timeout=60)

    def has_room(self, size: int) -> bool:
        return ray.get(self._actor.has_room.remote(size), timeout=60)

    def deliver(self, published: Published, content: NDArray[np.uint8]) -> None:
        ray.get(self._actor.deliver.remote(published, content), timeout=60)

    def current(self) -> Published:
        return ray.get(self._actor.current.remote(), timeout=60)[1]
