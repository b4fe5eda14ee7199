"""Ends everything of ours once its keeper is gone: `python -m rollout.reaper MARK FOLDER PID`.

    waiting (stdin open) → process PID closed it, or died → all of ours killed → FOLDER removed

Ray leaves agents behind for half a minute when its driver is killed, and a killed driver cannot
clean up. This process holds one end of a pipe whose other end nobody but the keeper has; it has a
session of its own, so that a signal to the keeper's group does not reach it.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from rollout.processes import end_all


def main() -> int:
    """Wait for the end of stdin, then reap."""
    mark, folder, keeper = sys.argv[1:4]
    sys.stdin.buffer.read()
    end_all(mark, Path(folder), spare=int(keeper))
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
