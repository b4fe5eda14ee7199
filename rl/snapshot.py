"""The atomic cut: learner and controller at one version, as files of one checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ground.errors import DataError

_MODEL, _OPTIMIZER, _BOOKS = "model.safetensors", "optimizer.safetensors", "books.json"


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The learner at a version.

    Example:
        Snapshot(version=10, model=learner.model_tensors(), optimizer=learner.optimizer_tensors())
    """

    version: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]


def write_cut(folder: Path, snapshot: Snapshot, books: Mapping[str, object]) -> None:
    """Fill a checkpoint's folder: weights, moments and RNG as safetensors, the books as JSON."""
    save_file(snapshot.model, folder / _MODEL)
    save_file(snapshot.optimizer, folder / _OPTIMIZER)
    (folder / _BOOKS).write_text(json.dumps(books), encoding="utf-8")


def read_snapshot(folder: Path, version: int) -> Snapshot:
    """The learner's part of a verified checkpoint."""
    return Snapshot(version, load_file(folder / _MODEL), load_file(folder / _OPTIMIZER))


def read_books(folder: Path) -> dict[str, object]:
    """The controller's part of a verified checkpoint."""
    return json.loads((folder / _BOOKS).read_text(encoding="utf-8"))


def restore(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Load `tensors_of(model)` back: every weight, where tied ones appear under one name only.

    Raises:
        DataError: a tensor is unknown, or a weight is missing that is not tied to a loaded one.
    """
    loaded = {id(v) for k, v in model.state_dict(keep_vars=True).items() if k in tensors}
    absent = [k for k, v in model.state_dict(keep_vars=True).items() if id(v) not in loaded]
    unknown = sorted(tensors.keys() - model.state_dict().keys())
    if absent or unknown:
        raise DataError(
            f"saved weights must be those of the model: {absent[:3]} are missing, "
            f"{unknown[:3]} are unknown",
            where="rl checkpoint",
            fix="use the model this run began with, or start the stage again (--from rl)",
        )
    model.load_state_dict(dict(tensors), strict=False)


def write_weights(folder: Path, model: Mapping[str, Tensor]) -> None:
    """Weights alone: what the best version is kept as."""
    save_file(dict(model), folder / _MODEL)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a verified checkpoint."""
    return load_file(folder / _MODEL)
