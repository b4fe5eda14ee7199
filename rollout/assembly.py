"""From what was handed over to what an engine loads: an adapter is added to its base.

    base (once, its bytes proven) ──┐
    adapter (each version, proven) ─┴─▶ W + scale · B A in memory of our own ─▶ Engine.load

Weights that came whole pass as they are. Engines never see an adapter: whatever samples with whole
weights samples with these, at the same speed, and swaps them in flight.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from mmap import mmap

from torch import Tensor

from ground.errors import DataError, ParityError
from ground.merge import WEIGHT, merged_targets, modules_of
from rollout.checksums import checksums, views
from rollout.engine import Lent
from rollout.handover import Inbox
from rollout.layout import Layout
from rollout.weights import Published


class Assembly:
    """A worker's base, and each version's whole weights.

    Example:
        weights, wanted = Assembly(inbox).whole(published); engine.load(3, weights)
    """

    def __init__(self, inbox: Inbox) -> None:
        self._inbox = inbox
        self._base = Lent()
        self._base_sums: dict[str, str] = {}

    def whole(self, published: Published) -> tuple[Lent, Published]:
        """All weights of a version, and what is published of it, with their checksums.

        Raises:
            ParityError: base or adapter were damaged on the way.
            DataError: the adapter is of another model, or came without its base.
            InfraError: they cannot be fetched any more.
        """
        tensors = self._inbox.open(published)
        if published.scale is None:
            return tensors, published
        if published.base is None:
            raise DataError(
                f"an adapter must come with the base that it is added to, {published.title} came "
                "without one",
                where="hand-over",
                fix="send the base first: Outbox.found",
            )
        require_arrived(tensors, published)
        if self._base_sums != published.base.checksums:
            self._base = self._inbox.keep_open(published.base)
            require_arrived(self._base, published.base)
            self._base_sums = published.base.checksums
        sums = joined(self._base, tensors, published.scale)
        return (
            Lent(self._base | sums),
            replace(published, checksums=self._base_sums | checksums(sums)),
        )


def joined(base: Mapping[str, Tensor], adapter: Mapping[str, Tensor], scale: float) -> Lent:
    """The weights that an adapter changes, changed; where they lie, they are aligned as all are.

    Raises:
        DataError: the adapter is of another model.
    """
    names = (module + WEIGHT for module in modules_of(adapter))
    layout = Layout.of({name: base[name] for name in names if name in base})
    sums = views(layout, mmap(-1, max(layout.size, 1)))
    for name, sum_ in merged_targets(base, adapter, scale):
        sums[name].copy_(sum_)
    return Lent(sums)


def require_arrived(tensors: Mapping[str, Tensor], published: Published) -> None:
    """Prove that these are the published bytes.

    Raises:
        ParityError: naming the first that is not.
    """
    arrived = checksums(tensors)
    wrong = [name for name, sum_ in published.checksums.items() if arrived.get(name) != sum_]
    if wrong:
        raise ParityError(
            f"weights of {published.title} must arrive as they were published, "
            f"{len(wrong)} tensors did not, the first is {wrong[0]}",
            where="parity gate",
        )
