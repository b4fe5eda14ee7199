"""What engines in processes of their own cost and bring to the stages that measure and judge.

    python -m benchmarks.replicas [--quick]

The same work by turns: through one engine in this process, and through `replicas` of it as the
stages have them (rollout/replicas.py: Ray, a roster, bundles). Work is `sampling`, completions of
the herd's held-out prompts by its student, and `judging`, the label judge's verdicts on SFT rows by
its teacher. One replica against the bare engine, both with one thread, is what processes cost; two
against one is what a second core brings, less what the machine takes back. A pair is one turn of
either side; which comes first alternates, and a first pair is not counted.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import count, cycle, islice
from multiprocessing import get_context
from pathlib import Path

from benchmarks.flat_pools import heldout
from benchmarks.harness import ROOT, Figure, Report, run_benchmark
from benchmarks.stored_words import demonstrations
from curation.label_judge import LabelJudge
from curation.label_prompt import asker
from ground.chat import ChatTemplate
from rollout.config import EngineSection, EnginesSection
from rollout.engine import Inference, Request, generate
from rollout.inference import inference

Work = Callable[[], float]
"""Does it once; returns units per second."""
Make = Callable[[Inference, ChatTemplate, bool], Work]
Pairs = list[tuple[float, float]]
"""Units per second of the bare engine, and of the replicas."""

_HERD = ROOT / "recipes" / "tiny" / "herd"
_SECTION = EngineSection(num_slots=64, max_length=512)
_SAMPLES, _TOKENS = 8, 64
_PROMPTS, _QUICK_PROMPTS = 378, 252
_ROWS, _QUICK_ROWS = 4096, 1024
_PAIRS, _QUICK_PAIRS = 7, 3
_SECONDS = 600.0
_GOAL = 0.9
_NUMBERS = count()


def measure(quick: bool) -> Report:
    """Pairs for each kind of work and number of replicas; figures are medians of ratios."""
    figures, details = [], {}
    for name, model, make, unit in (
        ("sampling", _HERD / "student", _sampling, "tokens/s"),
        ("judging", _HERD / "teacher", _judging, "rows/s"),
    ):
        for replicas in (1, 2):
            rates = _apart(model, make, replicas, quick)
            ratio = statistics.median(through / bare for bare, through in rates)
            label = f"{name}: {replicas} replica{'s' * (replicas > 1)} / engine"
            goal, tolerance = (_GOAL, 0.1) if replicas == 1 else (None, None)
            figures.append(Figure(label, ratio, "x", goal, "higher", tolerance))
            details[label] = {"per_second": rates}
        bare = statistics.median(bare for bare, _ in rates)
        figures.append(Figure(f"{name}: engine", bare, unit))
    return Report(figures, details)


def _apart(model: Path, make: Make, replicas: int, quick: bool) -> Pairs:
    """The pairs from a process of their own: Ray takes its token once in a process's life."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(_pairs, model, make, replicas, quick).result()


def _pairs(model: Path, make: Make, replicas: int, quick: bool) -> Pairs:
    """Units per second of the bare engine and of the replicas, by turns."""
    section = EnginesSection(engine=_SECTION, replicas=replicas, cpus_per_replica=0.5)
    alone = section.model_copy(update={"replicas": 0})
    with (
        tempfile.TemporaryDirectory() as folder,
        inference(model, section, Path(folder) / "left.json", "mine") as (several, chat),
        inference(model, alone, Path(folder) / "none.json", "mine") as (one, _),
    ):
        works = make(one, chat, quick), make(several, chat, quick)
        found: Pairs = []
        for number in range((_QUICK_PAIRS if quick else _PAIRS) + 1):
            rates = [works[each]() for each in ((0, 1), (1, 0))[number % 2]]
            bare, through = rates if number % 2 == 0 else rates[::-1]
            sys.stderr.write(f"{replicas}: engine {bare:.0f}, replicas {through:.0f} a second\n")
            found.append((bare, through))
        return found[1:]


def _sampling(engine: Inference, chat: ChatTemplate, quick: bool) -> Work:
    prompts = list(islice(cycle(heldout()), _QUICK_PROMPTS if quick else _PROMPTS))

    def work() -> float:
        turn = next(_NUMBERS)
        requests = [
            Request(
                id=f"{turn}/{place}/{sample}",
                prompt_ids=tuple(chat.encode_prompt(prompt.messages)),
                max_new_tokens=_TOKENS,
                temperature=1.0,
                seed=place * _SAMPLES + sample,
                stop_ids=chat.stop_ids,
            )
            for place, prompt in enumerate(prompts)
            for sample in range(_SAMPLES)
        ]
        started = time.perf_counter()
        completions = generate(engine, requests, timeout_seconds=_SECONDS)
        seconds = time.perf_counter() - started
        return sum(len(each.segment.token_ids) for each in completions) / seconds

    return work


def _judging(engine: Inference, chat: ChatTemplate, quick: bool) -> Work:
    rows = list(islice(cycle(demonstrations()), _QUICK_ROWS if quick else _ROWS))
    length = _SECTION.max_length
    ask = asker("bare", chat, 0, length - 1)
    judge = LabelJudge(engine, chat, ask, min_mass=0.1, max_length=length)

    def work() -> float:
        started = time.perf_counter()
        judge.judge(rows)
        return len(rows) / (time.perf_counter() - started)

    return work


if __name__ == "__main__":
    sys.exit(run_benchmark("replicas", measure, seeds=(0,)))
