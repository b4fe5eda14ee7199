"""The learner's voice: reports on the real stdout, whatever libraries print on stderr."""

from __future__ import annotations

import os
import threading

from rl.job import Report


class Speaker:
    """Writes reports to the real stdout; what libraries print goes to stderr instead."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        self._lock = threading.Lock()
        os.dup2(2, 1)

    def say(self, report: Report) -> None:
        """One line, whole, from any thread."""
        with self._lock:
            self._out.write(report.model_dump_json() + "\n")
            self._out.flush()

    def score(self, version: int, score: float) -> None:
        """How a version did on the validation slice."""
        self.say(Report(kind="validation", step=version, numbers={"pass_rate": score}))
