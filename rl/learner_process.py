"""The learner's process as its supervisor sees it: lines to it, reports from it, and its silence.

started (imports go on while Ray starts) → told the job → told Ray's address → reports … → gone
"""

from __future__ import annotations

import math
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress

from ground.errors import InfraError, PacktrainError
from ground.launch import launch_of
from rl.job import Job, Report, learner_name

_FIRST_WORD_SECONDS = 180.0
"""Python and its libraries may take so long to come up on a machine that is busy."""
_PHASE_SLACK_SECONDS = 60.0
"""The deadlines of what the learner waits for say more, so ours comes later."""


class LearnerProcess:
    """The learner's process.

    Example:
        learner.tell(address);  report = learner.hear();  …;  learner.close()

    Args:
        on_silence: called before a silent learner is given up, so that its stacks can be kept.
        environment: by which a launcher makes it a rank.
    """

    def __init__(
        self, job: Job, on_silence: Callable[[], None], environment: Mapping[str, str] | None = None
    ) -> None:
        environment = environment or {}
        rank = launch_of(environment).rank
        log = job.log_directory / f"{learner_name(rank)}.err"
        self._log = (job.logs_end_in or job.log_directory) / log.name
        self._silent_seconds, self._on_silence = job.section.silent_seconds, on_silence
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "ground.imports", "rl.learn"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,
                env={**os.environ, **environment},
            )
        self._phase, self._phase_since = "start", time.monotonic()
        # What a rank that follows does is rank 0's to say, and to end in time.
        self._step_seconds = math.inf if rank else job.section.step_deadline_seconds
        self._phase_seconds = self._step_seconds
        self._lines: queue.SimpleQueue[str | PacktrainError] = queue.SimpleQueue()
        self._patience = _FIRST_WORD_SECONDS
        self.heard_at = time.time()
        self.last_report = Report(kind="alive")
        threading.Thread(target=self._listen, name="reports", daemon=True).start()
        self.tell(job.model_dump_json())

    def tell(self, line: str) -> None:
        """Give it a line; one that is dead already is noticed by `hear`."""
        assert self._process.stdin
        with suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()

    def hear(self) -> Report:
        """Its next report; signs of life are passed over.

        Raises:
            InfraError: it ended without a word, gave no sign of life in time, stayed too long in
                one phase, or was given up.
        """
        while True:
            try:
                line = self._lines.get(timeout=self._patience)
            except queue.Empty:
                self._on_silence()
                raise self._lost(f"was silent for {self._patience:g} s") from None
            if isinstance(line, PacktrainError):
                raise line
            if not line:
                code = self._process.wait()
                raise self._lost(f"ended with exit code {code} and no word")
            self._patience, self.heard_at = self._silent_seconds, time.time()
            report = Report.model_validate_json(line)
            self._follow(report)
            if report.kind not in ("alive", "phase"):
                return report

    @property
    def doing(self) -> str:
        """What its main thread does, in words."""
        return self._phase

    def give_up(self, error: PacktrainError) -> None:
        """Have `hear` raise this, because the life that it belongs to is over; from any thread."""
        self._lines.put(error)

    def ask_to_stop(self) -> None:
        """Ask it to finish its step and save; the reports go on until it has."""
        self._process.terminate()

    def ended_by(self) -> str:
        """How it ended, other than in order; empty while it goes on."""
        code = self._process.poll()
        return f"ended with exit code {code}, see {self._log}" if code else ""

    def close(self) -> None:
        """It is gone when this returns."""
        self._process.kill()
        self._process.wait()

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put("")

    def _lost(self, what: str) -> InfraError:
        return InfraError(f"the learner must go on, it {what}", where="rl", fix=f"see {self._log}")

    def _follow(self, report: Report) -> None:
        """Note what the main thread does; a heart that beats in a stuck process is not enough."""
        if report.kind not in ("alive", "validation"):
            self._phase = str(report.facts.get("doing", f"go on after step {report.step}"))
            self._phase_seconds = float(str(report.facts.get("seconds") or self._step_seconds))
            self._phase_since, self.last_report = time.monotonic(), report
        elif time.monotonic() - self._phase_since > self._phase_seconds + _PHASE_SLACK_SECONDS:
            self._on_silence()
            raise self._lost(f"took longer than {self._phase_seconds:g} s to {self._phase}")


@contextmanager
def learner_process(
    job: Job, on_silence: Callable[[], None], environment: Mapping[str, str] | None = None
) -> Iterator[LearnerProcess]:
    """A learner's process; started before Ray, for its imports take long; gone at the end."""
    learner = LearnerProcess(job, on_silence, environment)
    try:
        yield learner
    finally:
        learner.close()
