"""A process that leaves has told everybody, and is gone whatever its threads do."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import atexit, sys, threading
from ground.leaving import leave
atexit.register(lambda: sys.stdout.write("told"))
threading.Thread(target=threading.Event().wait).start()
leave(5)
"""


def test_what_is_registered_is_done_and_nobody_is_waited_for() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (5, "told")
