"""The directory of a run, and what becomes of each stage's folder in it.

absent → unfinished (started.json) → done (manifest.json, written last)
done or unfinished, with --overwrite → .<stage>.replaced until the new one is done

runs/<name>/
  recipe.yaml  recipe.resolved.yaml  env.json  lock  lock.json  log/
  <stage>/ started.json  metrics.jsonl  events.jsonl  checkpoints/  model/  manifest.json
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ground.disk import disk_errors, fsync_directory
from ground.errors import DataError, SetupError
from ground.lock import RunLock
from ground.manifest import MANIFEST, Manifest, read_manifest
from ground.provenance import changed, environment, fingerprint
from ground.recipe import RecipeDocument
from ground.storage import remove_directory, seal_directory, write_file

State = Literal["absent", "unfinished", "done"]

STARTED = "started.json"
VOLATILE = frozenset(
    (STARTED, "metrics.jsonl", "events.jsonl", "progress.json", "checkpoints", "evaluation")
)
"""What may change after a stage is done, or is verified on its own: not in its manifest."""


@dataclass(frozen=True)
class RunDir:
    """One run on disk.

    Example:
        run = RunDir(Path("runs/tiny"))
        run.is_done("sft") → True;  run.stage("sft") → runs/tiny/sft
    """

    path: Path

    @contextmanager
    def open(self) -> Iterator[RunLock]:
        """Make the directory (0700) if need be and lock it.

        Raises:
            SetupError: somebody else's run or folder, or not writable.
        """
        with disk_errors(self.path / "recipe.yaml"):
            self._make()
        with RunLock.acquire(self.path) as lock:
            yield lock

    def describe(self, document: RecipeDocument) -> None:
        """Keep the recipe and env.json; called once the recipe is accepted, by who has the lock."""
        write_file(self.path / "recipe.yaml", document.path.read_bytes())
        write_file(self.path / "recipe.resolved.yaml", document.resolved())
        write_file(self.path / "env.json", json.dumps(environment(), indent=1) + "\n")

    def stage(self, name: str) -> Path:
        """The folder of a stage (`sft`) or of an evaluation (`sft/evaluation`)."""
        return self.path / name

    def state(self, stage: str) -> State:
        """How far a stage has come."""
        if (self.stage(stage) / MANIFEST).is_file():
            return "done"
        return "unfinished" if self.stage(stage).is_dir() else "absent"

    def is_done(self, stage: str) -> bool:
        """Whether the stage finished: its manifest, written last, is there."""
        return self.state(stage) == "done"

    def manifest(self, stage: str) -> Manifest:
        """The manifest of a finished stage; its `facts` hold summary, settings, fingerprint."""
        return read_manifest(self.stage(stage))

    def is_current(self, stage: str, settings: Mapping[str, str]) -> bool:
        """Whether the stage is done, and was made with these settings.

        Raises:
            SetupError: it is done, with other settings; the message names them.
        """
        if not self.is_done(stage):
            return False
        facts = self.manifest(stage).facts
        if facts.get("fingerprint") == fingerprint(settings):
            return True
        differences = ", ".join(changed(facts.get("settings"), settings))
        raise SetupError(
            f"stage {stage} is finished, with other settings (changed: {differences})",
            where=str(self.stage(stage)),
            fix="make it again with --overwrite, undo the change, or use another --run",
        )

    def begin(
        self, stage: str, settings: Mapping[str, str], *, resume: bool, overwrite: bool
    ) -> bool:
        """Prepare the folder of a stage; False when it is done and current: nothing to do.

        Raises:
            SetupError: it is done with other settings, or was started and neither `resume` nor
                `overwrite` says what to do, or was started with other settings.
        """
        folder = self.stage(stage)
        if overwrite:
            self._set_aside(stage)
        elif self.is_current(stage, settings):
            return False
        elif self.state(stage) == "unfinished":
            self._check_unfinished(stage, settings, resume)
        with disk_errors(folder / STARTED):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        note = {"settings": dict(settings), "pid": os.getpid(), "started": time.time()}
        write_file(folder / STARTED, json.dumps(note, indent=1) + "\n")
        return True

    def finish(
        self, stage: str, settings: Mapping[str, str], summary: Mapping[str, object]
    ) -> Manifest:
        """Hash what the stage made and write its manifest, last; then drop what it replaces."""
        folder = self.stage(stage)
        facts = {
            "stage": stage,
            "finished": time.time(),
            "seconds": self._seconds_since_start(stage),
            "settings": dict(settings),
            "fingerprint": fingerprint(settings),
            "summary": dict(summary),
        }
        with disk_errors(folder / MANIFEST):
            manifest = seal_directory(folder, facts, VOLATILE)
            if self._replaced(stage).exists():
                remove_directory(self._replaced(stage))
        return manifest

    def _seconds_since_start(self, stage: str) -> float | None:
        """Wall-clock time since the stage's last start (a resumed one counts from there)."""
        try:
            note = json.loads((self.stage(stage) / STARTED).read_bytes())
            return round(time.time() - float(note["started"]), 3)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def discard(self, stage: str) -> None:
        """Remove an unfinished folder that holds nothing worth resuming (an evaluation's)."""
        if self.state(stage) == "unfinished":
            remove_directory(self.stage(stage))

    def _make(self) -> None:
        if self.path.is_dir() and any(self.path.iterdir()) and not self._is_ours():
            raise SetupError(
                "the directory is not empty and is not a run of packtrain",
                where=str(self.path),
                fix="choose another directory with --run",
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(mode=0o700, exist_ok=True)
        (self.path / "log").mkdir(mode=0o700, exist_ok=True)

    def _is_ours(self) -> bool:
        return any((self.path / name).exists() for name in ("lock", "recipe.yaml", "log"))

    def _check_unfinished(self, stage: str, settings: Mapping[str, str], resume: bool) -> None:
        folder = self.stage(stage)
        if not resume:
            raise SetupError(
                f"stage {stage} was started and not finished",
                where=str(folder),
                fix="continue it with --resume, or start it again with --overwrite",
            )
        try:
            before = json.loads((folder / STARTED).read_bytes())["settings"]
        except FileNotFoundError:
            return  # killed before its first write: nothing was made yet
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(
                "the note of the stage's start is damaged",
                where=str(folder / STARTED),
                fix="start the stage again with --overwrite",
            ) from None
        differences = ", ".join(changed(before, settings))
        if differences:
            raise SetupError(
                f"stage {stage} was started with other settings (changed: {differences})",
                where=str(folder),
                fix="undo the change, or start it again with --overwrite",
            )

    def _replaced(self, stage: str) -> Path:
        return self.stage(stage).with_name(f".{self.stage(stage).name}.replaced")

    def _set_aside(self, stage: str) -> None:
        """Move a finished stage aside until its successor is done; remove an unfinished one."""
        folder, aside = self.stage(stage), self._replaced(stage)
        state = self.state(stage)
        with disk_errors(folder):
            if state == "unfinished":
                remove_directory(folder)
            elif state == "done":
                if aside.exists():
                    remove_directory(aside)
                os.replace(folder, aside)
                fsync_directory(aside.parent)
