"""Hand-over of weights: packed by the learner, kept by an actor that outlives it, used in place.

    pack (into the keeper's memory) → publish → kept (newest and the one before) → opened by workers

The memory is the keeper's, so that weights survive who published them. A learner that is killed
while it packs leaves a half-filled buffer that nobody has been told of.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import numpy as np
import ray
from numpy.typing import NDArray
from ray.actor import ActorHandle, ActorProxy
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ground import faults
from ground.errors import DataError, InfraError, SetupError
from ground.roles import enter_role
from rollout.layout import Layout
from rollout.shared_memory import Lock, SharedBuffer, first_free
from rollout.task import BASE

_KEPT = 2
_PIECES = 256
_LEAST_PIECE = 256 << 10
"""Bytes; smaller ones would cost Ray more than the link."""
_MAX_BUFFERS = 6
"""Two are kept, one is filled; more only while somebody who was given up still holds one."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A token sequence and what the learner makes of it.

    Example:
        Probe((17, 4, 260), logprobs=(-2.31, -0.07))
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    """Of the tokens but the first, at temperature 1. Fewer than that where a token's number hangs
    on a rounding (two experts all but equal), which leaves nothing to say of what follows."""


@dataclass(frozen=True, slots=True)
class Probes:
    """What proves that an engine computes as the learner does, and how nearly it has to.

    Example:
        Probes((Probe((17, 4, 260), (-2.31, -0.07)),), typical=2e-6, worst=1e-5)
    """

    rows: tuple[Probe, ...] = ()
    typical: float = 0.0
    """Nats by which a row may be off: the median over rows of their root mean square."""
    worst: float = 0.0
    """Nats by which a single token may be off."""


@dataclass(frozen=True, slots=True)
class Published:
    """A version of the weights: what is said of them; the bytes lie in the keeper's memory.

    Example:
        Published(version=3, layout=layout, checksums={"model.norm.weight": "5e88…"},
                  node="1f…", path="/proc/4711/fd/9", keeper=handle)
    """

    version: int
    layout: Layout
    checksums: dict[str, str]
    node: str
    """Ray's name of the machine that has the memory."""
    path: str
    """Where it is opened there."""
    keeper: ActorHandle | None = None
    """Whom other machines ask for the bytes."""
    probes: Probes = Probes()
    seconds: dict[str, float] = field(default_factory=dict)
    """How long each phase on the learner's side took."""
    scale: float | None = None
    """Of an adapter: what the product of its two halves is multiplied with. None says that these
    are whole weights."""
    base: Published | None = None
    """Of an adapter: what it is added to; the keeper puts it in."""

    @property
    def title(self) -> str:
        """`version 3`, or `the base`."""
        return "the base" if self.version == BASE else f"version {self.version}"


class WeightKeeper:
    """Keeps the newest published weights and the version before; a Ray actor (`start_keeper`)."""

    def __init__(self) -> None:
        enter_role("keeper")
        self._buffers: dict[str, SharedBuffer] = {}
        self._published: dict[int, Published] = {}
        self._carried: dict[int, list[ray.ObjectRef[NDArray[np.uint8]]]] = {}
        self._base: Published | None = None

    def buffers(self, size: int, at_least: int = 0) -> list[str]:
        """Paths of the buffers of this size, after new ones were made so that there are enough.

        There are never more than six; whoever needs another one waits until one is free.
        """
        fitting = [path for path, buffer in self._buffers.items() if buffer.size == max(size, 1)]
        while len(fitting) < min(at_least, _MAX_BUFFERS):
            try:
                buffer = SharedBuffer(size)
            except SetupError:
                if len(fitting) > _KEPT:
                    break  # more would be comfortable; these do
                raise
            self._buffers[buffer.path] = buffer
            fitting.append(buffer.path)
        return fitting

    def node(self) -> str:
        """Ray's name of the machine that it runs on."""
        return this_node()

    def publish(self, published: Published) -> None:
        """Take charge of a filled buffer. A base is kept for as long as we live.

        Raises:
            DataError: the version is not newer than the newest.
        """
        faults.point("keep")
        if published.version == BASE:
            self._settle(published)
            return
        newest = max(self._published, default=-1)
        if published.version <= newest:
            raise DataError(
                f"versions must rise, got {published.version} after {newest}",
                where="weight keeper",
            )
        self._buffers[published.path].hold()
        base = None if published.scale is None else self._base
        self._published[published.version] = replace(published, keeper=_this_actor(), base=base)
        for old in sorted(self._published)[:-_KEPT]:
            self._buffers[self._published.pop(old).path].release()
            self._carried.pop(old, None)

    def _settle(self, base: Published) -> None:
        self._buffers[base.path].hold()
        if self._base is not None:
            self._buffers[self._base.path].release()
            self._carried.pop(BASE, None)
        self._base = replace(base, keeper=_this_actor())

    def has_room(self, size: int) -> bool:
        """Whether `deliver` would find a free buffer of this size."""
        if free := self._free(size):
            free[1].release()
        return free is not None

    def deliver(self, published: Published, content: NDArray[np.uint8]) -> None:
        """`publish` for a learner on another machine, which sends the bytes along.

        Raises:
            InfraError: there is no free buffer (`has_room`).
        """
        free = self._free(published.layout.size)
        if free is None:
            raise InfraError("a buffer must be free for weights that arrive", where="weight keeper")
        path, lock = free
        memory = np.frombuffer(self._buffers[path].map(), dtype=np.uint8)
        memory[: len(content)] = content
        lock.share()
        self.publish(replace(published, node=self.node(), path=path))
        lock.release()

    def _free(self, size: int) -> tuple[str, Lock] | None:
        paths = self.buffers(size)
        return first_free(paths) or first_free(self.buffers(size, len(paths) + 1))

    def current(self) -> tuple[int, Published]:
        """Newest version and what is said of it."""
        if not self._published:
            raise InfraError("no weights have been published yet", where="weight keeper")
        version = max(self._published)
        return version, self._published[version]

    def carry(self, version: int) -> list[ray.ObjectRef[NDArray[np.uint8]]]:
        """The bytes of a version in Ray's object store, for workers on other machines; in order, in
        pieces, so that one can see them come.

        Raises:
            InfraError: it is not kept any more.
        """
        published = self._base if version == BASE else self._published.get(version)
        if published is None:
            raise InfraError(
                f"weights must be fetched while they are kept, version {version} is gone",
                where="weight keeper",
            )
        if version not in self._carried:
            memory = self._buffers[published.path].map()
            content = np.frombuffer(memory, dtype=np.uint8)
            step = max(len(content) // _PIECES, _LEAST_PIECE)
            pieces = range(0, len(content), step)
            self._carried[version] = [ray.put(content[at : at + step]) for at in pieces]
        return self._carried[version]

    def versions(self) -> list[int]:
        """Versions that can still be fetched."""
        return sorted(self._published)


def this_node() -> str:
    """Ray's name of the machine that this is."""
    return ray.get_runtime_context().get_node_id()


def _this_actor() -> ActorHandle | None:
    """Our own handle; None where we are an ordinary object."""
    context = ray.get_runtime_context()
    return context.current_actor if context.get_actor_id() else None


def start_keeper(name: str | None = None) -> ActorProxy[WeightKeeper]:
    """Start a keeper that belongs to the calling process and dies with it, not with a learner.

    It runs on the same machine, whose memory it keeps the weights in.
    """
    options = {"num_cpus": 0, "max_restarts": 0} | ({"name": name} if name else {})
    strategy = on_this_machine()
    return ray.remote(WeightKeeper).options(**options, scheduling_strategy=strategy).remote()


def on_this_machine() -> NodeAffinitySchedulingStrategy:
    """For an actor that must run here and nowhere else."""
    return NodeAffinitySchedulingStrategy(this_node(), soft=False)
