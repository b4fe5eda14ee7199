"""A process is told from a later one with its id, whatever it calls itself and the clock says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from ground.births import birth

NAMED = "open('/proc/self/comm', 'wb').write(b'a) R 1 (\\xc3'); print('named', flush=True); input()"


def uptime() -> float:
    return float(Path("/proc/uptime").read_text().split()[0])


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere it is psutil's word")
def test_a_birth_is_told_since_the_machine_s_start_whatever_the_name() -> None:
    before = uptime()
    line = [sys.executable, "-c", NAMED]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout and child.stdin and child.stdout.readline() == "named\n"
        assert before - 0.02 <= birth(child.pid) <= uptime()
        assert birth(child.pid) == birth(child.pid) and birth(child.pid) > birth(os.getpid())
        child.stdin.write("\n")
    with pytest.raises(psutil.NoSuchProcess):
        birth(child.pid)
