"""A worker's way from one version to the next.

fetch, assemble → (engine stands still) load → prove → (engine goes on) → acknowledged
                                         └── ParityError: it never goes on, the worker is replaced
"""

from __future__ import annotations

import time

from ground import faults
from ground.errors import DataError
from rollout.assembly import Assembly, require_arrived
from rollout.courier import Lane
from rollout.engine import Engine, Lent
from rollout.handover import Inbox
from rollout.parity import prove
from rollout.task import Arriving, Loaded
from rollout.weights import Published


class Gate:
    """Lets an engine sample under a new version once it has proven that it has it.

    Example:
        Gate(engine, Inbox(node)).load(3, published) → Loaded(version=3, seconds={…}, drift=4e-7)

    Args:
        lane: the way of the weights, where it is not through memory.
    """

    def __init__(self, engine: Engine, inbox: Inbox, lane: Lane | None = None) -> None:
        self._engine, self._inbox, self._lane = engine, inbox, lane
        self._assembly = Assembly(inbox)

    @property
    def arriving(self) -> Arriving | None:
        """See `Inbox.arriving`."""
        return self._inbox.arriving

    def load(self, version: int, published: Published) -> Loaded:
        """Swap weights in flight. Not a token is sampled between the swap and its proof.

        Raises:
            DataError: the weights are older than the engine's, or of another model.
            ParityError: they were damaged on the way, or the engine does not compute with them;
                in the second case it stands still from now on.
            InfraError: they cannot be fetched, or are of another version than was said.
        """
        _check_version(version, published, self._engine.version)
        started = time.monotonic()
        faults.point("weights.fetch")
        tensors, published = self._fetched(published)
        fetched = time.monotonic()
        faults.point("weights.load")
        given = None if tensors is None else faults.corrupted("weights.loaded", tensors)
        self._engine.pause()
        try:
            self._swap(version, given)
        except BaseException as error:
            self._engine.resume()
            if isinstance(error, DataError) and given is not None:
                require_arrived(given, published)  # refused: by whose fault?
            raise
        loaded = time.monotonic()
        proof = prove(self._engine, published, tensors)
        self._engine.resume()
        seconds = published.seconds | {
            "fetch": fetched - started,
            "load": loaded - fetched,
            "bytes": proof.bytes_seconds,
            "probes": proof.probe_seconds,
        }
        drift = proof.drift.typical if proof.drift else 0.0
        return Loaded(self._engine.version, seconds, drift)

    def _fetched(self, published: Published) -> tuple[Lent | None, Published]:
        """The tensors of a version; None where they wait at the other end of the lane."""
        if self._lane:
            self._lane.fetch(published)
            return None, published
        return self._assembly.whole(published)

    def _swap(self, version: int, given: Lent | None) -> None:
        if given is not None:
            self._engine.load(version, given)
        elif self._lane:
            self._lane.load(version)


def _check_version(version: int, published: Published, current: int) -> None:
    if published.version != version:
        raise DataError(
            f"weights must be of the version that they are sent as, {version}, got those of "
            f"{published.version}",
            where="hand-over",
        )
    if version < current:
        raise DataError(
            f"versions must rise, got {version} after {current}",
            where="hand-over",
            fix="start the rollout workers anew to go back to earlier weights",
        )
