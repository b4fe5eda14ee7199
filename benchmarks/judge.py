"""Does the judge know what is hard? Its score against the measured failure rate of the base.

    herd stage → prune stage (the judge scores every SFT row) → the base answers the same rows 16
    times → rank correlation on families that the judge never learned to label, and the solve
    rates of the kept and of the pruned half

Three draws of the data (seeds), one judge. The interval of the correlation is Fisher's.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import pyarrow.parquet as pq
from scipy import stats

from benchmarks.harness import Figure, Report, run_benchmark
from benchmarks.processes import RECIPE, stage
from ground.herd.families import FAMILIES
from ground.records import Message, Prompt
from rollout.config import EngineSection, SamplingSection
from rollout.engines import open_engine
from rollout.evaluation import measure as sample_and_score
from rollout.reward_pool import RewardPool

SEEDS = (0, 1, 2)
SAMPLES = 16
ROWS_PER_SEED = 700
QUICK_ROWS = 250
ENGINE = EngineSection(num_slots=64, max_length=256, threads=2)
SAMPLING = SamplingSection(temperature=1.0, max_new_tokens=128)


@dataclass(frozen=True, slots=True)
class Row:
    """An SFT row, what the judge thought of it and what the base makes of it."""

    family: str
    score: float
    kept: bool
    failure: float

    @property
    def is_unseen(self) -> bool:
        """Whether the judge never learned to label this family."""
        return not FAMILIES[self.family].judge_learns


def measure(quick: bool) -> Report:
    """One draw of the data with --quick, three otherwise."""
    rows: list[Row] = []
    for seed in SEEDS[:1] if quick else SEEDS:
        with tempfile.TemporaryDirectory() as folder:
            rows += _rows(Path(folder) / "run", seed, QUICK_ROWS if quick else ROWS_PER_SEED)
    unseen = [row for row in rows if row.is_unseen]
    rho, low, high = _spearman(unseen)
    return Report(
        [
            Figure("spearman on unseen families", rho, goal=0.5, tolerance=0.12),
            Figure("spearman on unseen families, low", low),
            Figure("spearman on all families", _spearman(rows)[0], tolerance=0.12),
            *_halves("all families", rows),
            *_halves("unseen families", unseen),
            Figure("rows", len(rows)),
            Figure("rows of unseen families", len(unseen)),
        ],
        {
            "spearman on unseen families": [rho, low, high],
            "by family": _by_family(rows),
        },
    )


def _rows(run: Path, seed: int, limit: int) -> list[Row]:
    """Judge a fresh draw of the data and let the base try the same rows."""
    stage("ground.herd.train", RECIPE, run, f"seed={seed}")
    stage("curation.prune", RECIPE, run, f"seed={seed}")
    judged = [
        row
        for name in ("kept", "dropped")
        for row in pq.read_table(run / "prune" / f"{name}.parquet").to_pylist()
        if row["difficulty"] and row["difficulty"]["score"] is not None
    ]
    judged = sorted(judged, key=lambda row: row["id"])[:limit]
    prompts = [_prompt(row) for row in judged]
    engine, chat = open_engine(run / "herd" / "student", ENGINE)
    try:
        with RewardPool(1, 30.0) as pool:
            measured = sample_and_score(
                engine, chat, prompts, pool, SAMPLING, samples=SAMPLES, seed=seed
            )
    finally:
        engine.close()
    return [
        Row(
            json.loads(row["answer"])["family"],
            row["difficulty"]["score"],
            row["meta_kept"],
            1 - each.successes / each.trials,
        )
        for row, each in zip(judged, measured, strict=True)
        if each.trials
    ]


def _prompt(row: dict) -> Prompt:
    turns = [turn for turn in row["messages"] if turn["role"] != "assistant"]
    messages = tuple(Message(turn["role"], turn["content"]) for turn in turns)
    return Prompt.make(
        messages, capability=row["capability"], reward=row["reward"], answer=row["answer"]
    )


def _spearman(rows: Sequence[Row]) -> tuple[float, float, float]:
    """Rank correlation of score and failure rate, with a 95 % interval by Fisher's z."""
    scores, failures = ([row.score for row in rows], [row.failure for row in rows])
    rho = float(np.corrcoef(stats.rankdata(scores), stats.rankdata(failures))[0, 1])
    half = 1.96 / math.sqrt(len(rows) - 3)
    return rho, math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)


def _halves(name: str, rows: Sequence[Row]) -> list[Figure]:
    """Is the pruned half easier? Solve rates, and a one-sided Mann-Whitney test."""
    kept = [1 - row.failure for row in rows if row.kept]
    dropped = [1 - row.failure for row in rows if not row.kept]
    p = float(stats.mannwhitneyu(dropped, kept, alternative="greater").pvalue)
    return [
        Figure(f"solve rate of the pruned half, {name}", fmean(dropped)),
        Figure(f"solve rate of the kept half, {name}", fmean(kept)),
        Figure(f"p that it is not easier, {name}", p, goal=0.01, better="lower"),
    ]


def _by_family(rows: Sequence[Row]) -> dict[str, object]:
    families: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        families[row.family].append(row)
    return {
        family: {
            "unseen": group[0].is_unseen,
            "rows": len(group),
            "spearman": _spearman(group)[0] if len({row.failure for row in group}) > 1 else None,
            "mean failure": fmean(row.failure for row in group),
        }
        for family, group in sorted(families.items())
    }


if __name__ == "__main__":
    sys.exit(run_benchmark("judge", measure, seeds=SEEDS))
