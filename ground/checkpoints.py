"""A stage's checkpoints: committed as wholes, verified when loaded, never fewer than one valid.

staged → committed → rotated out          damaged → step_000100.damaged (kept aside)
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from ground.disk import fsync_directory
from ground.errors import DataError
from ground.manifest import read_manifest
from ground.storage import commit_directory, remove_directory, verify_directory

_LOG = logging.getLogger("packtrain")
_STEP = re.compile(r"^step_(\d{6,})$")


@dataclass(frozen=True)
class Checkpoints:
    """The folder of one stage's checkpoints: `step_000100/`, ….

    Example:
        checkpoints = Checkpoints(stage.directory / "checkpoints", keep=2)
        checkpoints.commit(100, lambda folder: save_state(folder), {"loss": 0.3})
        checkpoints.latest() → …/checkpoints/step_000100, its hashes checked
    """

    root: Path
    keep: int = 2
    """Newest checkpoints that stay; at least 1."""
    identity: Mapping[str, str] = field(default_factory=dict)
    """Fingerprints that a checkpoint must agree with to be loaded: model, tokenizer, recipe."""

    def __post_init__(self) -> None:
        if self.keep < 1:
            raise ValueError(f"keep must be at least 1, got {self.keep}")

    def commit(
        self, step: int, writer: Callable[[Path], object], facts: Mapping[str, object]
    ) -> Path:
        """Let `writer` fill a folder, commit it as the checkpoint of `step`, rotate older ones.

        Raises:
            SetupError: the disk is full; all earlier checkpoints are intact.
        """
        target = self.root / f"step_{step:06d}"
        all_facts = {**facts, "step": step, "identity": dict(self.identity)}
        with commit_directory(target, all_facts) as staging:
            writer(staging)
        self._rotate(target)
        return target

    def latest(self) -> Path | None:
        """The newest checkpoint whose hashes hold; None when none was ever committed.

        A damaged one is renamed to `….damaged` with a warning and the one before it is taken.

        Raises:
            DataError: every checkpoint is damaged, or they belong to another model or recipe.
        """
        for path in reversed(self.steps()):
            try:
                manifest = verify_directory(path)
            except DataError as error:
                _set_aside(path)
                _LOG.warning("a damaged checkpoint is set aside, taking an older one: %s", error)
                continue
            self._check_identity(path, manifest.facts.get("identity"))
            return path
        damaged = sorted(self.root.glob("step_*.damaged*"))
        if damaged:
            raise DataError(
                f"every checkpoint is damaged ({len(damaged)} of them)",
                where=str(self.root),
                fix="restore one from a backup, or start the stage again (--from STAGE)",
            )
        return None

    def steps(self) -> list[Path]:
        """Committed checkpoints, oldest first; nothing is verified or moved."""
        if not self.root.is_dir():
            return []
        found = [path for path in self.root.iterdir() if _STEP.match(path.name)]
        return sorted(found, key=step_of)

    def forget_after(self, step: int) -> None:
        """Remove what was committed after a step: it belongs to work that is done again."""
        for path in reversed(self.steps()):
            if step_of(path) > step:
                remove_directory(path)

    def _rotate(self, newest: Path) -> None:
        """Remove the oldest beyond `keep`; `newest`, just committed, always stays."""
        others = [path for path in self.steps() if path != newest]
        surplus = len(others) + 1 - self.keep
        for path in others[: max(surplus, 0)]:
            remove_directory(path)

    def _check_identity(self, path: Path, found: object) -> None:
        other = found if isinstance(found, dict) else {}
        wrong = [
            f"{name} {other.get(name)} instead of {wanted}"
            for name, wanted in self.identity.items()
            if other.get(name) != wanted
        ]
        if wrong:
            raise DataError(
                "the checkpoint belongs to another run: " + ", ".join(wrong),
                where=str(path),
                fix="undo the change, or start the stage again: packtrain run RECIPE --from STAGE",
            )


def step_of(path: Path) -> int:
    """`…/step_000100` → 100."""
    return int(path.name.removeprefix("step_"))


def facts_of(path: Path) -> dict[str, object]:
    """What the checkpoint's writer wanted to be remembered."""
    return read_manifest(path).facts


def _set_aside(path: Path) -> None:
    """Rename a damaged checkpoint, which stays for its owner to look at."""
    target = path.with_name(f"{path.name}.damaged")
    number = 1
    while target.exists():
        number += 1
        target = path.with_name(f"{path.name}.damaged{number}")
    os.replace(path, target)
    fsync_directory(path.parent)
