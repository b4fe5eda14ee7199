"""Mining in waves: who gets more samples, and that stopping early does not bend pass@k."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from conftest import make_tiny_model
from test_curation_mining import prompt, recipe, run_mine

from curation.mining import Mined, summarise
from curation.waves import stratum_of, topped_up
from ground.tables import write_records
from rollout.passk import Stands, pass_at_k, passes

PILOT, SAMPLES, K = 2, 6, 4


def test_what_a_pilot_leaves_open_is_topped_up_and_a_share_of_the_rest() -> None:
    """Ten hopeless and three solved, half of each, but four where there are so many."""
    seen = [(4, 0)] * 10 + [(4, 1), (4, 3)] + [(4, 4)] * 3 + [(0, 0)]
    pilots = [Mined(prompt(n), c, t) for n, (t, c) in enumerate(seen)]
    weights = topped_up(pilots, 0.5, seed=0)
    assert sorted(weights[:10]) == [0] * 5 + [2] * 5
    assert weights[10:12] == [1, 1] and weights[12:15] == [1, 1, 1]
    assert weights[15] == 0, "it was not asked"
    assert sum(weights) == 15
    assert topped_up(pilots, 0.5, seed=0) == weights
    assert len({tuple(topped_up(pilots, 0.5, seed)) for seed in range(20)}) > 5
    assert sorted(topped_up(pilots, 0.01, seed=0)[:10]) == [0] * 6 + [2.5] * 4, "four speak for all"


def test_each_capability_speaks_for_itself() -> None:
    """Forty solved sums and ten hopeless words: nobody of one stands for the other."""
    pilots = [Mined(prompt(n, "sums"), 4, 4) for n in range(40)]
    pilots += [Mined(prompt(100 + n, "words"), 0, 4) for n in range(10)]
    weights = topped_up(pilots, 0.1, seed=0)
    assert sum(weights[:40]) == 40 and sum(weights[40:]) == 10
    mined = [
        replace(pilot, successes=4 * pilot.successes, trials=16, weight=weight, stratum="x")
        for pilot, weight in zip(pilots, weights, strict=True)
    ]
    summary: Any = summarise(mined, ks=[1], solved_at=0.9, seed=0)
    assert summary["pass@1"]["mean"] == pytest.approx(0.8)
    assert summary["by_capability"]["words"]["pass@1"]["mean"] == 0
    assert summary["by_capability"]["sums"]["pass@1"]["prompts"] == 4


def mined_in_waves(rates: np.ndarray, seed: int) -> list[Mined]:
    """Prompts of known pass rates after a pilot of 2 and, for some, 4 samples more."""
    right = np.random.default_rng(seed).random((len(rates), SAMPLES)) < rates[:, None]
    pilots = [Mined(prompt(n), int(row[:PILOT].sum()), PILOT) for n, row in enumerate(right)]
    return [
        replace(
            pilot,
            successes=int(row.sum()) if weight else pilot.successes,
            trials=SAMPLES if weight else PILOT,
            weight=weight,
            stratum=stratum_of(pilot),
        )
        for pilot, row, weight in zip(pilots, right, topped_up(pilots, 0.1, seed), strict=True)
    ]


def test_pass_at_k_is_not_bent_by_stopping_early_and_its_interval_is_honest() -> None:
    """300 prompts of rates from a U-shaped law, 120 times: the mean of 1 - (1-p)^4 within four
    standard errors, without the weights far off; nine intervals in ten hold the law's mean."""
    truth = 1 - math.prod((0.4 + n) / (0.8 + n) for n in range(K))  # 1 - E[(1-p)^4]
    means, bare, held, widths = list[float](), list[float](), 0, list[float]()
    for seed in range(120):
        rates = np.random.default_rng(10_000 + seed).beta(0.4, 0.4, size=300)
        mined = mined_in_waves(rates, seed)
        found: Any = summarise(mined, ks=[K], solved_at=0.9, seed=seed)
        estimate = found[f"pass@{K}"]
        means.append(estimate["mean"])
        held += estimate["low"] <= truth <= estimate["high"]
        widths.append(estimate["high"] - estimate["low"])
        topped = [each for each in mined if each.weight]
        bare.append(fmean(pass_at_k(each.trials, each.successes, K) for each in topped))
    spread = float(np.std(means))
    error = spread / np.sqrt(len(means))
    assert fmean(means) == pytest.approx(truth, abs=4 * error)
    assert abs(fmean(bare) - truth) > 10 * error
    assert held >= 0.88 * len(means)
    assert fmean(widths) < 1.5 * 3.92 * spread, "nor is it much wider than it need be"


def test_pass_at_k_by_weights() -> None:
    """Of 1/2 with weight 1 and 1 with weight 3: 7/8; a pilot of weight 0 is not counted."""
    stands = [Stands(1.0), Stands(3.0), Stands(0.0)]
    found = passes([(2, 1), (2, 2), (1, 1)], ks=[1, 2], stands=stands)
    assert found["pass@1"]["mean"] == pytest.approx(0.875) and found["pass@1"]["prompts"] == 2
    assert found["pass@2"]["mean"] == 1.0


def test_the_stage_samples_more_where_it_pays(tmp_path: Path) -> None:
    """Two samples of each of forty prompts, four more where they differ and of some of the rest."""
    model = make_tiny_model(tmp_path / "policy", seed=2)
    argv = recipe(tmp_path, model)
    write_records(tmp_path / "prompts.jsonl", [prompt(n) for n in range(40)])
    waves = ["mine.samples=6", "mine.pilot=2", "mine.audit_share=0.01", "mine.shard_size=99"]
    assert run_mine([*argv, *waves]) == 0
    rows = pq.read_table(tmp_path / "run/mine/prompts.parquet").to_pylist()
    counts = [(row["difficulty"]["successes"], row["difficulty"]["trials"]) for row in rows]
    assert {trials for _, trials in counts} == {2, 6}
    assert all(successes in (0, 2) for successes, trials in counts if trials == 2)
    summary = json.loads((tmp_path / "run/mine/summary.json").read_text())
    assert summary["pass@4"]["prompts"] == sum(trials == 6 for _, trials in counts) < 40
    assert run_mine([*argv, "mine.samples=6", "--overwrite"]) == 0
    whole = pq.read_table(tmp_path / "run/mine/prompts.parquet").to_pylist()
    full = [row["difficulty"]["successes"] for row in whole]
    assert [c for c, n in counts if n == 6] == [
        c for c, (_, n) in zip(full, counts, strict=True) if n == 6
    ], "the second wave's samples are those that all at once would have had"


def test_a_pilot_of_all_samples_is_all_there_is(tmp_path: Path) -> None:
    """Whoever lowers `samples` for one run need not know of the pilot."""
    model = make_tiny_model(tmp_path / "policy", seed=2)
    assert run_mine([*recipe(tmp_path, model), "mine.pilot=8"]) == 0
    rows = pq.read_table(tmp_path / "run/mine/prompts.parquet").to_pylist()
    assert {row["difficulty"]["trials"] for row in rows} == {4}
    summary = json.loads((tmp_path / "run/mine/summary.json").read_text())
    assert "prompts" not in summary["pass@4"], "all of them speak for themselves"
