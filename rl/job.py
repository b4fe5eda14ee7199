"""What the processes of the loop are told when they start."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

from distill.word import Teaching
from ground.config import SandboxSettings, Section, Systems
from rl.config import RlSection
from rollout.judge_source import JudgeSource


class Job(Section):
    """One life of the loop: which run, from where, and where its files are.

    Example:
        Job.model_validate_json(line) in the learner; handed over by value to the controller
    """

    section: RlSection
    seed: int
    run_name: str
    namespace: str = "packtrain"
    """Of our actors in Ray; no other run of the same cluster has it."""
    incarnation: int
    """Lives of the loop since this process of the stage began; part of the actors' names, so that
    nobody meets those of an older life."""
    model: Path
    """The policy to start from."""
    directory: Path
    """The stage's folder."""
    log_directory: Path
    systems: Systems = Systems()
    rewards: tuple[Path, ...] = ()
    """Files with the user's own reward functions."""
    sandbox: SandboxSettings = SandboxSettings()
    """Where programs of the `code` reward run."""
    judge: JudgeSource | None = None
    """The model behind `reward: judge`, where a prompt asks for it."""
    logs_end_in: Path | None = None
    """Where what is written into `log_directory` is brought in the end, if not left there."""
    teaching: Teaching | None = None
    """Whose word is learned from beside the rewards, if the section wants any."""
    receives_weights: bool = False
    """A rank that reads none from `model`, whose folder may not be whole here: rank 0 gives its."""

    @property
    def controller_name(self) -> str:
        """Name of the controller's actor."""
        return f"controller-{self.incarnation}"

    @property
    def checkpoints_directory(self) -> Path:
        """Cuts of learner and controller."""
        return self.directory / "checkpoints"

    @property
    def best_directory(self) -> Path:
        """Weights of the version that did best on the validation slice."""
        return self.directory / "checkpoints" / "best"


class Report(BaseModel):
    """A line that the learner says to its supervisor.

    Example:
        {"kind": "step", "step": 3, "numbers": {"reward": 0.4}}
        {"kind": "phase", "step": 3, "facts": {"doing": "train step 3"}}
        {"kind": "failed", "facts": {"type": "DivergedError", "what": …, "where": …, …}}
    """

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")

    kind: Literal["alive", "phase", "begun", "step", "validation", "done", "failed"]
    step: int = 0
    numbers: dict[str, float] = Field(default_factory=dict)
    started: float = 0.0
    """Unix seconds between which the weights were being changed."""
    ended: float = 0.0
    facts: dict[str, object] = Field(default_factory=dict)


def phase(doing: str, step: int = 0, seconds: float = 0.0) -> Report:
    """What the learner's main thread does from now on; the supervisor holds it to a deadline.

    Args:
        seconds: the deadline, if that of a step is not what it hangs on.
    """
    return Report(kind="phase", step=step, facts={"doing": doing, "seconds": seconds})


def learner_name(rank: int) -> str:
    """What the log files of a rank's learner are called."""
    return f"rl.learner.rank{rank}" if rank else "rl.learner"


class Voice(Protocol):
    """Who is told how it goes: the supervisor, through a `Speaker`."""

    def say(self, report: Report) -> None:
        """A report."""
        ...

    def score(self, version: int, score: float) -> None:
        """How a version did on the validation slice."""
        ...
