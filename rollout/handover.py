"""The two ends of the hand-over: the learner packs and sends, a worker opens.

    Outbox.pack (the learner's own copy, all it waits for) → send → keeper → Inbox.open (no copy)

On the keeper's machine both ends map its memory; from elsewhere the bytes go through Ray's object
store, once for each machine.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from mmap import mmap
from typing import Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from xxhash import xxh3_64_hexdigest

from ground.errors import InfraError
from rollout.carriage import Carriage
from rollout.checksums import checksums, views
from rollout.engine import Lent
from rollout.layout import Layout
from rollout.shared_memory import Lock, first_free, map_buffer
from rollout.task import BASE, Arriving
from rollout.weights import Probes, Published

Found = TypeVar("Found")

_ROOM_SECONDS = 60.0
_POLL_SECONDS = 0.02


class Keeper(Protocol):
    """A `WeightKeeper` as the learner calls it, with deadlines."""

    def node(self) -> str:
        """Ray's name of its machine."""
        ...

    def buffers(self, size: int, at_least: int = 0) -> list[str]:
        """Paths of its buffers of a size, at least so many."""
        ...

    def publish(self, published: Published) -> None:
        """Take charge of a filled buffer."""
        ...

    def has_room(self, size: int) -> bool:
        """Whether it could take so many bytes now."""
        ...

    def deliver(self, published: Published, content: NDArray[np.uint8]) -> None:
        """Take bytes that come along."""
        ...


class Parcel(Lent):
    """A version's own copy: the tensors, ready to be sent, saved, or both.

    Their memory is not filled again before nobody refers to the parcel any more.
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        published: Published,
        memory: mmap | bytearray,
        lock: Lock | None,
    ) -> None:
        super().__init__(tensors)
        self.published, self.memory, self._lock = published, memory, lock


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """One short text for all bytes of a version; a parcel has taken their checksums already."""
    sums = tensors.published.checksums if isinstance(tensors, Parcel) else checksums(tensors)
    lines = "\n".join(f"{name} {sums[name]}" for name in sorted(sums))
    return xxh3_64_hexdigest(lines.encode())


class Outbox:
    """The learner's end: `pack → send`, one version after the other.

    Args:
        node: Ray's name of the machine that this is.
    """

    def __init__(self, keeper: Keeper, node: str) -> None:
        self._keeper = keeper
        self._node = keeper.node()
        self._is_near = self._node == node
        self._maps: dict[str, mmap] = {}
        self._views: dict[str, dict[str, Tensor]] = {}
        self._layout = Layout({}, 0)
        self._scale: float | None = None

    def found(self, base: Mapping[str, Tensor], scale: float) -> None:
        """Send what adapters are added to; from now on adapters are packed, and nothing else.

        Args:
            scale: what the product of an adapter's halves is multiplied with.
        """
        self.send(self.pack(BASE, base))
        self._scale = scale

    def pack(
        self, version: int, tensors: Mapping[str, Tensor], probes: Callable[[], Probes] = Probes
    ) -> Parcel:
        """Copy live tensors; when this returns they may change again.

        Args:
            probes: computes the learner's numbers under these tensors.
        """
        started = time.monotonic()
        layout = self._layout_of(tensors)
        path, memory, lock = self._room(layout)
        target = self._views_of(path, memory) if path else views(layout, memory)
        reserved = time.monotonic()
        sums = checksums(tensors, into=target)
        copied = time.monotonic()
        if lock:
            lock.share()
        found = probes()
        seconds = {
            "reserve": reserved - started,
            "copy": copied - reserved,
            "probe": time.monotonic() - copied,
        }
        scale = None if version == BASE else self._scale
        published = Published(version, layout, sums, self._node, path, None, found, seconds, scale)
        return Parcel(target, published, memory, lock)

    def send(self, parcel: Parcel) -> None:
        """Give it into the keeper's charge."""
        if self._is_near:
            self._keeper.publish(parcel.published)
        else:
            content = np.frombuffer(parcel.memory, dtype=np.uint8)
            _until_there_is_room(lambda: self._keeper.has_room(len(content)))
            self._keeper.deliver(parcel.published, content)

    def _layout_of(self, tensors: Mapping[str, Tensor]) -> Layout:
        layout = Layout.of(tensors)
        if layout != self._layout:
            self._layout, self._maps, self._views = layout, {}, {}
        return self._layout

    def _room(self, layout: Layout) -> tuple[str, mmap | bytearray, Lock | None]:
        """Memory that nobody reads: one of the keeper's buffers, or our own if it is far away."""
        if not self._is_near:
            return "", bytearray(max(layout.size, 1)), None
        size = layout.size

        def free() -> tuple[str, Lock] | None:
            found = first_free(self._maps)
            if found is None:
                known = self._keeper.buffers(size)
                found = first_free(known) or first_free(self._keeper.buffers(size, len(known) + 1))
            return found

        path, lock = _until_there_is_room(free)
        if path not in self._maps:
            self._maps[path] = map_buffer(path, size, writable=True)
        return path, self._maps[path], lock

    def _views_of(self, path: str, memory: mmap | bytearray) -> dict[str, Tensor]:
        if path not in self._views:
            self._views[path] = views(self._layout, memory)
        return self._views[path]


def _until_there_is_room(look: Callable[[], Found | None]) -> Found:
    """What `look` gives as soon as that is something: readers let go of old versions."""
    deadline = time.monotonic() + _ROOM_SECONDS
    while not (found := look()):
        if time.monotonic() > deadline:
            raise InfraError(
                f"a version of the weights must find a free buffer within {_ROOM_SECONDS:g} s",
                where="hand-over",
                why="processes that were given up still read them all, or snapshots are kept",
                fix="nothing now: the loop goes on from its journal with new buffers; if it comes "
                "again, look at log/ for who was given up",
            )
        time.sleep(_POLL_SECONDS)
    return found


class Inbox:
    """A worker's end. What it opened last and the time before stays as it is: an engine uses the
    one until it has swapped in the other.

    Args:
        node: Ray's name of the machine that this is.
    """

    def __init__(self, node: str) -> None:
        self._node = node
        self._maps: dict[tuple[str, int], mmap] = {}
        self._held: deque[Lock] = deque()
        self._kept: Lock | None = None
        self._carriage = Carriage()

    @property
    def arriving(self) -> Arriving | None:
        """What comes, or last came, from another machine."""
        return self._carriage.arriving

    def open(self, published: Published) -> Lent:
        """The tensors of a published version, in place where that is possible.

        Raises:
            InfraError: the memory cannot be had any more.
        """
        tensors, lock = self._open(published)
        if lock is not None:
            self._held.append(lock)
        while len(self._held) > 2:
            self._held.popleft().release()
        return tensors

    def let_go(self) -> None:
        """Nothing that was opened is used any more."""
        while self._held:
            self._held.popleft().release()

    def keep_open(self, published: Published) -> Lent:
        """The same, but it stays as it is until this is called again: a base.

        Raises:
            InfraError: the memory cannot be had any more.
        """
        tensors, lock = self._open(published)
        if self._kept is not None:
            self._kept.release()
        self._kept = lock
        return tensors

    def _open(self, published: Published) -> tuple[Lent, Lock | None]:
        """The tensors, and the hold on their memory where it is another's."""
        if published.node != self._node:
            return Lent(views(published.layout, self._carriage.fetch(published))), None
        path, size = published.path, published.layout.size
        lock = None
        with suppress(OSError, InfraError):
            lock = Lock.take(path, exclusive=False)
        if lock is None:
            raise InfraError(
                f"weights of {published.title} must be readable, they are gone or being "
                "overwritten",
                where="hand-over",
            )
        if (path, size) not in self._maps:
            self._maps[path, size] = map_buffer(path, size, writable=False)
        return Lent(views(published.layout, self._maps[path, size])), lock
