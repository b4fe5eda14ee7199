"""Teacher targets of token rows, kept so that no teacher ever says the same thing twice.

    key = hash(token ids, which of them are trained)     in the folder of an Identity
    find → hit: read from a shard, checked, no teacher pass
         → miss: `fill` has the teacher say it, and inserts

    <store>/<identity>/identity.json  <shard>.safetensors …

Rows are known before any packing, so that how they are batched later does not matter. Any number
of processes may fill one store: shards are whole or absent, and a row that two have inserted is
the same twice. A damaged shard is named and left out, as if its rows had never been there.

Who may read and fill a store is said by the folder that holds it: what is made inside has that
folder's permissions. A run's own store is as private as the run.
"""

from __future__ import annotations

import hashlib
import json
import logging
import stat
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from distill.config import FormatKind
from distill.identity import Identity
from distill.shard import (
    KEY_BYTES,
    SUFFIX,
    Shard,
    StoredRow,
    StrangerError,
    shared_file,
    write_shard,
)
from distill.targets import TeacherTargets
from ground.disk import disk_errors
from ground.errors import DataError

_IDENTITY = "identity.json"
_RATE = "rate.json"
_LOG = logging.getLogger("packtrain")


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A row that the teacher is to speak to, and where.

    Example:
        TokenRow((256, 31, 260, 40, 260), (False, False, False, True, True)): targets of two tokens
    """

    ids: tuple[int, ...]
    is_trained: tuple[bool, ...]
    """The first token has no context: it never is."""

    @property
    def key(self) -> bytes:
        """What the row's targets are stored under."""
        hasher = hashlib.sha256(array("q", self.ids).tobytes())
        hasher.update(bytes(self.is_trained))
        return hasher.digest()[:KEY_BYTES]

    @property
    def places(self) -> list[int]:
        """Indices of the trained tokens."""
        return [index for index, trained in enumerate(self.is_trained) if trained and index]


class TargetStore:
    """The targets of one identity, as they stand on the disk when this is opened.

    Example:
        store = TargetStore(folder, identity, "topk_tail")
        store.read(row.key) → TeacherTargets of its trained tokens
    """

    def __init__(self, folder: Path, identity: Identity, kind: FormatKind) -> None:
        self.identity = identity
        self.kind: FormatKind = kind
        self.folder = folder / identity.name
        self._shards: list[Shard] = []
        self._places: dict[bytes, list[tuple[Shard, int]]] = {}
        """Where each row is; several times where several have inserted it."""
        self._refuse_strangers()
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            self.open_shard(path)

    def __contains__(self, key: bytes) -> bool:
        return key in self._places

    @property
    def num_rows(self) -> int:
        """Rows that can be read."""
        return len(self._places)

    @property
    def num_tokens(self) -> int:
        """Tokens that the teacher has spoken to."""
        return sum(shard.num_tokens for shard in self._shards)

    @property
    def tokens_per_second(self) -> float | None:
        """What the teacher read a second when this was last filled; None where nobody knows."""
        try:
            return float(json.loads((self.folder / _RATE).read_bytes())["tokens_per_second"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def note_rate(self, tokens_per_second: float) -> None:
        """Remember how fast the teacher read, for the next estimate."""
        said = json.dumps({"tokens_per_second": tokens_per_second})
        with shared_file(self.folder / _RATE) as staging:
            staging.write_text(said + "\n", encoding="utf-8")

    @property
    def num_bytes(self) -> int:
        """What the shards take on the disk."""
        return sum(shard.path.stat().st_size for shard in self._shards)

    def read(self, key: bytes) -> TeacherTargets:
        """The targets of a row that the store has.

        Raises:
            DataError: the row is damaged, or not there.
        """
        if key not in self._places:
            raise DataError("the store has no targets of this row", where=str(self.folder))
        while True:
            shard, row = self._places[key][0]
            try:
                return shard.read(row).targets(self.kind)
            except DataError:
                if len(self._places[key]) == 1:
                    raise
                del self._places[key][0]

    def drop_damaged(self, keys: Sequence[bytes]) -> int:
        """Check rows and forget those whose bytes were changed, so that they count as missing."""
        found = 0
        for key in keys:
            if key not in self._places:
                continue
            try:
                self.read(key)
            except DataError as error:
                _LOG.warning("%s: %s; it is made again", error.where, error.what)
                del self._places[key]
                found += 1
        return found

    @contextmanager
    def writer(self, tokens_per_shard: int = 1 << 18) -> Iterator[Writer]:
        """Insert rows; what was inserted is on the disk, and here, at the end at the latest."""
        with disk_errors(self.folder):
            self._make_folder()
            if not (self.folder / _IDENTITY).is_file():
                said = json.dumps(asdict(self.identity), indent=1, sort_keys=True)
                with shared_file(self.folder / _IDENTITY) as staging:
                    staging.write_text(said + "\n", encoding="utf-8")
        writer = Writer(self, tokens_per_shard)
        try:
            yield writer
        finally:
            writer.flush()

    def open_shard(self, path: Path) -> None:
        """Read a file of this store from now on; a damaged one is named and left out."""
        try:
            shard = Shard(path, self.identity)
        except StrangerError:
            raise
        except DataError as error:
            _LOG.warning("%s: %s; its rows are made again", path, error.what)
            return
        self._shards.append(shard)
        for row, key in enumerate(shard.keys):
            self._places.setdefault(key, []).append((shard, row))

    def _make_folder(self) -> None:
        """As open to others as the folder that holds the store, whatever this process's umask."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            self.folder.mkdir()
            self.folder.chmod(stat.S_IMODE(self.folder.parent.stat().st_mode))

    def _refuse_strangers(self) -> None:
        """The folder's own word on whose it is."""
        path = self.folder / _IDENTITY
        if not path.is_file():
            return
        found = _read_identity(path)
        if found.name != self.identity.name:
            raise StrangerError(
                "these are the targets of another teacher, tokenizer, template or format: "
                + "; ".join(self.identity.differences(found)),
                where=str(self.folder),
                fix="move the folder back to where it was made, or remove it",
            )


class Writer:
    """Gathers rows until they are worth a file: `insert` … → `flush`."""

    def __init__(self, store: TargetStore, tokens_per_shard: int) -> None:
        self._store, self._most = store, tokens_per_shard
        self._rows: list[StoredRow] = []
        self._num_tokens = 0

    def insert(self, key: bytes, targets: TeacherTargets) -> None:
        """Take a row; it may wait for others before it is written."""
        self._rows.append(StoredRow.of(key, targets))
        self._num_tokens += len(targets)
        if self._num_tokens >= self._most:
            self.flush()

    def flush(self) -> None:
        """Write what was taken, and let the store read it."""
        if self._rows:
            path = write_shard(self._store.folder, self._store.identity, self._rows)
            self._rows, self._num_tokens = [], 0
            self._store.open_shard(path)


def identities(folder: Path) -> list[Identity]:
    """Whose targets a store holds; folders that do not say so are named and left out."""
    found = []
    for path in sorted(folder.glob(f"*/{_IDENTITY}")):
        try:
            found.append(_read_identity(path))
        except DataError as error:
            _LOG.warning("%s: %s; it is left out", error.where, error.what)
    return found


def _read_identity(path: Path) -> Identity:
    """What a folder says of itself.

    Raises:
        DataError: the file is torn, or says something else.
    """
    try:
        said = json.loads(path.read_bytes())
    except ValueError:
        raise DataError("this is not JSON", where=str(path), fix="remove the file") from None
    return Identity.parse(said, str(path))
