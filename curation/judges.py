"""From the `judge` section of a recipe to a judge at work."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from curation.config import (
    IfdJudgeSection,
    JudgeSection,
    LabelJudgeSection,
    PruneSection,
)
from curation.ifd_judge import IfdJudge
from curation.judge import Judge
from curation.label_judge import LabelJudge
from curation.label_prompt import asker
from curation.solve_rate_judge import SolveRateJudge
from ground.chat import ChatTemplate
from ground.entry import Stage
from ground.records import Prompt
from rollout.engine import Inference
from rollout.evaluation import Measured, measure
from rollout.inference import inference
from rollout.reward_pool import RewardPool


@contextmanager
def open_judges(
    stage: Stage[PruneSection], model: Path, sections: Sequence[JudgeSection]
) -> Iterator[list[Judge]]:
    """Judges of some kinds, which share what the model runs in."""
    with (
        inference(model, stage.section, stage.record, "prune") as (engine, chat),
        ExitStack() as stack,
    ):
        yield [_judge(stage, engine, chat, section, stack) for section in sections]


def fix_for(section: JudgeSection) -> str:
    """What to do about a judge of this kind that leaves too much unjudged."""
    if isinstance(section, LabelJudgeSection):
        return (
            "use a teacher that answers easy, medium or hard; raise prune.engine.max_length; ask "
            "one that was taught the bare question with prune.judge.wording=bare"
        )
    if isinstance(section, IfdJudgeSection):
        return "raise prune.engine.max_length"
    return (
        "use another prune.judge.kind for data without checkable answers; allow more with "
        "prune.judge.max_unjudged, and say in prune.unjudged what becomes of them"
    )


def _judge(
    stage: Stage[PruneSection],
    engine: Inference,
    chat: ChatTemplate,
    section: JudgeSection,
    stack: ExitStack,
) -> Judge:
    max_length = stage.section.engine.max_length
    if isinstance(section, LabelJudgeSection):
        ask = asker(section.wording, chat, stage.head.seed, max_length - 1)
        return LabelJudge(engine, chat, ask, min_mass=section.min_label_mass, max_length=max_length)
    if isinstance(section, IfdJudgeSection):
        return IfdJudge(engine, chat, max_length=max_length)
    pool = stack.enter_context(
        RewardPool(
            section.reward_processes,
            section.reward_deadline_seconds,
            stage.head.rewards,
            sandbox=stage.head.sandbox,
        )
    )

    def tried(prompts: Sequence[Prompt]) -> list[Measured]:
        return measure(
            engine,
            chat,
            prompts,
            pool,
            section.sampling,
            samples=section.samples,
            seed=stage.head.seed,
            occasion="judge",
            stall_seconds=stage.section.stall_seconds,
        )

    return SolveRateJudge(tried)
