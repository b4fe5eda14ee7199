"""A short name for weights, to write beside what they said."""

from __future__ import annotations

from pathlib import Path

from ground.provenance import folder_fingerprint


def model_name(path: Path) -> str:
    """Folder name and eight hex digits over its files.

    Example:
        runs/tiny/herd/teacher → "teacher@3f9a01bc"
    """
    return f"{path.name}@{folder_fingerprint(path)[:8]}"
