"""The soft side of co-distillation in SFT: targets joined to rows, shares, what is told of them.

    rows ── held out (for `aligned` alone) ── trained rows ── key ──▶ store ──▶ inputs of a pass

B rows of a pass, T predicted tokens of a row, N trained tokens of the pass, row after row.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from distill.config import AlignedShare, DistillSection, FormatKind
from distill.loss import Divergence
from distill.plan import read_note, token_row
from distill.store import TargetStore
from distill.targets import TeacherTargets, fitted, joined
from distill.weighting import HeldoutWeighting, weighting_of
from ground.errors import DataError
from ground.trail import Trail
from ground.trainer_config import TrainerSection
from ground.training_rows import IGNORED, TrainingRow, TrainingRows

Plain = Callable[[list[dict[str, list[int]]]], dict[str, Tensor]]
"""Makes padded tensors of rows with `input_ids` and `labels`."""
_HELD_OUT_AT_MOST = 0.1
_PREFIX = "soft_"
"""Of the keys by which soft targets travel in a pass's inputs."""
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Soft:
    """What a run learns from besides its rows.

    Example:
        Soft(section, store, Divergence(), weighting, TrainingRows of 64 held-out rows)
    """

    section: DistillSection
    store: TargetStore
    divergence: Divergence
    weighting: HeldoutWeighting
    heldout: tuple[TrainingRow, ...]


def open_soft(
    section: DistillSection,
    trainer: TrainerSection,
    trail: Trail,
    rows: TrainingRows,
    seed: int,
) -> tuple[Soft, TrainingRows]:
    """The teacher's word on all rows, and the rows that are left to train on.

    Raises:
        DataError: the stored targets are another teacher's, or do not cover the rows.
    """
    note = read_note(trail.targets())
    student = trail.model_before("sft")
    note.require_current(trail.teacher(), student)
    divergence = Divergence(section.divergence, section.beta, note.temperature)
    divergence.require_format(note.kind)
    held: tuple[TrainingRow, ...] = ()
    if isinstance(section.weighting, AlignedShare):
        rows, rest = split(rows, section.heldout_rows, seed)
        held = rest.rows
    store = note.open_store()
    require_all(store, rows.rows)
    weighting = weighting_of(
        section.weighting,
        num_steps=trainer.num_steps(len(rows.rows)),
        vocab_size=note.identity.vocabulary,
    )
    return Soft(section, store, divergence, weighting, held), rows


def split(rows: TrainingRows, num_heldout: int, seed: int) -> tuple[TrainingRows, TrainingRows]:
    """Trained rows and held-out ones, which `aligned` looks at.

    Every capability gives its share of `num_heldout`, one at least, and no more than a tenth of its
    rows; which of them follows from seed and row. A row that is held out is trained under no id.
    """
    counts = Counter(row.capability for row in rows.rows)
    wanted = {
        name: max(1, round(num_heldout * count / len(rows.rows))) for name, count in counts.items()
    }
    spare = Counter({name: int(_HELD_OUT_AT_MOST * count) for name, count in counts.items()})
    order = sorted(rows.rows, key=lambda row: hashlib.sha256(f"{seed}/{row.id}".encode()).digest())
    copies: dict[bytes, list[TrainingRow]] = {}
    for row in order:
        copies.setdefault(token_row(row).key, []).append(row)
    held: dict[bytes, TrainingRow] = {}
    for key, (first, *others) in copies.items():
        taken = Counter(row.capability for row in (first, *others))
        if wanted[first.capability] and taken <= spare:
            wanted[first.capability] -= 1
            spare -= taken
            held[key] = first
    trained = tuple(row for row in rows.rows if token_row(row).key not in held)
    return replace(rows, rows=trained), replace(rows, rows=tuple(held.values()))


def warn_of_unobserved(soft: Soft, rows: TrainingRows) -> None:
    """Name the capabilities that `aligned` cannot observe: their share never moves."""
    weighting = soft.section.weighting
    observed = capabilities(soft.heldout)
    missing = [name for name in capabilities(rows.rows) if name not in observed]
    if missing and isinstance(weighting, AlignedShare):
        _LOG.warning(
            "no held-out rows of %s: their share stays at start (%g); "
            "give them 10 rows or more, or set weighting: static",
            ", ".join(missing),
            weighting.start,
        )


def require_all(store: TargetStore, rows: Sequence[TrainingRow]) -> None:
    """Refuse to train on rows that the teacher has not spoken to, or whose targets are damaged.

    Raises:
        DataError: with their number and the first of them.
    """
    keys = {token_row(row).key: row for row in rows}
    num_damaged = store.drop_damaged(list(keys))
    missing = [row.id for key, row in keys.items() if key not in store]
    if missing:
        raise DataError(
            f"the teacher's targets of {len(missing)} of {len(keys)} rows are missing"
            + (f", {num_damaged} of them damaged" if num_damaged else ""),
            where=str(store.folder),
            why=f"the first is row {missing[0]}; rows are known by their tokens and by which of "
            "them are trained",
            fix="run the stage again: packtrain run RECIPE --from targets",
        )


class SoftCollator:
    """Puts a pass together: padded rows, and the stored targets of their trained tokens."""

    def __init__(
        self,
        plain: Plain,
        store: TargetStore,
        rows: Sequence[TrainingRow],
    ) -> None:
        self._plain, self._store, self._rows = plain, store, rows
        self._capabilities = capabilities(rows)
        self.num_misfits = 0
        """Tokens whose targets did not fit them."""

    def __call__(self, examples: list[dict[str, int]]) -> dict[str, Tensor]:
        rows = [self._rows[example["row"]] for example in examples]
        batch = self._plain(
            [{"input_ids": list(row.input_ids), "labels": list(row.labels)} for row in rows]
        )
        names = [self._capabilities.index(row.capability) for row in rows]
        targets, num_misfits = self._read(rows)
        self.num_misfits += num_misfits
        return batch | packed(targets) | {"capability_B": torch.tensor(names)}

    def take_misfits(self) -> int:
        """Their number since this was last asked."""
        number, self.num_misfits = self.num_misfits, 0
        return number

    def read(self, rows: Sequence[TrainingRow]) -> TeacherTargets:
        """The targets of all trained tokens of some rows."""
        return self._read(rows)[0]

    def _read(self, rows: Sequence[TrainingRow]) -> tuple[TeacherTargets, int]:
        parts, total = [], 0
        for row in rows:
            asked = token_row(row)
            labels_T = torch.tensor([row.labels[place] for place in asked.places])
            targets, num_misfits = fitted(self._store.read(asked.key), labels_T)
            total += num_misfits
            parts.append(targets)
        return joined(parts), total


def capabilities(rows: Sequence[TrainingRow]) -> list[str]:
    """Names of all capabilities, in one order on every rank."""
    return sorted({row.capability for row in rows})


def packed(targets: TeacherTargets) -> dict[str, Tensor]:
    """Targets as entries of a pass's inputs."""
    names = ("ids", "logprobs", "tail", "realised", "entropy")
    tensors = zip(names, targets.tensors, strict=True)
    return {f"{_PREFIX}{name}": tensor for name, tensor in tensors if tensor is not None}


def unpacked(inputs: dict[str, Tensor], kind: FormatKind) -> TeacherTargets:
    """Take the targets out of a pass's inputs again."""
    found = {name: inputs.pop(name) for name in list(inputs) if name.startswith(_PREFIX)}
    rest = (found[f"{_PREFIX}{name}"] for name in ("logprobs", "tail", "realised", "entropy"))
    return TeacherTargets(kind, found.get(f"{_PREFIX}ids"), *rest)


def trained_mask(labels_BT1: Tensor) -> Tensor:
    """Which predicted tokens are trained, [B, T]: the first token of a row has no context."""
    return labels_BT1[:, 1:] != IGNORED


def shares_of(
    weighting: HeldoutWeighting,
    step: int,
    capability_B: Sequence[str],
    targets: TeacherTargets,
    trained_BT: Tensor,
) -> Tensor:
    """Share of the soft target of each trained token, [N]."""
    entropy_BT = torch.zeros(trained_BT.shape, device=trained_BT.device)
    entropy_BT = entropy_BT.masked_scatter(trained_BT, targets.entropy_T)
    supported_BT = trained_BT.masked_scatter(trained_BT, targets.is_supported_T)
    return weighting.weights(step, capability_B, entropy_BT, supported_BT)[trained_BT]


class Tally:
    """Sums over the tokens of the passes since the last line of metrics, on this rank.

    Example:
        hard 2 and 4, of which the second is of math with share .7 → loss_hard 3, alpha/math .7
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = tuple(names)
        self.clear()

    def clear(self) -> None:
        """Begin anew."""
        self._sums = torch.zeros(5 + 2 * len(self._names), dtype=torch.float64)

    def add(
        self,
        hard_N: Tensor,
        soft_N: Tensor,
        shares_N: Tensor,
        targets: TeacherTargets,
        capability_N: Tensor,
    ) -> None:
        """Count a pass in."""
        unsupported = (~targets.is_supported_T).sum()
        sums = [hard_N.sum(), soft_N.sum(), unsupported, torch.tensor(len(hard_N))]
        for index in range(len(self._names)):
            is_own_N = capability_N == index
            sums += [shares_N[is_own_N].sum(), is_own_N.sum()]
        told = torch.stack([each.detach().double().cpu() for each in sums])
        self._sums[:4] += told[:4]
        self._sums[5:] += told[4:]

    def add_misfits(self, number: int) -> None:
        """Tokens whose targets did not fit them."""
        self._sums[4] += number

    @property
    def sums(self) -> Tensor:
        """What ranks add up."""
        return self._sums

    def metrics(self, sums: Tensor) -> Mapping[str, float]:
        """Means over the tokens of all ranks."""
        hard, soft, unsupported, tokens, misfits = sums[:5].tolist()
        count = max(tokens, 1.0)
        told = {"loss_hard": hard / count, "loss_soft": soft / count}
        told |= {"unsupported": unsupported / count, "misfits": misfits}
        for name, (share, own) in zip(self._names, sums[5:].reshape(-1, 2).tolist(), strict=True):
            if own:
                told[f"alpha/{name}"] = share / own
        return told


class Stopwatch:
    """What part of the time something takes: `with watch: …`, then `watch.share()`."""

    def __init__(self) -> None:
        self._since, self._began, self._spent = time.monotonic(), 0.0, 0.0

    def __enter__(self) -> None:
        self._began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self._spent += time.monotonic() - self._began

    def share(self) -> float:
        """Since this was last asked."""
        now = time.monotonic()
        share = self._spent / max(now - self._since, 1e-9)
        self._since, self._spent = now, 0.0
        return share
