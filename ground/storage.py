"""The commit protocol for everything that lasts: a reader sees the old or the new, never a mixture.

stage beside → flush and fsync every file → manifest (sha256, size, facts) → fsync → rename → fsync
the parent. A folder is whole iff its manifest.json is there, its seal holds, and every listed file
has its size and hash. A crash leaves at most a `.name.staging` beside, which the next commit
removes. That there is only one writer is the run lock's business (ground/lock.py).
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath

from ground.disk import disk_errors, fsync_directory, fsync_file
from ground.errors import DataError
from ground.manifest import MANIFEST, Manifest, digest, plain_json, read_manifest

PICKLES = frozenset(
    (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".distcp", ".metadata", ".joblib", ".dill")
)
"""Suffixes of files that can run code when they are loaded."""
_LITTER = re.compile(r"^\..*\.(staging|removed|replaced)$")
"""What a crash may leave beside a file or folder; nobody reads it."""


def is_litter(name: str) -> bool:
    """Whether a file or folder of this name is what a crash of ours may have left."""
    return _LITTER.match(name) is not None


def write_file(path: Path, content: bytes | str) -> None:
    """Replace `path` by `content` in one step that survives a crash at any moment."""
    with replace_file(path) as staging:
        staging.write_bytes(content.encode() if isinstance(content, str) else content)


@contextmanager
def replace_file(path: Path, *, has_other_writers: bool = False) -> Iterator[Path]:
    """Yield a path beside `path` to write to; it takes the place of `path` at the end.

    Args:
        has_other_writers: others may write `path` at the same time; the last one stands. What a
            crash leaves of such a writer nobody removes, for it could be another's.

    Raises:
        SetupError: the disk is full or not writable; what was there before is untouched.
    """
    writer = f".{os.getpid()}.{threading.get_ident()}" if has_other_writers else ""
    staging = path.with_name(f".{path.name}{writer}.staging")
    with disk_errors(path):
        try:
            _remove(staging)
            yield staging
            fsync_file(staging)
            os.replace(staging, path)
            fsync_directory(path.parent)
        finally:
            with suppress(OSError):
                _remove(staging)


@contextmanager
def commit_directory(target: Path, facts: Mapping[str, object]) -> Iterator[Path]:
    """Yield an empty folder to fill; it becomes `target` as a whole, with its manifest, or not.

    An existing `target` is exchanged in one step and then removed. `facts` are read at the end,
    so that the body may add to them.

    Raises:
        SetupError: the disk is full or not writable; the old `target` is untouched.
    """
    staging = target.with_name(f".{target.name}.staging")
    with disk_errors(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _put_back(target)
            _remove(staging)
            staging.mkdir(mode=0o700)
            yield staging
            seal_directory(staging, facts)
            _put_in_place(staging, target)
        finally:
            with suppress(OSError):
                _remove(staging)


def seal_directory(
    directory: Path, facts: Mapping[str, object], leave_out: frozenset[str] = frozenset()
) -> Manifest:
    """Hash and fsync every file below `directory`, then write its manifest, last.

    A folder within that has a manifest of its own is covered by that manifest alone. Entries of
    the top folder named in `leave_out` are neither hashed nor listed.
    """
    files = {name: digest(directory / name, sync=True) for name in _names(directory, leave_out)}
    for folder in sorted({(directory / name).parent for name in files}):
        fsync_directory(folder)
    manifest = Manifest(files, plain_json(facts))
    write_file(directory / MANIFEST, manifest.to_json())
    return manifest


def verify_directory(directory: Path) -> Manifest:
    """Check every file of a committed folder, and of the committed folders within it.

    Raises:
        DataError: names the file that is missing, cut, changed, not a regular file, or a pickle
            that the manifest does not list.
    """
    manifest = read_manifest(directory)
    for name in manifest.files:
        path = verify_file(directory, name, manifest)
        if path.name == MANIFEST:
            verify_directory(path.parent)
    for name in _names(directory, frozenset()):
        if PurePosixPath(name).suffix in PICKLES and name not in manifest.files:
            raise DataError(
                "a pickle that packtrain did not write is refused: loading it could run code",
                where=str(directory / name),
                fix="remove it, or convert it to safetensors",
            )
    return manifest


def verify_file(directory: Path, name: str, manifest: Manifest | None = None) -> Path:
    """Check one file of a committed folder against its manifest and return its path."""
    path = directory / name
    fact = (manifest or read_manifest(directory)).files.get(name)
    if fact is None or name.startswith("/") or ".." in PurePosixPath(name).parts:
        raise DataError("the manifest does not list this file", where=str(path))
    fix = "use an older checkpoint, or make the stage again: packtrain run RECIPE --from STAGE"
    try:
        found = digest(path)
    except (FileNotFoundError, NotADirectoryError):
        raise DataError("the file is missing", where=str(path), fix=fix) from None
    if found.size != fact.size:
        what = f"the file must have {fact.size} bytes, it has {found.size}"
        raise DataError(what, where=str(path), fix=fix)
    if found != fact:
        raise DataError("the file was changed: its sha256 differs", where=str(path), fix=fix)
    return path


def remove_directory(directory: Path) -> None:
    """Remove a folder so that a crash half-way leaves no half folder under its name."""
    doomed = directory.with_name(f".{directory.name}.removed")
    _remove(doomed)
    os.replace(directory, doomed)
    _remove(doomed)


def _names(directory: Path, leave_out: frozenset[str]) -> list[str]:
    """Files below `directory` that its manifest has to cover, sorted."""
    names: list[str] = []
    for folder, folders, files in os.walk(directory):
        here = Path(folder)
        folders[:] = [name for name in folders if not is_litter(name)]
        files = [name for name in files if not is_litter(name)]
        if here == directory:
            folders[:] = [name for name in folders if name not in leave_out]
            files = [name for name in files if name not in leave_out | {MANIFEST}]
        elif MANIFEST in files:
            folders.clear()
            files = [MANIFEST]
        links = [name for name in folders if (here / name).is_symlink()]
        names += [(here / name).relative_to(directory).as_posix() for name in (*files, *links)]
    return sorted(names)


def _put_in_place(staging: Path, target: Path) -> None:
    """Rename `staging` to `target`; an existing `target` is exchanged and then removed."""
    if not target.exists():
        os.replace(staging, target)
        fsync_directory(target.parent)
        return
    if not _exchange(staging, target):
        aside = _aside(target)
        _remove(aside)
        os.replace(target, aside)
        os.replace(staging, target)
        fsync_directory(target.parent)
        _remove(aside)
        return
    fsync_directory(target.parent)
    _remove(staging)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two names in one step; False where the system or its file system cannot (NFS, macOS).

    There a replaced folder is moved aside first; a crash just then leaves it as `.name.replaced`,
    which the next commit puts back.
    """
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    at_cwd, exchange = -100, 2
    return rename(at_cwd, os.fsencode(first), at_cwd, os.fsencode(second), exchange) == 0


def _aside(target: Path) -> Path:
    return target.with_name(f".{target.name}.replaced")


def _put_back(target: Path) -> None:
    """Undo a replacement that a crash cut in two (only where names cannot be exchanged)."""
    if not target.exists() and _aside(target).exists():
        os.replace(_aside(target), target)


def _remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
