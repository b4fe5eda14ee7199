"""Memory that can still be had."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from ground.memory import available_bytes

USED, STAT = "900\n", "anon 500\ninactive_file 200\nactive_file 100\nx 9\n"


@pytest.fixture
def own(tmp_path: Path) -> Path:
    own = tmp_path / "own"
    own.write_text("0::/job/step\n")
    (tmp_path / "job" / "step").mkdir(parents=True)
    return own


def limit(group: Path, limit: str) -> None:
    (group / "memory.current").write_text(USED)
    (group / "memory.stat").write_text(STAT)
    (group / "memory.max").write_text(limit + "\n")


def test_the_tightest_limit_above_us_counts_and_its_file_cache_can_be_had(
    tmp_path: Path, own: Path
) -> None:
    limit(tmp_path / "job" / "step", "max")
    limit(tmp_path / "job", "1000")
    assert available_bytes(tmp_path, own) == 1000 - 900 + 300
    limit(tmp_path, "700")
    assert available_bytes(tmp_path, own) == 100
    limit(tmp_path / "job" / "step", "100")
    assert available_bytes(tmp_path, own) == 0


def test_without_a_limit_the_machine_counts(tmp_path: Path, own: Path) -> None:
    total = psutil.virtual_memory().total
    assert 1000 < available_bytes(tmp_path, own) <= total
    limit(tmp_path / "job", "max")
    assert 1000 < available_bytes(tmp_path, own) <= total
    assert 1000 < available_bytes(tmp_path, tmp_path / "absent") <= total
