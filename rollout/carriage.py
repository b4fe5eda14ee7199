"""Weights on their way from another machine, piece by piece through Ray's object store.

    keeper.carry ─▶ pieces, in order ─▶ a few are on their way, the first of them is waited for

A piece that has arrived stays, also when the next one finds no room. Who waits for all of them sees
in `arriving` that they come: a thin link is no hanging worker.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np
import ray
from numpy.typing import NDArray
from ray.exceptions import GetTimeoutError, ObjectStoreFullError, OutOfDiskError, RayError

from ground.errors import InfraError
from rollout.task import Arriving
from rollout.weights import Published

_ROOM_SECONDS = 30.0
_PIECE_SECONDS = 600.0
_POLL_SECONDS = 0.2
_AHEAD = 2
"""Pieces that are on their way at a time; they share the link, so that more come later."""

_Piece = ray.ObjectRef[NDArray[np.uint8]]
Found = TypeVar("Found")


class Carriage:
    """Brings versions here, one after the other.

    Example:
        carriage = Carriage(); memory = carriage.fetch(published)
    """

    def __init__(self) -> None:
        self.arriving: Arriving | None = None
        """What last had a piece come, and how much of it is here; may be read from another
        thread."""

    def fetch(self, published: Published) -> bytearray:
        """The bytes of a version that lies on another machine; waits a while for room on the way.

        Raises:
            InfraError: it is not kept any more, its machine is gone, no piece has come for ten
                minutes, or Ray's object store stays full.
        """
        began, size = time.monotonic(), published.layout.size
        memory, at = bytearray(size), 0
        pieces = _when_there_is_room(published, lambda: _asked(published))
        for number in range(len(pieces)):
            ahead = pieces[number : number + _AHEAD]
            piece = _when_there_is_room(published, lambda ahead=ahead: _first(ahead))
            memory[at : at + len(piece)] = piece.data
            at += len(piece)
            spent = time.monotonic() - began
            self.arriving = Arriving(published.version, min(at, size), size, spent)
        return memory


def _asked(published: Published) -> Sequence[_Piece]:
    assert published.keeper
    return ray.get(published.keeper.carry.remote(published.version), timeout=_PIECE_SECONDS)


def _first(ahead: Sequence[_Piece]) -> NDArray[np.uint8]:
    """The first of some pieces, while the others begin to come."""
    ray.wait(list(ahead), num_returns=1, timeout=0, fetch_local=True)
    return ray.get(ahead[0], timeout=_PIECE_SECONDS)


def _when_there_is_room(published: Published, look: Callable[[], Found]) -> Found:
    """What Ray gives; the object stores of both machines may be full for a while."""
    deadline = time.monotonic() + _ROOM_SECONDS
    while True:
        try:
            return look()
        except (OutOfDiskError, ObjectStoreFullError) as error:
            if time.monotonic() > deadline:
                raise _full(published, error) from error
            time.sleep(_POLL_SECONDS)
        except RayError as error:
            raise _lost(published, error) from error


def _purpose(published: Published) -> str:
    return f"weights of {published.title} must be fetched from another machine"


def _full(published: Published, error: RayError) -> InfraError:
    return InfraError(
        f"{_purpose(published)}: for {_ROOM_SECONDS:g} s Ray's object store was full, and so was "
        "the disk that it spills to",
        where="hand-over",
        why=str(error),
        fix="free space in the nodes' object spilling directory, or start them with a larger "
        "--object-store-memory",
    )


def _lost(published: Published, error: RayError) -> InfraError:
    silent = f": no piece came for {_PIECE_SECONDS:g} s" * isinstance(error, GetTimeoutError)
    return InfraError(f"{_purpose(published)}{silent}", where="hand-over", why=str(error))
