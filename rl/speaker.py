"""The learner's voice: reports on the real stdout, whatever libraries print on stderr."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Mapping

from ground.errors import FailureKind, InfraError, PacktrainError
from rl.job import Report

_BEAT_SECONDS = 2.0


class Speaker:
    """Writes reports to the real stdout; what libraries print goes to stderr instead.

    A thread named `heartbeat` says every few seconds that the process is alive.
    """

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8")
        self._lock = threading.Lock()
        os.dup2(2, 1)
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def say(self, report: Report) -> None:
        """One line, whole, from any thread."""
        with self._lock:
            self._out.write(report.model_dump_json() + "\n")
            self._out.flush()

    def score(self, version: int, score: float) -> None:
        """How a version did on the validation slice."""
        self.say(Report(kind="validation", step=version, numbers={"pass_rate": score}))

    def fail(self, error: PacktrainError) -> int:
        """What ended the learner; returns its exit code."""
        self.say(Report(kind="failed", facts=facts_of(error)))
        return error.exit_code

    def _beat(self) -> None:
        while True:
            self.say(Report(kind="alive"))
            time.sleep(_BEAT_SECONDS)


def facts_of(error: PacktrainError) -> dict[str, object]:
    """An error as another process is told of it."""
    facts = {"type": type(error).__name__, "what": error.what, "where": error.where}
    facts |= {"why": error.why, "fix": error.fix, "kind": str(error.kind)}
    return {**facts, "exit_code": error.exit_code}


def error_of(facts: Mapping[str, object]) -> PacktrainError:
    """The error with its exit code and kind; only a lost attempt keeps its type."""
    is_lost = facts["type"] == InfraError.__name__
    error = (InfraError if is_lost else PacktrainError)(
        str(facts["what"]),
        where=str(facts["where"]),
        why=str(facts["why"]),
        fix=str(facts["fix"]),
    )
    error.exit_code = int(str(facts["exit_code"]))
    error.kind = FailureKind(str(facts["kind"]))
    return error
