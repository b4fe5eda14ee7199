"""Real processes that are killed at named points; `benchmarks/chaos.py` does it fifty times."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.chaos import soak

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def test_nothing_is_lost_and_nothing_trained_twice(tmp_path: Path, tiny_model: Path) -> None:
    found = soak(tmp_path, tiny_model, kills=8, steps=8)
    assert sum(found.kills.values()) >= 6
    assert (found.consumed["lost"], found.consumed["trained_twice"]) == (0, 0)
    assert (found.consumed["steps"], found.differing) == (8, 0)


def test_synchronous_training_ends_as_if_nobody_had_been_killed(
    tmp_path: Path, tiny_model: Path
) -> None:
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    whole = soak(tmp_path / "whole", tiny_model, kills=0, steps=6, staleness=0)
    killed = soak(tmp_path / "killed", tiny_model, kills=6, steps=6, seed=3, staleness=0)
    assert sum(killed.kills.values()) >= 4
    assert len(whole.digests) == 3
    assert killed.digests == whole.digests
    assert killed.ledger == whole.ledger
