"""Of Ray's processes only those run that have something to do."""

from __future__ import annotations

from contextlib import suppress

import psutil
import pytest


@pytest.mark.usefixtures("ray_local")
def test_no_process_waits_for_machines_or_for_logs() -> None:
    words = list[str]()
    for each in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # it has ended meanwhile
            words.append(" ".join(each.cmdline()))
    assert any("raylet" in each for each in words)
    assert not [each for each in words if "log_monitor.py" in each or "/monitor.py" in each]
