"""What `packtrain status` says of the measured speeds."""

from __future__ import annotations

import json
from pathlib import Path

from packtrain.advice import advice
from packtrain.observe import last_metrics


def speeds(learner: float, rollout: float, workers: float) -> dict[str, float]:
    return {
        "learner_seconds_per_sample": learner,
        "rollout_seconds_per_sample": rollout,
        "workers": workers,
    }


def test_a_fleet_that_is_too_slow_is_told_how_many_workers_would_do() -> None:
    told = advice(speeds(0.02, 0.1, 2))  # 0.05 a sample against 0.02
    assert told.startswith("the learner waits 60% of the time: 5 workers would keep pace with it")


def test_a_fleet_that_idles_is_told_the_learners_best_share() -> None:
    told = advice(speeds(0.03, 0.01, 1))
    assert told == "rollout idles 67% of the time: give the learner 75% of the devices"
    assert advice(speeds(0.03, 0.06, 4)).endswith("33% of the devices; 2 workers would do")


def test_in_turns_the_step_is_the_sum_so_both_count() -> None:
    """0.02 and 0.12 / 3 = 0.04: a step of 0.06; of four workers 0.03, 0.05; side by side 0.04."""
    told = advice({**speeds(0.02, 0.12, 3), "overlaps": 0.0})
    assert "67% of a step is rollout's: one worker more would save 17% of the step" in told
    assert told.endswith("side by side would save up to 33% (rl.max_staleness=1)")
    assert advice({**speeds(0.02, 0.12, 3), "overlaps": 1.0}).startswith("the learner waits 50%")


def test_nothing_is_said_while_both_keep_pace_or_nothing_is_known() -> None:
    assert advice(speeds(0.02, 0.042, 2)) == "" and advice({}) == ""
    assert advice({"workers": 2.0}) == ""


def test_speeds_are_read_behind_a_later_line_that_has_none(tmp_path: Path) -> None:
    (tmp_path / "rl").mkdir()
    lines = [{"step": 1, **speeds(1, 2, 2)}, {"step": 1, "validation": 0.5}]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "rl" / "metrics.jsonl").write_text(text)
    assert last_metrics(tmp_path, "rl", having="workers")["workers"] == 2
    assert "validation" in last_metrics(tmp_path, "rl")
