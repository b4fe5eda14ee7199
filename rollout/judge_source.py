"""Which model judges a run's answers, decided and checked before anything is started."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from ground.config import JudgeSettings, Section
from ground.errors import DataError
from ground.records import Prompt
from ground.trail import Trail
from rollout.config import SLOT_STEP, EngineSection, FleetSection
from rollout.judge_reward import JUDGE, no_judge

_VLLM_SLOTS = 64


class JudgeSource(Section):
    """A judge that is wanted.

    Example:
        JudgeSource(settings=JudgeSettings(), model=Path("/models/judge"), seed=0).engine.kind
    """

    settings: JudgeSettings
    model: Path
    seed: int
    """Of the run; the marks around what is quoted follow from it and from the content."""

    @property
    def secret(self) -> bytes:
        """Keys the marks that answers are quoted between; equal in every life of a run."""
        return hashlib.sha256(f"judge/{self.seed}".encode()).digest()

    @property
    def engine(self) -> EngineSection:
        """What the model runs in."""
        return judge_engine(self.settings)

    @property
    def fleet(self) -> FleetSection:
        """The replicas, held to the same rules as rollout workers."""
        settings = self.settings
        return FleetSection(
            num_workers=settings.replicas,
            cpus_per_worker=settings.cpus_per_replica,
            start_deadline_seconds=settings.start_deadline_seconds,
            rollout_deadline_seconds=settings.deadline_seconds,
            max_restarts=settings.max_restarts,
            spare=False,
        )


def judge_engine(settings: JudgeSettings) -> EngineSection:
    """What a judge's model runs in; `hf` scores in small batches whatever its slots."""
    return EngineSection(
        kind=settings.kind,
        num_slots=_VLLM_SLOTS if settings.kind == "vllm" else SLOT_STEP,
        max_length=settings.max_length,
        threads=settings.threads,
        tensor_parallel=settings.tensor_parallel,
    )


def judge_of(prompts: Iterable[Prompt], trail: Trail) -> JudgeSource | None:
    """The judge that these prompts need; None when none of them does.

    Raises:
        RecipeError: some do, and the recipe names no judge, or no model for it.
        DataError: one of them has no reference.
    """
    judged = [prompt for prompt in prompts if prompt.reward == JUDGE]
    if not judged:
        return None
    head = trail.head
    if head.judge is None:
        raise no_judge(f"prompt {judged[0].id}")
    for prompt in judged:
        if not prompt.answer.strip():
            raise DataError(
                "a prompt with `reward: judge` must have a reference in `answer`, it is empty",
                where=f"prompt {prompt.id}",
                fix="give the row an answer, or take it out",
            )
    model = head.judge.model.path if head.judge.model else trail.teacher()
    return JudgeSource(settings=head.judge, model=model.resolve(), seed=head.seed)
