"""Hand-over of weights: published by the learner, kept by an actor that outlives it.

    publish(version, tensors) → kept (newest and the one before) → fetched by workers

A Ray object dies with the process that put it, so the keeper puts its own copy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import ray
from ray.actor import ActorProxy

from ground.errors import DataError, InfraError

if TYPE_CHECKING:
    from torch import Tensor

_KEPT = 2


@dataclass(frozen=True, slots=True)
class Published:
    """A version of the weights as it lies in Ray's object store.

    Example:
        Published(version=3, digest="5e88…", tensors={"model.norm.weight": tensor([…])})
    """

    version: int
    digest: str
    tensors: dict[str, Tensor]

    def verified(self, version: int) -> dict[str, Tensor]:
        """The tensors, if they are of this version and arrived as they were published."""
        if self.version != version or digest_of(self.tensors) != self.digest:
            raise InfraError(
                f"weights of version {version} must arrive whole, got version {self.version}"
                + ("" if self.version != version else " with another digest"),
                where="hand-over",
            )
        return self.tensors


class WeightKeeper:
    """Keeps the newest published weights and the version before; a Ray actor (`start_keeper`)."""

    def __init__(self) -> None:
        self._refs: dict[int, ray.ObjectRef[Published]] = {}

    def publish(self, version: int, tensors: Mapping[str, Tensor]) -> str:
        """Keep a copy of these weights as `version`; returns their digest.

        Raises:
            DataError: the version is not newer than the newest.
        """
        newest = max(self._refs, default=-1)
        if version <= newest:
            raise DataError(
                f"versions must rise, got {version} after {newest}", where="weight keeper"
            )
        copies = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
        published = Published(version, digest_of(copies), copies)
        self._refs[version] = ray.put(published)
        for old in sorted(self._refs)[:-_KEPT]:
            del self._refs[old]
        return published.digest

    def current(self) -> tuple[int, ray.ObjectRef[Published]]:
        """Newest version and a reference to its weights."""
        if not self._refs:
            raise InfraError("no weights have been published yet", where="weight keeper")
        version = max(self._refs)
        return version, self._refs[version]

    def versions(self) -> list[int]:
        """Versions that can still be fetched."""
        return sorted(self._refs)


def start_keeper(name: str | None = None) -> ActorProxy[WeightKeeper]:
    """Start a keeper that belongs to the calling process and dies with it, not with a learner."""
    options = {"num_cpus": 0, "max_restarts": 0} | ({"name": name} if name else {})
    return ray.remote(WeightKeeper).options(**options).remote()


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, shapes, dtypes and bytes, in the order of names."""
    import torch  # here and not above: who starts a keeper needs no torch

    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
