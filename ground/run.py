"""The directory of a run, and what becomes of each stage's folder in it.

absent → unfinished (started.json) → done (manifest.json, written last)
done or unfinished, with --overwrite → .<stage>.replaced until the new one is done

A folder is a run iff it holds our mark, and a stage's folder is ours iff it holds one of the two
notes above: nothing else is ever written into or removed, whatever its name is.

runs/<name>/
  packtrain.run  recipe.yaml  recipe.resolved.yaml  env.json  lock  lock.json  log/
  <stage>/ started.json  metrics.jsonl  events.jsonl  checkpoints/  model/  manifest.json
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping, Sequence
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
from ground.storage import is_litter, remove_directory, seal_directory, write_file

State = Literal["absent", "unfinished", "done"]

MARK = "packtrain.run"
"""The file that makes a folder a run; the first thing that is written there."""
STARTED = "started.json"
VOLATILE = frozenset(
    (STARTED, "metrics.jsonl", "events.jsonl", "progress.json", "checkpoints", "evaluation")
)
"""What may change after a stage is done, or is verified on its own: not in its manifest."""
_RAY_COPIES = "working_dir_files"
"""Ray's name for the folders that it copies a job's working directory to."""
_MARK_TEXT = "This folder is a run of packtrain: see `packtrain status` and `packtrain report`.\n"

_LOG = logging.getLogger("packtrain")


def is_run(path: Path) -> bool:
    """Whether the folder was made by packtrain as the directory of a run."""
    return (path / MARK).is_file()


def require_run(path: Path) -> None:
    """Refuse to look into a folder that is not a run.

    Raises:
        DataError: it has no mark, or there is no such folder.
    """
    if not is_run(path):
        raise DataError(
            "this is not a run directory", where=str(path), fix="name one, e.g. runs/tiny"
        )


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
            SetupError: somebody else's run or folder, not writable, or sure to be removed.
        """
        self._require_lasting()
        with disk_errors(self.path / "recipe.yaml"):
            self._make()
        with RunLock.acquire(self.path) as lock:
            yield lock

    def _require_lasting(self) -> None:
        """Refuse Ray's copy of a job's folder, which goes with the job."""
        if _RAY_COPIES in self.path.resolve().parts:
            raise SetupError(
                "a run must be in a folder that stays; this one is in Ray's copy of the job's "
                "working directory, which Ray removes",
                where=str(self.path),
                fix="choose another directory with --run /…",
            )

    def require_usable(self) -> None:
        """Refuse a directory that holds anything and is not a run.

        Raises:
            SetupError: somebody else's folder.
        """
        if self.path.is_dir() and not is_run(self.path) and not _is_empty(self.path):
            raise SetupError(
                "the directory is not empty and is not a run of packtrain",
                where=str(self.path),
                fix="choose another directory with --run",
            )

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
        if changes := self.changes(stage, settings):
            raise self.outdated(stage, changes)
        return True

    def changes(self, stage: str, settings: Mapping[str, str]) -> list[str]:
        """Names of the settings in which what is kept of the stage differs from these.

        An unfinished stage that has not committed anything yet has nothing to lose: none differ.
        """
        state = self.state(stage)
        if state == "done":
            return changed(self.manifest(stage).facts.get("settings"), settings)
        if state == "unfinished" and self._is_worth_keeping(stage):
            before = self._settings_at_start(stage)
            return [] if before is None else changed(before, settings)
        return []

    def outdated(self, stage: str, changes: Sequence[str], fix: str = "") -> SetupError:
        """The refusal of a stage that was made, or begun, with other settings."""
        how = "is finished," if self.is_done(stage) else "was started"
        return SetupError(
            f"stage {stage} {how} with other settings (changed: {', '.join(changes)})",
            where=str(self.stage(stage)),
            fix=fix or "make it again with --overwrite, undo the change, or use another --run",
        )

    def require_ours(self, stage: str) -> None:
        """Refuse a stage's folder that holds files and no note of ours.

        Raises:
            SetupError: somebody else's files are there.
        """
        folder = self.stage(stage)
        if folder.exists() and not self.holds(stage):
            raise SetupError(
                "the folder holds files and was not made by packtrain",
                where=str(folder),
                fix="move it away, or choose another directory with --run",
            )

    def holds(self, stage: str) -> bool:
        """Whether the stage's folder is there and ours: it has a note of ours, or nothing."""
        folder = self.stage(stage)
        is_noted = any((folder / name).is_file() for name in (STARTED, MANIFEST))
        return folder.is_dir() and (is_noted or _is_empty(folder))

    def begin(
        self, stage: str, settings: Mapping[str, str], *, resume: bool, overwrite: bool
    ) -> bool:
        """Prepare the folder of a stage; False when it is done and current: nothing to do.

        Raises:
            SetupError: it is done with other settings, or was started and neither `resume` nor
                `overwrite` says what to do, or has kept something that it made with other settings,
                or the folder is not ours.
        """
        folder = self.stage(stage)
        self.require_ours(stage)
        if overwrite:
            self._set_aside(stage)
        elif self.is_current(stage, settings):
            return False
        elif self.state(stage) == "unfinished":
            self._go_on(stage, settings, resume)
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
        self.require_usable()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.mkdir(mode=0o700, exist_ok=True)
        if not is_run(self.path):
            self._mark()
        (self.path / "log").mkdir(mode=0o700, exist_ok=True)

    def _mark(self) -> None:
        """Say whose folder this is, before anything else is in it; others may do so meanwhile."""
        handle = os.open(self.path / MARK, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(_MARK_TEXT)
            file.flush()
            os.fsync(handle)
        fsync_directory(self.path)

    def _go_on(self, stage: str, settings: Mapping[str, str], resume: bool) -> None:
        """Check that an unfinished stage may be continued; begin anew where nothing was kept."""
        if not resume:
            raise SetupError(
                f"stage {stage} was started and not finished",
                where=str(self.stage(stage)),
                fix="continue it with --resume, or start it again with --overwrite",
            )
        if changes := self.changes(stage, settings):
            raise self.outdated(stage, changes)
        before = self._settings_at_start(stage)
        if before is not None and changed(before, settings):
            _LOG.info("%s begins anew: its settings changed, nothing was kept yet", stage)
            remove_directory(self.stage(stage))

    def _is_worth_keeping(self, stage: str) -> bool:
        """Whether an unfinished stage has committed a checkpoint, a shard, or a step of RL."""
        folder = self.stage(stage)
        return any(folder.glob(f"*/**/{MANIFEST}")) or any(folder.glob("groups/*.parquet"))

    def _settings_at_start(self, stage: str) -> dict[str, str] | None:
        """What the stage was started with; None when it was killed before its first write."""
        note = self.stage(stage) / STARTED
        try:
            return dict(json.loads(note.read_bytes())["settings"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError):
            raise DataError(
                "the note of the stage's start is damaged",
                where=str(note),
                fix="start the stage again: packtrain run RECIPE --from STAGE",
            ) from None

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


def _is_empty(folder: Path) -> bool:
    """Whether a folder holds nothing, or only what a crash of ours may leave."""
    return folder.is_dir() and all(is_litter(entry.name) for entry in folder.iterdir())
