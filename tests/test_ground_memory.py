"""Memory that can still be had."""

from __future__ import annotations

from pathlib import Path

import psutil

from ground.memory import available_bytes


def test_the_limit_of_a_container_counts_and_its_file_cache_can_be_had(tmp_path: Path) -> None:
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\ninactive_file 200\nactive_file 100\nx 9\n")
    (tmp_path / "memory.max").write_text("1000\n")
    assert available_bytes(tmp_path) == 400
    (tmp_path / "memory.max").write_text("100\n")
    assert available_bytes(tmp_path) == 0


def test_without_a_limit_the_machine_counts(tmp_path: Path) -> None:
    total = psutil.virtual_memory().total
    assert 0 < available_bytes(tmp_path) <= total
    (tmp_path / "memory.current").write_text("900\n")
    (tmp_path / "memory.stat").write_text("anon 500\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert 1000 < available_bytes(tmp_path) <= total
