"""From completions and verdicts to rollouts, alike wherever a model is asked.

completions → texts_of → texts ─ verifier ─▶ verdicts → rollouts_of → Rollouts
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ground.records import Rollout
from rollout.engine import Completion
from rollout.reward_pool import ScoredText

if TYPE_CHECKING:
    from ground.chat import ChatTemplate


def texts_of(completions: Sequence[Completion], chat: ChatTemplate) -> list[str]:
    """What was said, without the id that ended it: a stop id need not be a special token."""
    return [chat.decode(_spoken(completion)) for completion in completions]


def rollouts_of(
    completions: Sequence[Completion], texts: Sequence[str], verdicts: Sequence[ScoredText]
) -> tuple[Rollout, ...]:
    """The rollouts of one prompt, in the order of their completions; see `with_verdicts`."""
    rollouts = [
        Rollout(index=index, segments=(each.segment,), text=text, finish=each.finish)
        for index, (each, text) in enumerate(zip(completions, texts, strict=True))
    ]
    return with_verdicts(rollouts, verdicts)


def with_verdicts(
    rollouts: Sequence[Rollout], verdicts: Sequence[ScoredText]
) -> tuple[Rollout, ...]:
    """The same rollouts scored, without those that nobody could judge: these say nothing, neither
    of the policy nor of the prompt."""
    return tuple(
        replace(
            rollout,
            reward=verdict.reward,
            reward_parts=verdict.parts,
            passed=verdict.passed,
            error=verdict.error,
        )
        for rollout, verdict in zip(rollouts, verdicts, strict=True)
        if verdict.is_judged
    )


def _spoken(completion: Completion) -> tuple[int, ...]:
    ids = completion.segment.token_ids
    return ids[:-1] if completion.finish == "stop" else ids
