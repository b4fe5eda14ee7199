"""The `solve_rate` judge: how often the judge model itself solves the task, by the row's verifier.

    question → n samples → the row's reward says of each whether it is right → score 1 - c / n

Only rows with a checkable answer can be judged so: those that name a reward and an answer for it.
A reward that is itself a judge's is left alone: here no judge of answers is at work.
A model that is stronger than the one to be trained finds more of them easy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from curation.judge import Judgement
from ground.records import Demonstration, Prompt
from rollout.evaluation import Measured
from rollout.judge_reward import JUDGE

Measure = Callable[[Sequence[Prompt]], Sequence[Measured]]
"""Samples and scores prompts, in their order (rollout.evaluation.measure)."""


class SolveRateJudge:
    """A judge that tries the tasks."""

    def __init__(self, measure: Measure) -> None:
        self._measure = measure

    def judge(self, rows: Sequence[Demonstration]) -> list[Judgement]:
        """Try the rows that have a checkable answer; the others are unjudged."""
        prompts = [prompt for row in rows if (prompt := checkable(row))]
        measured = iter(self._measure(prompts) if prompts else [])
        return [
            solved(next(measured)) if checkable(row) else Judgement(reason=_why_not(row))
            for row in rows
        ]


def checkable(row: Demonstration) -> Prompt | None:
    """The row as a task that a verifier can check; None where it names no reward or no answer, or
    leaves the verdict to a judge."""
    if not (row.reward and row.answer) or row.reward == JUDGE:
        return None
    return Prompt(row.id, row.question, row.capability, row.reward, row.answer)


def _why_not(row: Demonstration) -> str:
    return "its reward is a judge" if row.reward == JUDGE else "it has no checkable answer"


def solved(measured: Measured) -> Judgement:
    """The judgement that verdicts amount to.

    Example:
        3 of 8 passed → score 0.625;  longer than the context → unjudged
    """
    if not measured.trials:
        return Judgement(reason=measured.skipped)
    return Judgement(
        score=1 - measured.successes / measured.trials,
        parts={"successes": measured.successes, "trials": measured.trials},
    )
