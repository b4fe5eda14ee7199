"""A short name for weights, to write beside what they said."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ground.errors import DataError
from ground.manifest import read_manifest


def model_name(path: Path) -> str:
    """Folder name and eight hex digits over its manifest, else over its config and file sizes.

    Example:
        runs/tiny/herd/teacher → "teacher@3f9a01bc"
    """
    try:
        files = read_manifest(path).files
        facts = [f"{name} {fact.sha256}" for name, fact in sorted(files.items())]
    except DataError:
        files = sorted(file for file in path.iterdir() if file.is_file())
        facts = [f"{file.name} {file.stat().st_size}" for file in files]
        facts.append((path / "config.json").read_text())
    return f"{path.name}@{hashlib.sha256('|'.join(facts).encode()).hexdigest()[:8]}"
