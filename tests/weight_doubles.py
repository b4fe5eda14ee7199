"""Weights on their way, for tests: a keeper in this process, and what it has published."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from torch import Tensor

from ground.model import load_model, tensors_of
from rollout.handover import Inbox, Outbox
from rollout.weights import Probes, Published, WeightKeeper, this_node


class Post:
    """Outbox, keeper and inbox in one process, whose memory other processes may open as well."""

    def __init__(self) -> None:
        self.keeper = WeightKeeper()
        self.outbox = Outbox(self.keeper, this_node())
        self.inbox = Inbox(this_node())

    def publish(
        self, version: int, tensors: Mapping[str, Tensor], probes: Callable[[], Probes] = Probes
    ) -> Published:
        self.outbox.send(self.outbox.pack(version, tensors, probes))
        return self.keeper.current()[1]

    def publish_model(self, version: int, path: Path, scale: float = 1.0) -> Published:
        tensors = tensors_of(load_model(path))
        return self.publish(version, {name: each * scale for name, each in tensors.items()})
