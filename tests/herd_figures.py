"""What the herd can do: measured here for the slow tests and for recipes/tiny/herd/herd.json.

`python tests/herd_figures.py` measures the shipped models and writes that file.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import cast

import numpy as np
from scipy.stats import mannwhitneyu, spearmanr

from curation.label_judge import LabelJudge
from ground.answers import ANSWER_MARKER
from ground.herd.config import HerdSection
from ground.herd.families import FAMILIES
from ground.herd.files import heldout_tasks
from ground.herd.tasks import Task
from ground.judging import judge_messages
from ground.records import Demonstration, Message
from rollout.config import EngineSection
from rollout.engine import Request, generate
from rollout.engines import open_engine
from rollout.passk import pass_at_k
from rollout.reasoning_reward import reasoning_gym
from rollout.rewards import Score
from rollout.seeds import sample_seed

SHIPPED = Path(__file__).resolve().parents[1] / "recipes" / "tiny" / "herd"
"""Where the tracked models stand."""
SAMPLES = 16
_ENGINE = EngineSection(num_slots=64, max_length=256, threads=2)  # pyright: ignore[reportCallIssue]
_TIMEOUT_SECONDS = 900.0


@dataclass(frozen=True, slots=True)
class Answered:
    """A task and what a model made of it.

    Example:
        Answered(task, passed=(True, False), thought=(True, False)) solves half, by thinking
    """

    task: Task
    passed: tuple[bool, ...]
    thought: tuple[bool, ...]

    @property
    def solve_rate(self) -> float:
        """Share of samples that the verifier accepts."""
        return fmean(self.passed)


def shipped_tasks() -> list[Task]:
    """The held-out tasks of the tiny recipe, which no model of the herd was trained on."""
    return heldout_tasks(HerdSection())  # pyright: ignore[reportCallIssue]


def answer(model: Path, tasks: Sequence[Task], samples: int = SAMPLES) -> list[Answered]:
    """Sample and score every task at temperature 1."""
    engine, chat = open_engine(model, _ENGINE)
    requests = [
        Request(
            id=f"{task.prompt.id}/{sample}",
            prompt_ids=tuple(chat.encode_prompt(task.prompt.messages)),
            max_new_tokens=72,
            temperature=1.0,
            seed=sample_seed(0, task.prompt.id, "figures", sample),
            stop_ids=chat.stop_ids,
        )
        for task in tasks
        for sample in range(samples)
    ]
    try:
        completions = generate(engine, requests, timeout_seconds=_TIMEOUT_SECONDS)
    finally:
        engine.close()
    texts = [chat.decode(completion.segment.token_ids) for completion in completions]
    by_task = [texts[start : start + samples] for start in range(0, len(texts), samples)]
    return [_answered(task, own) for task, own in zip(tasks, by_task, strict=True)]


def _answered(task: Task, texts: Sequence[str]) -> Answered:
    passed = tuple(verdict(task, text) for text in texts)
    return Answered(task, passed, tuple(not text.startswith(ANSWER_MARKER) for text in texts))


def verdict(task: Task, text: str) -> bool:
    """Whether the house's own reward accepts a completion."""
    completion = [{"role": "assistant", "content": text}]
    (score,) = reasoning_gym([[]], [completion], [task.prompt.answer])
    return cast(Score, score).passed


def solver_figures(answers: Sequence[Answered]) -> dict[str, object]:
    """pass@1 and pass@16 in all and by parts, and what thinking is worth."""
    samples = len(answers[0].passed)
    pairs = [pair for own in answers for pair in zip(own.thought, own.passed, strict=True)]
    return {
        "pass@1": fmean(own.solve_rate for own in answers),
        f"pass@{samples}": fmean(pass_at_k(samples, sum(own.passed), samples) for own in answers),
        "think_share": fmean(thought for thought, _ in pairs),
        "pass@1_thinking": fmean(passed for thought, passed in pairs if thought),
        "pass@1_direct": fmean(passed for thought, passed in pairs if not thought),
        "by_difficulty": _pass_at_1_by(answers, lambda task: task.label),
        "by_capability": _pass_at_1_by(answers, lambda task: task.capability),
        "by_family": _pass_at_1_by(answers, lambda task: task.family),
    }


def _pass_at_1_by(answers: Sequence[Answered], part: Callable[[Task], str]) -> dict[str, float]:
    parts: dict[str, list[float]] = {}
    for own in answers:
        parts.setdefault(part(own.task), []).append(own.solve_rate)
    return {name: fmean(rates) for name, rates in parts.items()}


def judge_scores(model: Path, tasks: Sequence[Task]) -> list[float]:
    """The judge's expected hardness of each task."""
    engine, chat = open_engine(model, _ENGINE)
    try:
        judge = LabelJudge(engine, chat, judge_messages, min_mass=0.0, max_length=255)
        judgements = judge.judge([_asked(task) for task in tasks])
    finally:
        engine.close()
    return [judgement.score for judgement in judgements if judgement.score is not None]


def _asked(task: Task) -> Demonstration:
    """A task as a row to be judged; what the answer is makes no difference."""
    messages = (*task.prompt.messages, Message("assistant", task.answer))
    return Demonstration(task.prompt.id, messages, task.capability)


def judge_figures(answers: Sequence[Answered], scores: Sequence[float]) -> dict[str, object]:
    """How well the judge foresees failure on families that it was not taught to judge."""
    unseen = [
        (score, 1 - own.solve_rate)
        for score, own in zip(scores, answers, strict=True)
        if not FAMILIES[own.task.family].judge_learns
    ]
    ordered = [1 - failure for _, failure in sorted(unseen)]
    half = len(ordered) // 2
    pruned, kept = ordered[:half], ordered[half:]
    return {
        "num_tasks": len(unseen),
        "spearman": float(np.asarray(spearmanr(np.array(unseen)))[0]),
        "solve_rate_pruned": fmean(pruned),
        "solve_rate_kept": fmean(kept),
        "p_value": float(mannwhitneyu(pruned, kept, alternative="greater").pvalue),
    }


def _rounded(figures: Mapping[str, object]) -> dict[str, object]:
    return json.loads(json.dumps(figures), parse_float=lambda text: float(f"{float(text):.3g}"))


def main() -> None:
    """Measure the shipped models and write herd.json beside them."""
    tasks = shipped_tasks()
    student, teacher = (answer(SHIPPED / name, tasks) for name in ("student", "teacher"))
    figures = {
        "num_tasks": len(tasks),
        "samples": SAMPLES,
        "student": solver_figures(student),
        "teacher": solver_figures(teacher),
        "judge": judge_figures(student, judge_scores(SHIPPED / "teacher", tasks)),
    }
    text = json.dumps(_rounded(figures), indent=2) + "\n"
    (SHIPPED / "herd.json").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
