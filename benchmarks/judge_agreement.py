"""What is the herd's word worth as a judge? Its verdicts against the verifier's, without attacks.

    held-out tasks ─▶ the base answers each 4 times ─▶ verifier: right or wrong
                                                   └─▶ judge: probability ─▶ AUC, over all answers
                                                       and among answers to the same task

A model that cannot judge has an AUC near 0.5, and next to no mass on yes and no. `--quick` takes a
quarter of the tasks.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from statistics import fmean

from scipy import stats

from benchmarks.harness import ROOT, Figure, Report, run_benchmark
from ground.config import JudgeSettings
from ground.herd.config import HerdSection
from ground.herd.files import heldout_tasks
from ground.records import Prompt
from rollout.answer_judge import AnswerJudge
from rollout.config import EngineSection, SamplingSection
from rollout.engine import PromptTooLong
from rollout.engines import open_engine
from rollout.evaluation import measure as sample_and_score
from rollout.reward_pool import RewardPool, ScoredText

HERD = ROOT / "recipes" / "tiny" / "herd"
SAMPLES = 4
PASS_AT = JudgeSettings().pass_at
SETTINGS = {
    "verdict": JudgeSettings(max_length=512, max_answer_tokens=24, min_mass=1e-12),
    "likelihood": JudgeSettings(read="likelihood", max_length=512, max_answer_tokens=256),
}
"""What it says of yes and no is read however little that is. Its tokens are bytes, and it has 512
places: the words around a verdict fill most of them, answers are cut at 24, and tasks that do not
fit even so are left out."""


@dataclass(frozen=True, slots=True)
class Asked:
    """A task, the base's answers to it, and which of them the verifier calls right."""

    prompt: Prompt
    texts: tuple[str, ...]
    passed: tuple[bool, ...]


def measure(quick: bool) -> Report:
    """Both ways of reading the teacher."""
    asked = _asked(2 if quick else 8)
    passed = [each for task in asked for each in task.passed]
    figures = [Figure("answers", float(len(passed))), Figure("share right", fmean(passed))]
    details: dict[str, object] = {}
    for read, settings in SETTINGS.items():
        told, said, mass = _said(settings, asked)
        right = [passed for each in told for passed in each.passed]
        flat = [p for each in said for p in each]
        figures += [
            Figure(f"{read}: answers", float(len(flat))),
            Figure(f"{read}: AUC", auc(flat, right), tolerance=0.1),
            Figure(f"{read}: AUC within a task", auc_within(said, [e.passed for e in told])),
            Figure(f"{read}: agreement at pass_at", _agreement(flat, right)),
            Figure(f"{read}: wrong answers that pass", _rate(flat, right, of=False), "share"),
            Figure(f"{read}: right answers that fail", 1 - _rate(flat, right, of=True), "share"),
        ]
        if read == "verdict":
            figures.append(Figure("verdict: median mass of yes and no", mass))
        details[read] = _by_capability(told, said)
    return Report(figures, details)


def auc(scores: Sequence[float], right: Sequence[bool]) -> float:
    """Chance that a right answer has the higher score than a wrong one; ties count half.

    Example:
        scores [.9, .1, .5], right [yes, no, no] → 1.0; right [no, yes, no] → 0.0
    """
    ranks = stats.rankdata(scores)
    above = [rank for rank, is_right in zip(ranks, right, strict=True) if is_right]
    num, others = len(above), len(right) - len(above)
    return float((sum(above) - num * (num + 1) / 2) / (num * others))


def auc_within(scores: Sequence[Sequence[float]], right: Sequence[Sequence[bool]]) -> float:
    """The same over pairs of answers to the same task: what the advantage of a group hangs on."""
    wins: list[float] = []
    for own, verdicts in zip(scores, right, strict=True):
        pairs = list(zip(own, verdicts, strict=True))
        good, bad = ([p for p, is_right in pairs if is_right is kind] for kind in (True, False))
        wins += [float(a > b) + 0.5 * (a == b) for a in good for b in bad]
    return fmean(wins)


def _asked(per_level: int) -> list[Asked]:
    tasks = heldout_tasks(HerdSection.model_validate({"heldout_per_level": per_level}))
    engine, chat = open_engine(HERD / "student", EngineSection(num_slots=64, max_length=256))
    prompts, sampling = [task.prompt for task in tasks], SamplingSection(max_new_tokens=96)
    try:
        with RewardPool(1, 30.0) as pool:
            measured = sample_and_score(
                engine, chat, prompts, pool, sampling, samples=SAMPLES, seed=0
            )
    finally:
        engine.close()
    return [
        Asked(
            Prompt.make(
                task.prompt.messages, capability=task.capability, reward="judge", answer=task.answer
            ),
            tuple(rollout.text for rollout in each.rollouts),
            tuple(rollout.passed for rollout in each.rollouts),
        )
        for task, each in zip(tasks, measured, strict=True)
    ]


def _said(
    settings: JudgeSettings, asked: Sequence[Asked]
) -> tuple[list[Asked], list[list[float]], float]:
    """Tasks that fit, the judge's probability for each of their answers, and its median mass."""
    section = EngineSection(num_slots=8, max_length=settings.max_length)
    engine, chat = open_engine(HERD / "teacher", section)
    fit: list[Asked] = []
    judged: list[Sequence[ScoredText]] = []
    try:
        judge = AnswerJudge(engine, chat, settings, b"benchmark")
        for each in asked:
            with suppress(PromptTooLong):
                judged.append(judge.judge(each.prompt, each.texts).verdicts)
                fit.append(each)
    finally:
        engine.close()
    masses = sorted(v.parts.get("mass", 0.0) for each in judged for v in each)
    return fit, [[v.reward for v in each] for each in judged], masses[len(masses) // 2]


def _agreement(scores: Sequence[float], right: Sequence[bool]) -> float:
    passed = [score >= PASS_AT for score in scores]
    return fmean(p == is_right for p, is_right in zip(passed, right, strict=True))


def _rate(scores: Sequence[float], right: Sequence[bool], *, of: bool) -> float:
    """Share that passes of the right or of the wrong answers."""
    chosen = [s for s, is_right in zip(scores, right, strict=True) if is_right is of]
    return fmean(score >= PASS_AT for score in chosen)


def _by_capability(asked: Sequence[Asked], said: Sequence[Sequence[float]]) -> dict[str, float]:
    parts: defaultdict[str, list[tuple[float, bool]]] = defaultdict(list)
    for each, scores in zip(asked, said, strict=True):
        parts[each.prompt.capability] += zip(scores, each.passed, strict=True)
    return {
        name: round(auc([p for p, _ in part], [is_right for _, is_right in part]), 3)
        for name, part in sorted(parts.items())
    }


if __name__ == "__main__":
    sys.exit(run_benchmark("judge_agreement", measure, seeds=(0,)))
