"""What is asked of a rollout worker and what comes back; importable without torch and Ray."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from ground.config import SandboxSettings
from ground.records import Group, Message, Prompt
from rollout.compliance import Demand
from rollout.config import EngineSection, FleetSection, SamplingSection

BASE = -1
"""In place of a version: weights that stand still, to which adapters are added."""


@dataclass(frozen=True, slots=True)
class GroupTask:
    """One draw of a prompt: a group of rollouts is wanted, one per seed.

    Example:
        GroupTask("9c1f.0", prompt, system="", sampling=SamplingSection(), seeds=(11, 12, 13, 14))
    """

    id: str
    """`<prompt id>.<pass>`, see `Group.id`."""
    prompt: Prompt
    system: str
    """System instruction to put in front; a prompt that brings its own keeps that."""
    sampling: SamplingSection
    seeds: tuple[int, ...]
    """Sampling seed of each rollout (`seeds.sample_seed`); their number is the group's size."""
    demand: Demand | None = None
    """What the system instruction demands, if that can be checked."""

    def attempt_id(self, attempt: int) -> str:
        """Name of one asking of a worker, as `Pong` has it."""
        return f"{self.id}#{attempt}"

    @property
    def applied_system(self) -> str:
        """The instruction that is put in front, empty when there is none."""
        return "" if self.prompt.messages[0].role == "system" else self.system

    @property
    def applied_demand(self) -> Demand | None:
        """What the answers are held to: nothing where the instruction is not put in front."""
        return self.demand if self.applied_system else None

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation that the policy continues."""
        system = self.applied_system
        return (Message("system", system),) * bool(system) + self.prompt.messages


@dataclass(frozen=True, slots=True)
class GroupResult:
    """A finished group and what it cost; times are wall-clock seconds, for labels only.

    Example:
        GroupResult(group, started=100.0, sampled=101.5, ended=101.6, num_tokens=240, attempt=0)
    """

    group: Group
    started: float
    sampled: float
    """When the last token came; from here to `ended` it was scored."""
    ended: float
    num_tokens: int
    attempt: int
    """Which asking it answers; an answer to another one is refused."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A worker's acknowledgement of weights, given once its engine has proven that it has them.

    Example:
        Loaded(version=3, seconds={"copy": 0.02, "fetch": 0.001, "bytes": 0.01, …}, drift=4e-7)
    """

    version: int
    seconds: dict[str, float]
    """Phases of the hand-over, the learner's among them."""
    drift: float
    """Nats between engine and learner on a typical probe."""


@dataclass(frozen=True, slots=True)
class Home:
    """Where a worker's process is.

    Example:
        Home(space="box 1c2e… 4026531836", pid=4711, node="1f…")
    """

    space: str
    """Where its id counts (`ground.exits.pid_space`)."""
    pid: int
    node: str
    """Ray's name of its machine."""


@dataclass(frozen=True, slots=True)
class Arriving:
    """Weights that come to a worker from another machine, as far as they are there: the version
    that it loads, or the base that this is to be added to.

    Example:
        Arriving(version=3, bytes=40_000_000, total=220_000_000, seconds=12.5)
    """

    version: int
    """Or `BASE`."""
    bytes: int
    total: int
    seconds: float
    """That the bytes took."""

    @property
    def megabytes_per_second(self) -> float:
        """Measured so far."""
        return self.bytes / 1e6 / self.seconds if self.seconds else 0.0

    @property
    def seconds_left(self) -> float:
        """At that speed; infinite as long as nothing has come."""
        return (self.total - self.bytes) * self.seconds / self.bytes if self.bytes else math.inf


@dataclass(frozen=True, slots=True)
class Pong:
    """A worker's answer to a ping.

    Example:
        Pong(sampling={"7b02.0#0": 1.5}, scoring=("9c1f.0#0",), verdicts={"texts": 800})
    """

    sampling: dict[str, float] = field(default_factory=dict)
    """Seconds since each attempt (`task id#attempt`) got its first place in the engine; 0 while it
    waits for one."""
    scoring: tuple[str, ...] = ()
    """Attempts that are sampled and wait for their verdicts."""
    verdicts: dict[str, int] = field(default_factory=dict)
    """Counters of the reward pool since the worker's birth, failures by kind."""
    arriving: Arriving | None = None
    """Weights that it fetches, or has fetched, from another machine."""


@dataclass(frozen=True, slots=True)
class WorkerConfig:
    """All that a worker needs to come up, on whatever machine.

    Example:
        WorkerConfig(Path("runs/tiny/sft/model"), section.engine, section.fleet)
    """

    model_path: Path
    """Architecture, tokenizer and template come from here; weights are handed over."""
    engine: EngineSection
    fleet: FleetSection
    reward_files: tuple[Path, ...] = ()
    """The user's own reward functions."""
    sandbox: SandboxSettings = field(default_factory=SandboxSettings)
    """Where programs of the `code` reward run."""
    incarnation: int = 0
    """Life of the run that the worker belongs to; it takes no messages of another one."""
    lease_seconds: float = 60.0
    """A worker that is not pinged for so long ends itself."""
