"""The manifest of a committed folder: what it holds, sealed, so that damage is noticed by name."""

from __future__ import annotations

import hashlib
import json
import math
import numbers
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from ground.errors import DataError

MANIFEST = "manifest.json"
SCHEMA = 1
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class FileFact:
    """What a manifest knows about one file.

    Example:
        FileFact(sha256="9f86d0…", size=4)
    """

    sha256: str
    size: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a whole folder holds, and what its maker wanted to be remembered.

    Example:
        Manifest(files={"model.safetensors": FileFact("9f86d0…", 4)}, facts={"step": 100})
    """

    files: dict[str, FileFact]
    """By path within the folder, `/` between its parts."""
    facts: dict[str, object]
    """JSON values: step, summary, fingerprints, parents."""
    schema: int = SCHEMA

    @property
    def seal(self) -> str:
        """sha256 over everything else: a flipped bit in the manifest itself is noticed."""
        text = json.dumps(self._content(), sort_keys=True, allow_nan=False)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def content(self) -> str:
        """Sixteen hex digits over the files alone: equal iff the same things were made."""
        files = {name: fact.sha256 for name, fact in self.files.items()}
        return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The file's text; it ends with its brace, so that no byte can be cut off unnoticed."""
        return json.dumps({**self._content(), "seal": self.seal}, indent=1, sort_keys=True)

    def _content(self) -> dict[str, object]:
        files = {name: [fact.sha256, fact.size] for name, fact in self.files.items()}
        return {"schema": self.schema, "files": files, "facts": self.facts}


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a committed folder, its seal checked; the files are not looked at.

    Raises:
        DataError: absent, damaged, or of a schema that this version does not know.
    """
    path = directory / MANIFEST
    try:
        content = json.loads(read_regular(path))
    except (FileNotFoundError, NotADirectoryError):
        raise DataError("there is no manifest.json: never finished", where=str(directory)) from None
    except (ValueError, RecursionError):
        raise DataError("the manifest is damaged: it is not JSON", where=str(path)) from None
    schema = content.get("schema") if isinstance(content, dict) else None
    if isinstance(schema, int) and schema > SCHEMA:
        raise DataError(
            f"written by a newer packtrain: schema {schema}, this one reads up to {SCHEMA}",
            where=str(path),
            fix="upgrade packtrain",
        )
    try:
        files = {name: FileFact(*fact) for name, fact in content["files"].items()}
        manifest = Manifest(files, content["facts"], content["schema"])
        seal = content["seal"]
    except (KeyError, TypeError, AttributeError):
        raise DataError("the manifest is damaged: keys are missing", where=str(path)) from None
    if seal != manifest.seal:
        raise DataError("the manifest is damaged: its seal does not hold", where=str(path))
    return manifest


def plain_json(facts: Mapping[str, object]) -> dict[str, object]:
    """The facts as JSON will give them back: text keys, lists, and null for what is not finite."""
    return {str(key): _plain(value) for key, value in facts.items()}


def _plain(value: object) -> object:
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return plain_json(value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value)


def digest(path: Path, *, sync: bool = False) -> FileFact:
    """sha256 and size of a regular file; `sync` brings it to the disk as well."""
    sha256, size = hashlib.sha256(), 0
    with _opened(path) as file:
        while chunk := file.read(_CHUNK):
            sha256.update(chunk)
            size += len(chunk)
        if sync:
            os.fsync(file.fileno())
    return FileFact(sha256.hexdigest(), size)


def read_regular(path: Path) -> bytes:
    """Read a file that must be a regular one: never a link, a FIFO that hangs, or a device."""
    with _opened(path) as file:
        return file.read()


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    if path.is_symlink():
        raise DataError("must be a regular file, it is a symbolic link", where=str(path))
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(handle, "rb") as file:
        if not stat.S_ISREG(os.fstat(handle).st_mode):
            raise DataError("must be a regular file", where=str(path))
        yield file
