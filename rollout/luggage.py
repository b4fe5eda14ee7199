"""What a worker needs of a run's files, carried along: its machine may not see them.

    pack (where the run is) → travels with the worker's config → unpack (where the worker is)

Weights are not in it: those of a version come by hand-over, and a worker has no others.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from ground.disk import disk_errors
from ground.errors import DataError

_PREFIX = "packtrain-luggage-"
_SUFFIXES = (".json", ".jinja", ".txt", ".model")
"""Configuration, tokenizer, chat template."""
_LARGEST_BYTES = 64 << 20
"""Of one file; a tokenizer of 256k tokens has 32 MB."""


@dataclass(frozen=True, slots=True)
class Unpacked:
    """Where the files are on this machine.

    Example:
        Unpacked(model=Path("/tmp/packtrain-luggage-4711-x/model"), rewards=(…,), folder=…)
    """

    model: Path
    rewards: tuple[Path, ...]
    folder: Path | None = None
    """What `remove` has to remove; None where the run's own files are used."""

    def remove(self) -> None:
        """Take the copies away, if there are any."""
        if self.folder:
            shutil.rmtree(self.folder, ignore_errors=True)


@dataclass(frozen=True, slots=True)
class Luggage:
    """A model folder without its weights, and the user's reward files.

    Example:
        Luggage.pack(Path("runs/tiny/sft/model"), (Path("rewards.py"),)).unpack().model
    """

    model: Path
    """Where the folder is on the run's own machine."""
    files: Mapping[str, bytes]
    """Its small files by name."""
    rewards: Mapping[Path, bytes]

    @classmethod
    def pack(cls, model: Path, rewards: Sequence[Path] = ()) -> Luggage:
        """Read the files.

        Raises:
            DataError: one of them is too large to be what it should be, or cannot be read.
        """
        paths = sorted(path for path in model.glob("*") if path.suffix in _SUFFIXES)
        return cls(
            model,
            {path.name: _read(path) for path in paths if "safetensors" not in path.name},
            {path: _read(path) for path in rewards},
        )

    def unpack(self) -> Unpacked:
        """Where the files can be read here: in their own place, or as copies in a new folder."""
        if self._is_here():
            return Unpacked(self.model, tuple(self.rewards))
        folder = _new_folder()
        with disk_errors(folder):
            for name, content in self.files.items():
                _write(folder / "model" / name, content)
            rewards = [folder / f"rewards-{n}" / path.name for n, path in enumerate(self.rewards)]
            for path, content in zip(rewards, self.rewards.values(), strict=True):
                _write(path, content)
        return Unpacked(folder / "model", tuple(rewards), folder)

    def _is_here(self) -> bool:
        """Whether this machine shows the same files in the same place."""
        wanted = {self.model / name: content for name, content in self.files.items()}
        wanted |= self.rewards
        try:
            return all(path.read_bytes() == content for path, content in wanted.items())
        except OSError:
            return False


@contextmanager
def own_folder() -> Iterator[Path]:
    """A folder for files of this process alone; of a killed one, whoever comes next removes it."""
    folder = _new_folder()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _new_folder() -> Path:
    _remove_leftovers()
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))


def _read(path: Path) -> bytes:
    try:
        if path.stat().st_size > _LARGEST_BYTES:
            raise DataError(
                f"a file that goes to every worker must have at most {_LARGEST_BYTES >> 20} MiB, "
                f"it has {path.stat().st_size >> 20}",
                where=str(path),
                fix="move it out of the model folder",
            )
        return path.read_bytes()
    except OSError as error:
        raise DataError("cannot be read", where=str(path), why=str(error)) from error


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)


def _remove_leftovers() -> None:
    """Folders of workers that were killed: they could not tidy up."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(ValueError):
            pid = int(folder.name.removeprefix(_PREFIX).partition("-")[0])
            if not psutil.pid_exists(pid):
                shutil.rmtree(folder, ignore_errors=True)
