"""The head of a recipe that all stages share, and the base of every section."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, model_validator

from ground.constraints import RULES, ConstraintName, Value, value_problem
from ground.positions import PlacedText

STAGES = ("herd", "prune", "targets", "sft", "mine", "rl", "dpo")
"""Stages in the order of the trail; a stage is on iff its section is present."""


@dataclass(frozen=True, slots=True)
class Arm:
    """A stage that is made once more in another way, to be compared with.

    Example:
        Arm("sft", section="distill", key="as_arm", reads="targets")
    """

    stage: str
    section: str
    """Part of the stage's section that the arm has, and the stage itself then does without."""
    key: str
    """Within that part; true where the arm is wanted."""
    reads: str
    """The stage that only the arm reads."""

    @property
    def switch(self) -> str:
        """The recipe's key that turns it on."""
        return f"{self.stage}.{self.section}.{self.key}"


ARMS = {"taught": Arm("sft", section="distill", key="as_arm", reads="targets")}
"""By their names, which are those of their folders beside the stages'. No stage goes on from what
an arm made."""
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
        "learner",
        *("max_unjudged", "min_canaries", "max_canaries_failed", "canary_every"),
        *("max_restarts", "max_attempts", "backoff_seconds", "start_deadline_seconds"),
        *("rollout_deadline_seconds", "publish_deadline_seconds", "step_deadline_seconds"),
        "answer_deadline_seconds",
        *("ping_every_seconds", "ping_deadline_seconds", "suspect_after_seconds"),
        *("silent_seconds", "lease_seconds", "watchdog_seconds", "num_slots"),
        *("checkpoint_every", "checkpoints_kept", "save_every", "keep_checkpoints", "log_every"),
        "round_every",
        *("pass_tokens", "num_teachers", "cpus_per_teacher", "gpus_per_teacher"),
        "speak_deadline_seconds",
        *("replicas", "cpus_per_replica", "deadline_seconds"),
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
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        defer_build=True,  # or each section would be built again in those that hold it
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


class Instruction(Section):
    """One entry of a pool: a fixed text, a constraint with many values, or both."""

    text: str = ""
    """What is said; before the constraint's own words where there is one."""
    constraint: ConstraintName | None = None
    """A constraint of form that is checked on every answer; its value is drawn with it."""
    values: list[int | str] = Field(default_factory=list)
    """Values to train on; left out, those of ground/constraints.py."""
    heldout: list[int | str] = Field(default_factory=list)
    """Values for evaluation only; left out, those of ground/constraints.py, or none where `values`
    are given."""
    weight: float = Field(default=1.0, gt=0)
    """How often it is drawn, relative to the others of its pool."""

    @model_validator(mode="after")
    def _checkable(self) -> typing.Self:
        if self.constraint is None:
            if self.values or self.heldout:
                raise ValueError("values and heldout belong to a constraint, and none is named")
            return self
        problems = [value_problem(self.constraint, each) for each in self.values + self.heldout]
        twice = [str(each) for each in self.values if each in self.heldout]
        problems += [f"{', '.join(twice)} must not be both trained and held out"] * bool(twice)
        for problem in filter(None, problems):
            raise ValueError(problem)
        return self

    @property
    def trained_values(self) -> tuple[Value, ...]:
        """What training draws from; empty without a constraint."""
        if self.constraint is None:
            return ()
        return tuple(self.values) or RULES[self.constraint].values

    @property
    def untrained_values(self) -> tuple[Value, ...]:
        """What only evaluation draws from; never one of the trained ones."""
        if self.constraint is None:
            return ()
        usual = () if self.values else RULES[self.constraint].heldout
        return tuple(self.heldout) or usual


class Systems(Section):
    """Pools of system instructions; one is drawn per group, seeded."""

    pools: dict[str, list[str | Instruction]] = Field(default_factory=dict)
    """Capability → instructions; the key `any` serves capabilities without a pool of their own."""
    compliance_share: float = Field(default=0.2, ge=0, le=0.5)
    """Part of the reward that keeping a constraint is worth, where one was drawn; the rest is the
    task's. What counts as solved is the task's verdict alone."""

    @property
    def is_checked(self) -> bool:
        """Whether some instruction has a constraint."""
        return any(
            isinstance(each, Instruction) and each.constraint is not None
            for pool in self.pools.values()
            for each in pool
        )


class SandboxSettings(Section):
    """Where programs of the `code` reward run, and what they may take."""

    tier: typing.Literal["auto", "bubblewrap", "sandlock"] = "auto"
    """Which boundary: the strongest that holds here (`packtrain doctor` shows which do), or one."""
    allow_unsafe: bool = False
    """Run model-written code even where no boundary holds: as this user, with its files and its
    network, under limits of time and memory alone. For machines that a stranger might use."""
    seconds: float = Field(default=4.0, gt=0)
    """Wall-clock time of a completion's program, all its tests together; at most four fifths of
    the verifier's deadline."""
    memory_mib: int = Field(default=512, ge=64)
    """Address space of one process of a program, in MiB."""
    processes: int = Field(default=8, ge=1)
    """Processes and threads that a program may have at once."""


class JudgeSettings(Section):
    """The model that scores answers against a reference, for prompts with `reward: judge`."""

    model: ModelSource | None = None
    """A model that follows instructions; left out, the recipe's teacher. Its folder is read where
    the judge runs: on a cluster it has to be at the same path on every machine."""
    read: typing.Literal["verdict", "likelihood"] = "verdict"
    """`verdict`: how likely its reply begins with yes. `likelihood`, for models that can solve the
    tasks but follow no instruction: how likely reference and conclusion are behind the answer's own
    reasoning; weaker (docs/rewards.md)."""
    kind: typing.Literal["hf", "vllm"] = "hf"
    """Its engine, as in an `engine` section."""
    max_length: int = Field(default=2048, ge=128)
    """Tokens of question, reference, answer and our own words together."""
    max_answer_tokens: int = Field(default=1024, ge=8)
    """An answer is cut here, and the judge is told so."""
    threads: int = Field(default=1, ge=1)
    """CPU threads of a replica."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs of one machine that each `vllm` replica is cut over."""
    replicas: int = Field(default=1, ge=1)
    """Ray actors of `rl` with the judge's model in each. Other stages hold one beside the model
    that they measure."""
    cpus_per_replica: float = Field(default=1, gt=0)
    """What Ray reserves for a replica."""
    start_deadline_seconds: float = Field(default=120.0, gt=0)
    """From a replica's birth until its model is loaded; a large one takes minutes."""
    deadline_seconds: float = Field(default=300.0, gt=0)
    """For judging one group in `rl`; then the replica is replaced."""
    max_restarts: int = Field(default=3, ge=0)
    """Restarts of one replica without a judged group in between, before it is given up."""
    pass_at: float = Field(default=0.5, gt=0, lt=1)
    """Probability of yes from which an answer counts as solved."""
    both_orders: bool = True
    """Ask with the reference first and with the answer first; the lower probability counts. Twice
    the work, and nothing is gained from a judge that prefers a place."""
    min_mass: float = Field(default=0.5, gt=0, le=1)
    """Probability of yes and no together below which the judge has said something else, so that the
    answer is unjudged."""
    asks: int = Field(default=2, ge=1)
    """Times that an answer is shown, each time behind other marks, before it stays unjudged."""
    max_unjudged: float = Field(default=0.1, ge=0, lt=1)
    """The stage stops when surely more than this share of the last answers stays unjudged."""
    canary_every: int = Field(default=4, ge=1)
    """One group in so many is judged together with two answers whose verdict is known."""
    max_canaries_failed: float = Field(default=0.1, ge=0, lt=1)
    """The stage stops when the judge surely errs on more than this share of canaries: of those that
    are wrong, or of those that are right (docs/rewards.md)."""

    @model_validator(mode="after")
    def _answers_fit(self) -> typing.Self:
        if self.max_answer_tokens >= self.max_length:
            raise ValueError(
                f"max_answer_tokens must be below max_length ({self.max_length}), which holds "
                f"question and reference too, got {self.max_answer_tokens}"
            )
        if self.tensor_parallel > 1 and self.kind != "vllm":
            raise ValueError(f"tensor_parallel belongs to kind: vllm, got kind: {self.kind}")
        return self


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
    sandbox: SandboxSettings = SandboxSettings()
    judge: JudgeSettings | None = None
    rewards: list[Path] = Field(default_factory=list)
    """Python files of the user's own whose functions are marked `@reward("name")`."""
    sinks: list[typing.Literal["trackio", "wandb", "tensorboard"]] = Field(default_factory=list)
    """Trackers that get the numbers besides metrics.jsonl."""
