"""The head of a recipe that all stages share, and the base of every section."""

from __future__ import annotations

import typing
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ground.positions import PlacedText

STAGES = ("herd", "prune", "targets", "sft", "mine", "rl", "dpo")
"""Stages in the order of the trail; a stage is on iff its section is present."""
SECTIONS = (*STAGES, "evaluate")
"""Top-level keys that belong to a stage rather than to the head."""

OPERATIONAL = frozenset(
    {
        *(
            "num_workers",
            "max_workers",
            "cpus_per_worker",
            "min_workers",
            "spare",
            "reward_processes",
        ),
        *("max_restarts", "max_attempts", "backoff_seconds", "start_deadline_seconds"),
        *("rollout_deadline_seconds", "publish_deadline_seconds", "step_deadline_seconds"),
        *("ping_every_seconds", "ping_deadline_seconds", "suspect_after_seconds"),
        *("silent_seconds", "lease_seconds", "watchdog_seconds", "num_slots"),
        *("checkpoint_every", "checkpoints_kept", "save_every", "keep_checkpoints", "log_every"),
        "pass_tokens",
    }
)
"""Keys of stages that say how one runs and not what it makes. They may be changed when a stopped
stage goes on, for what stopped it may have been one of them. (`num_slots` changes the last bits of
what is sampled from then on, not its distribution.)"""


class Section(BaseModel):
    """A frozen mapping of a recipe; an unknown key is an error.

    A relative path starts at the folder of the recipe file that writes it; in an override
    (`data.sft=mine.jsonl`) it starts at the current directory. `~` is the home folder.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _read_plainly(cls, values: object) -> object:
        """Anchor relative paths; keep `true` from passing as the number 1."""
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        return {
            key: _plainly(value, fields[key].annotation) if key in fields else value
            for key, value in values.items()
        }


def _plainly(value: object, annotation: object) -> object:
    """The value of a field, or of each item of a list or mapping of plain values."""
    if isinstance(value, list):
        return [_plainly(item, annotation) for item in value]
    if isinstance(value, dict):
        return {key: _plainly(item, annotation) for key, item in value.items()}
    if isinstance(value, bool) and _mentions(annotation, _NUMBERS):
        return value if _mentions(annotation, (bool, Path)) else str(value).lower()
    if isinstance(value, PlacedText) and _mentions(annotation, (Path,)):
        path = Path(value).expanduser()
        return path if path.is_absolute() else (value.folder / path).absolute()
    return value


_NUMBERS = (int, float)


def _mentions(annotation: object, types: tuple[object, ...]) -> bool:
    """Whether one of `types` stands in an annotation such as `Path | None` or `list[int]`."""
    arguments = typing.get_args(annotation)
    return annotation in types or any(_mentions(argument, types) for argument in arguments)


class ModelSource(Section):
    """Where weights come from."""

    path: Path
    """Folder with config.json, safetensors, tokenizer and chat template."""
    shape: Path | None = None
    """Folder with a config.json alone, for `packtrain plan` where `path` is not on this disk."""


Column = typing.Literal[
    "id", "messages", "prompt", "completion", "capability", "reward", "answer", "difficulty"
]


class Data(Section):
    """The user's own files; stages that make data (herd, prune, mine) take precedence."""

    sft: Path | None = None
    """Demonstrations: JSONL or parquet with `messages`, or `prompt` and `completion`."""
    prompts: Path | None = None
    """RL prompts: JSONL or parquet with `messages` or `prompt`, `reward` and `answer`."""
    heldout: Path | None = None
    """Prompts for evaluation; never trained on."""
    columns: dict[Column, str] = Field(default_factory=dict)
    """Our column → the file's column, e.g. `{prompt: question, answer: answer}`."""
    defaults: dict[typing.Literal["capability", "reward"], str] = Field(default_factory=dict)
    """Values for columns that a row leaves out, e.g. `{reward: math, capability: math}`."""
    max_bad_rows: int = Field(default=0, ge=0)
    """Rows that may be unreadable before a file is refused; they go to a quarantine file."""


class Systems(Section):
    """Pools of system instructions; one is drawn per group, seeded."""

    pools: dict[str, list[str]] = Field(default_factory=dict)
    """Capability → instructions; the key `any` serves capabilities without a pool of their own."""


class Head(Section):
    """What a recipe says once for all its stages."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    """Name of the run: its directory is `runs/<name>`."""
    seed: int = Field(default=0, ge=0)
    """Every random choice of the run follows from it."""
    model: ModelSource | None = None
    """The base model; absent when a `herd` section makes one."""
    teacher: ModelSource | None = None
    """The model that judges and teaches; absent when a `herd` section makes one."""
    data: Data = Data()
    systems: Systems = Systems()
    rewards: list[Path] = Field(default_factory=list)
    """Python files of the user's own whose functions are marked `@reward("name")`."""
    sinks: list[typing.Literal["trackio", "wandb", "tensorboard"]] = Field(default_factory=list)
    """Trackers that get the numbers besides metrics.jsonl."""
