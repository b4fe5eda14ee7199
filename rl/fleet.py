"""What the controller needs of whoever samples."""

from __future__ import annotations

from typing import Protocol

from ground.records import Group
from rollout.task import GroupTask


class Fleet(Protocol):
    """What the controller needs of rollout/fleet.py."""

    async def rollout(self, task: GroupTask) -> Group:
        """Sample and score one group."""
        ...

    async def publish(self, version: int, weights: object) -> None:
        """Return once every worker that serves has these weights."""
        ...
