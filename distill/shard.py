"""A file of stored targets: written once, as a whole, and read row by row from the disk's cache.

A shard is a safetensors file. Its header says whose targets these are; each row has its key, its
place and a checksum over its bytes, so that damage is noticed where it is and nowhere else.

R rows of a shard, T tokens of all of them, K outcomes of a token.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from xxhash import xxh3_64

from distill.config import FormatKind
from distill.identity import Identity
from distill.targets import TeacherTargets
from ground.errors import DataError
from ground.storage import replace_file

KEY_BYTES = 16
SUFFIX = ".safetensors"
_FLOATS = ("logprobs", "tail", "realised", "entropy")
_WHERE = ("keys", "starts", "checksums")
_FIX = "fill the store again: packtrain teacher fill RECIPE computes what is missing or damaged"


@dataclass(frozen=True, slots=True)
class StoredRow:
    """The targets of one row, ready for the disk.

    Example:
        StoredRow.of(key, targets)
    """

    key: bytes
    columns: dict[str, NDArray[np.generic]]

    @classmethod
    def of(cls, key: bytes, targets: TeacherTargets) -> StoredRow:
        """Log-probs in half precision: off by at most 0.4 % of a probability above 1e-7."""
        numbers = (targets.logprobs_TK, targets.tail_T, targets.realised_T, targets.entropy_T)
        columns = {
            name: tensor.to(torch.float16).cpu().numpy()
            for name, tensor in zip(_FLOATS, numbers, strict=True)
        }
        if targets.ids_TK is not None:
            columns["ids"] = targets.ids_TK.to(torch.int32).cpu().numpy()
        return cls(key, columns)

    @property
    def checksum(self) -> int:
        """xxh3 over key and columns."""
        hasher = xxh3_64(self.key)
        for name in sorted(self.columns):
            hasher.update(np.ascontiguousarray(self.columns[name]).view(np.uint8).data)
        return hasher.intdigest()

    @property
    def num_tokens(self) -> int:
        """T of this row."""
        return len(self.columns["tail"])

    def targets(self, kind: FormatKind) -> TeacherTargets:
        """As the loss wants them: probabilities of a token's outcomes sum to 1 again.

        Half precision moves the sum by a thousandth; `full` and `topk_tail` are brought back to it.
        """
        logprobs_TK, tail_T, realised_T, entropy_T = (
            torch.from_numpy(self.columns[name].astype(np.float32)) for name in _FLOATS
        )
        whole_T = torch.cat([logprobs_TK, tail_T[:, None]], dim=1).logsumexp(-1)
        whole_T = whole_T.masked_fill(whole_T == -torch.inf, 0)
        ids = self.columns.get("ids")
        return TeacherTargets(
            kind,
            None if ids is None else torch.from_numpy(ids.astype(np.int64)),
            logprobs_TK - whole_T[:, None],
            tail_T - whole_T,
            realised_T,
            entropy_T,
        )


def write_shard(folder: Path, identity: Identity, rows: Sequence[StoredRow]) -> Path:
    """Write rows as a shard named by its content; writers at the same time do not meet.

    Raises:
        SetupError: the disk is full or not writable; there is no shard then, nor half of one.
    """
    columns = {
        name: np.concatenate([row.columns[name] for row in rows]) for name in rows[0].columns
    }
    lengths = [row.num_tokens for row in rows]
    columns["keys"] = np.frombuffer(b"".join(row.key for row in rows), np.uint8)
    columns["starts"] = np.cumsum([0, *lengths], dtype=np.int64)
    columns["checksums"] = np.array([row.checksum for row in rows], dtype=np.uint64)
    name = hashlib.sha256(columns["keys"].tobytes() + columns["checksums"].tobytes()).hexdigest()
    path = folder / f"{name[:24]}{SUFFIX}"
    with shared_file(path) as staging:
        save_file(columns, staging, {"identity": json.dumps(asdict(identity), sort_keys=True)})
    return path


@contextmanager
def shared_file(path: Path) -> Iterator[Path]:
    """Yield a path to write to, which takes the place of `path`; whoever may enter the folder to
    read or write it may do so with the file, whatever this process's umask.

    Raises:
        SetupError: the disk is full or not writable.
    """
    with replace_file(path, has_other_writers=True) as staging:
        yield staging
        staging.chmod(stat.S_IMODE(path.parent.stat().st_mode) & 0o666)


class StrangerError(DataError):
    """Targets of another teacher, tokenizer, template or format: never to be mixed in."""


class Shard:
    """A shard that is open for reading, mapped into memory.

    Raises:
        DataError: it is cut, or not a shard.
        StrangerError: it is of another identity.
    """

    def __init__(self, path: Path, identity: Identity) -> None:
        self.path = path
        if path.is_symlink() or not path.is_file():
            raise DataError("a shard must be a regular file", where=str(path))
        try:
            self._file = safe_open(path, framework="np")
            names = set(self._file.keys())
            said = json.loads((self._file.metadata() or {}).get("identity", "null"))
            keys, self._starts, self._checksums = map(self._file.get_tensor, _WHERE)
            self._columns = {name: self._file.get_slice(name) for name in names - {*_WHERE}}
        except (SafetensorError, OSError, ValueError) as error:
            raise DataError(
                "the shard is cut off or damaged", where=str(path), why=str(error), fix=_FIX
            ) from error
        found = Identity.parse(said, str(path))
        if found.name != identity.name:
            raise StrangerError(
                "the shard holds the word of another teacher, tokenizer, template or format: "
                + "; ".join(identity.differences(found)),
                where=str(path),
                fix="remove the shard: it was put here from another store",
            )
        self._check_form(len(keys), has_ids=not identity.format.startswith("full"))
        self.keys = [
            keys[start : start + KEY_BYTES].tobytes() for start in range(0, len(keys), KEY_BYTES)
        ]

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows."""
        return int(self._starts[-1])

    def read(self, row: int) -> StoredRow:
        """One row, its bytes checked.

        Raises:
            DataError: they are not those that were written.
        """
        part = slice(int(self._starts[row]), int(self._starts[row + 1]))
        columns = {name: column[part] for name, column in self._columns.items()}
        found = StoredRow(self.keys[row], columns)
        if found.checksum != int(self._checksums[row]):
            raise DataError(
                f"row {row} was changed: its checksum differs", where=str(self.path), fix=_FIX
            )
        return found

    def _check_form(self, num_key_bytes: int, *, has_ids: bool) -> None:
        """Sizes that fit each other, so that no place in it leads outside; the format's columns."""
        starts, rows = self._starts, num_key_bytes // KEY_BYTES
        lengths = {column.get_shape()[0] for column in self._columns.values()}
        is_sound = (
            num_key_bytes == rows * KEY_BYTES
            and len(starts) == rows + 1 == len(self._checksums) + 1
            and starts[0] == 0
            and (np.diff(starts) >= 0).all()
            and lengths == {int(starts[-1])}
            and {*_FLOATS} <= {*self._columns}
            and ("ids" in self._columns) == has_ids
        )
        if not is_sound:
            what = "the shard is damaged: its parts do not fit each other"
            raise DataError(what, where=str(self.path), fix=_FIX)
