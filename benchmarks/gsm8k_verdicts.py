"""The math reward against GSM8K: every reference answer, and 5,276 solutions with their verdicts.

Needs the GSM8K copy in ../shared/data/gsm8k. Everything goes through the reward pool, as in a run.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.harness import ROOT, Figure, Report, run_benchmark
from ground.records import Message, Prompt
from rollout.reward_pool import RewardPool, ScoredText

DATA = ROOT.parent / "shared" / "data" / "gsm8k"
QUICK_ROWS = 200


def measure(quick: bool) -> Report:
    """Score everything, or the first rows of each file."""
    if not DATA.is_dir():
        raise SystemExit(f"needs GSM8K at {DATA}")
    limit = QUICK_ROWS if quick else None
    start = time.monotonic()
    with RewardPool(1, 30.0) as pool:
        failed, num_references = _references(pool, limit)
        disputes, num_solutions = _solutions(pool, limit)
    seconds = time.monotonic() - start
    agreement = 1 - len(disputes) / num_solutions
    share = 1 - len(failed) / num_references
    for dispute in disputes:
        sys.stdout.write(json.dumps(dispute, ensure_ascii=False) + "\n")
    return Report(
        [
            Figure("references scored 1", share, goal=1.0, tolerance=0.0),
            Figure("agreement with recorded verdicts", agreement, goal=0.99, tolerance=0.005),
            Figure("disputes", len(disputes), better="lower"),
            Figure("references", num_references),
            Figure("solutions", num_solutions),
            Figure("verdicts per second", (num_references + num_solutions) / seconds, "1/s"),
        ],
        {"disputes": disputes, "references not scored 1": failed},
    )


def _references(pool: RewardPool, limit: int | None) -> tuple[list[str], int]:
    answers = [
        row["answer"]
        for split in ("train", "test")
        for row in _rows(DATA / f"{split}.jsonl")[:limit]
    ]
    failed = [answer for answer in answers if not _score(pool, answer, [answer])[0].passed]
    return failed, len(answers)


def _solutions(pool: RewardPool, limit: int | None) -> tuple[list[dict[str, object]], int]:
    """Disputes between the reward and the recorded verdicts, and how many were looked at."""
    disputes: list[dict[str, object]] = []
    num = 0
    for row in _rows(DATA / "example_model_solutions.jsonl")[:limit]:
        models = {key: row[key] for key in row if key not in ("question", "ground_truth")}
        texts = [model["solution"] for model in models.values()]
        scored = _score(pool, row["ground_truth"], texts)
        num += len(scored)
        disputes += [
            {
                "question": row["question"][:80],
                "model": name,
                "recorded": model["is_correct"],
                "ours": verdict.passed,
                "error": verdict.error,
                "given": model["solution"][-80:],
                "reference": row["ground_truth"][-40:],
            }
            for (name, model), verdict in zip(models.items(), scored, strict=True)
            if verdict.passed != model["is_correct"]
        ]
    return disputes, num


def _score(pool: RewardPool, answer: str, texts: Sequence[str]) -> list[ScoredText]:
    prompt = Prompt.make((Message("user", "?"),), capability="math", reward="math", answer=answer)
    return pool.score(prompt, texts)


def _rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(run_benchmark("gsm8k_verdicts", measure))
