"""The atomic cut: learner and controller at one version, as files of one checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ground.errors import DataError

_MODEL, _OPTIMIZER = "model.safetensors", "optimizer.safetensors"
_GUARDS, _BOOKS = "guards.json", "books.json"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's, each of its parameter's shape; beside them stands the count `step`."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The learner at a version.

    Example:
        Snapshot(version=10, model=learner.model_tensors(), optimizer=learner.optimizer_tensors())
    """

    version: int
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    guards: dict[str, Any] = field(default_factory=dict)
    """What the guards have counted, see `LearnerLoop.guards`."""


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a life goes on from, weights and moments aside; with nothing saved, the beginning.

    Example:
        Cut(version=10, books={"version": 10, …}, guards={"braked_steps": 0, …})
    """

    version: int = 0
    books: dict[str, object] | None = None
    guards: dict[str, Any] | None = None


def write_cut(folder: Path, snapshot: Snapshot, books: Mapping[str, object]) -> None:
    """Fill a checkpoint's folder: weights, moments and RNG as safetensors, the rest as JSON."""
    save_file(snapshot.model, folder / _MODEL)
    save_file(snapshot.optimizer, folder / _OPTIMIZER)
    (folder / _GUARDS).write_text(json.dumps(snapshot.guards), encoding="utf-8")
    (folder / _BOOKS).write_text(json.dumps(books), encoding="utf-8")


def read_snapshot(folder: Path, version: int) -> Snapshot:
    """The learner's part of a verified checkpoint."""
    guards = json.loads((folder / _GUARDS).read_text(encoding="utf-8"))
    return Snapshot(version, load_file(folder / _MODEL), load_file(folder / _OPTIMIZER), guards)


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


def require_moments(moments: Mapping[str, Tensor], num_trained: int) -> None:
    """Refuse saved moments of other parameters than those that are trained; none are in order.

    Raises:
        DataError: naming what is missing or unknown.
    """
    if not moments:
        return
    wanted = {f"{n}.{name}" for n in range(num_trained) for name in ("step", *MOMENTS)}
    if wrong := sorted(wanted ^ moments.keys()):
        raise DataError(
            f"saved moments must be those of the {num_trained} parameters that are trained, "
            f"{len(wrong)} are missing or unknown: {', '.join(wrong[:3])}",
            where="rl checkpoint",
            why="the cut is of another model, or of a packtrain that gave numbers to an encoder of "
            "images too",
            fix="use the model this run began with, or start the stage again (--from rl)",
        )


def write_weights(folder: Path, model: Mapping[str, Tensor]) -> None:
    """Weights alone: what the best version is kept as."""
    save_file(dict(model), folder / _MODEL)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """The weights of a verified checkpoint."""
    return load_file(folder / _MODEL)
