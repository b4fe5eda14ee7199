"""What a recipe asks of a teacher: whose word, on which rows, kept where."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from distill.config import FormatKind, RolloutDistillSection, TargetsSection
from distill.filling import require_vocabulary
from distill.identity import Identity, identity_of, token_ids
from distill.store import TargetStore, TokenRow
from distill.targets import TargetFormat
from distill.word import Teaching
from ground.chat import ChatTemplate
from ground.config import Data
from ground.errors import DataError, RecipeError
from ground.model import load_tokenizer
from ground.model_files import read_config
from ground.tables import read_demonstrations
from ground.trail import Trail
from ground.training_rows import IGNORED, TrainingRow, encode_demonstrations

STORE = "teacher-store"
"""Folder of a run's own store: no stage's, so that making one again asks nothing twice."""
NOTE = "targets.json"
"""What the stage leaves for those after it: whose targets, and in which store."""


@dataclass(frozen=True, slots=True)
class TargetsPlan:
    """Everything about filling but the teacher's weights.

    Example:
        plan = plan_targets(section, trail, head.data)
    """

    teacher: Path
    format: TargetFormat
    identity: Identity
    folder: Path
    """Of the store."""
    rows: tuple[TokenRow, ...]

    def open_store(self) -> TargetStore:
        """The store as it stands."""
        return TargetStore(self.folder, self.identity, self.format.kind)


def plan_targets(
    section: TargetsSection, trail: Trail, data: Data, quarantine: Path | None = None
) -> TargetsPlan:
    """Read rows and tokenizers; no weights are loaded.

    Raises:
        DataError: teacher and student do not speak of the same tokens; no rows.
        RecipeError: an input is missing, or longer than the teacher reads.
    """
    teacher, student = trail.teacher(), trail.model_before("targets")
    _require_context(section.max_length, teacher, "targets.max_length")
    own, tokenizer = load_tokenizer(teacher), load_tokenizer(student)
    format = TargetFormat.of(section, token_ids(tokenizer, section.always))
    identity = identity_of(teacher, own, tokenizer, str(format))
    require_vocabulary(format.kind, identity.vocabulary, "targets.format")
    source = trail.demonstrations_before("sft")
    demonstrations = read_demonstrations(source, data, quarantine=quarantine)
    rows = encode_demonstrations(demonstrations, ChatTemplate(tokenizer), section.max_length)
    folder = section.store or trail.run.path / STORE
    return TargetsPlan(teacher, format, identity, folder, tuple(map(token_row, rows.rows)))


def plan_teaching(
    section: RolloutDistillSection, teacher: Path, student: Path, max_length: int
) -> Teaching:
    """Read tokenizers and config of both; no weights are loaded.

    Args:
        max_length: of prompt and answer together.

    Raises:
        DataError: teacher and student do not speak of the same tokens.
        RecipeError: the teacher reads fewer tokens than the student may write, or the vocabulary is
            too large for the format.
    """
    _require_context(max_length, teacher, "rl.engine.max_length")
    own, tokenizer = load_tokenizer(teacher), load_tokenizer(student)
    format = TargetFormat.of(section, token_ids(tokenizer, section.always))
    identity = identity_of(teacher, own, tokenizer, str(format))
    require_vocabulary(format.kind, identity.vocabulary, "rl.distill.format")
    return Teaching(teacher.resolve(), identity, format.always)


def token_row(row: TrainingRow) -> TokenRow:
    """A training row as the teacher is asked about it."""
    return TokenRow(row.input_ids, tuple(label != IGNORED for label in row.labels))


def note_of(plan: TargetsPlan, directory: Path) -> str:
    """The content of `targets.json`; a store inside the run keeps its place when the run moves."""
    is_inside = plan.folder.is_relative_to(directory.parent)
    place = os.path.relpath(plan.folder, directory) if is_inside else plan.folder.absolute()
    note = {
        "store": str(place),
        "kind": plan.format.kind,
        "temperature": plan.format.temperature,
        "identity": asdict(plan.identity),
    }
    return json.dumps(note, indent=1) + "\n"


@dataclass(frozen=True, slots=True)
class Note:
    """What `targets.json` says.

    Example:
        read_note(runs/tiny/targets/targets.json).open_store().read(row.key)
    """

    folder: Path
    kind: FormatKind
    temperature: float
    identity: Identity

    def open_store(self) -> TargetStore:
        """The store that the stage filled."""
        return TargetStore(self.folder, self.identity, self.kind)

    def require_current(self, teacher: Path, student: Path) -> None:
        """Refuse the word of a teacher that is not today's, or on tokens that are not.

        Raises:
            DataError: naming what differs.
        """
        tokenizers = load_tokenizer(teacher), load_tokenizer(student)
        today = identity_of(teacher, *tokenizers, self.identity.format)
        if today.name != self.identity.name:
            raise DataError(
                "the stored targets are not those of this teacher and student: "
                + "; ".join(today.differences(self.identity)),
                where=str(self.folder),
                fix="make them anew: packtrain run RECIPE --from targets",
            )


def read_note(path: Path) -> Note:
    """Read what the targets stage left."""
    try:
        said = json.loads(path.read_bytes())
        identity = Identity.parse(said["identity"], str(path))
        return Note(path.parent / said["store"], said["kind"], said["temperature"], identity)
    except (ValueError, KeyError, TypeError):
        fix = "make it again: packtrain run RECIPE --from targets"
        raise DataError(
            "this does not say where the targets are", where=str(path), fix=fix
        ) from None


def _require_context(max_length: int, teacher: Path, key: str) -> None:
    config = read_config(teacher)
    text_config = config.get("text_config", config)
    limit = text_config.get("max_position_embeddings") if isinstance(text_config, dict) else None
    if isinstance(limit, int) and max_length > limit:
        raise RecipeError(
            f"{key} must be at most the teacher's {limit} positions, got {max_length}",
            fix=f"set {key} to {limit}",
        )
