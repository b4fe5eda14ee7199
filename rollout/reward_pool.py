"""Reward functions at arm's length: they may hang, crash, fork or lie, and training goes on.

    score(prompt, texts): all together ─ verdicts ─▶ done
                                └─ failed ─▶ each alone on a fresh process ─▶ verdict or its error

Everything is tried at most twice, in company and alone, so a process that died for reasons of its
own costs nobody a verdict, while a completion that hangs or kills the verifier twice earns 0 with
its reason. What a function does wrong on every prompt is the function's fault and raises.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from ground.config import SandboxSettings
from ground.errors import InfraError
from ground.records import Prompt
from rollout.reward_process import START_SECONDS, Died, Reply, RewardProcess, Silent
from rollout.rewards import SANDBOX_VARIABLE, RewardError, unknown_reward

logger = logging.getLogger(__name__)

MAX_FAILED_PROMPTS = 16
"""Prompts in a row on which a function may fail for all completions before it counts as broken."""
RECYCLE_AFTER = 5000
"""Questions to one process before it is replaced: verifiers' caches grow."""
UNJUDGED = "unjudged"
"""Begins the error of an answer that a judge gave no verdict on."""
_COUNTED = (
    "texts", "calls", "drifted",
    "reward_timeout", "reward_died", "reward_raised", "reward_refused",
)  # fmt: skip
_WAIT_SECONDS = 900.0
_CLOSE_SECONDS = 10.0
_MAX_MEMORY = 4 << 30
_PROGRAM_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class ScoredText:
    """The verdict on one completion.

    Example:
        ScoredText(0.0, False, error="reward_timeout: no reply within 10 s (math, prompt 9c1f, 3)")
    """

    reward: float
    passed: bool
    parts: dict[str, float] = field(default_factory=dict)
    error: str = ""
    """Empty, or what the completion did to the reward: `reward_timeout`, `reward_died`,
    `reward_raised` or `reward_refused` (it returned no number), colon, details. `unjudged`: a judge
    gave no verdict."""

    @property
    def is_judged(self) -> bool:
        """Whether this says anything about the completion."""
        return not self.error.startswith(UNJUDGED)


@dataclass(frozen=True, slots=True)
class _Failure:
    kind: str
    detail: str


class Verifier(Protocol):
    """Whoever gives verdicts: a `RewardPool`, alone or beside a judge."""

    @property
    def num_processes(self) -> int:
        """Calls that can be under way at once."""
        ...

    def score(self, prompt: Prompt, texts: Sequence[str]) -> list[ScoredText]:
        """Verdicts on completions of one prompt, in their order; blocks until they are there."""
        ...


class RewardPool:
    """A fixed number of killable processes that score completions; thread-safe.

    Args:
        deadline_seconds: for one call of a reward function, with all completions of a prompt or
            with one; then its process and everything that it started is killed.
        files: the user's reward files (`rewards:` of the recipe).
        sandbox: where programs of the `code` reward run; they get at most four fifths of the
            deadline, so that it is they who end and not the process.
        audit_every: every n-th call is done twice to find functions that are not deterministic;
            0 is never.

    Example:
        with RewardPool(2, 10.0) as pool:
            pool.score(prompt, ["=>9", "=>8"])  # [ScoredText(1.0, True), ScoredText(0.0, False)]
    """

    def __init__(
        self,
        num_processes: int,
        deadline_seconds: float,
        files: Sequence[Path] = (),
        *,
        sandbox: SandboxSettings | None = None,
        max_memory_bytes: int = _MAX_MEMORY,
        audit_every: int = 0,
    ) -> None:
        if num_processes < 1 or deadline_seconds <= 0:
            raise ValueError(
                "needs at least one process and a deadline above 0 s, "
                f"got {num_processes} and {deadline_seconds:g}"
            )
        self._deadline = deadline_seconds
        self._audit_every = audit_every
        told = _told(sandbox or SandboxSettings(), deadline_seconds)
        self._processes = [
            RewardProcess(files, max_memory_bytes, told) for _ in range(num_processes)
        ]
        self._idle: queue.LifoQueue[RewardProcess] = queue.LifoQueue()
        for process in self._processes:
            self._idle.put(process)
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self._failed_prompts: Counter[str] = Counter()

    def __enter__(self) -> RewardPool:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def score(self, prompt: Prompt, texts: Sequence[str]) -> list[ScoredText]:
        """Verdicts on completions of one prompt, in their order; blocks until they are there.

        Raises:
            DataError: the prompt names a reward that is not registered.
            RecipeError: a file of the user's rewards does not load.
            RewardError: the function cannot be loaded, or failed on 16 prompts in a row.
            InfraError: processes cannot be started, none became free in time, or what a function
                needs (a sandbox) does not start: that is no completion's fault.
        """
        if not texts:
            return []
        with self._borrowed() as process:
            scored = [
                self._alone(process, prompt, n, texts[n])
                if isinstance(verdict, _Failure) or verdict.error
                else verdict
                for n, verdict in enumerate(self._first(process, prompt, texts))
            ]
        self._account(prompt, scored)
        return scored

    @property
    def num_processes(self) -> int:
        """Calls that can be under way at once."""
        return len(self._processes)

    @property
    def pids(self) -> list[int]:
        """Processes that run now."""
        return [process.pid for process in self._processes if process.pid is not None]

    def stats(self) -> dict[str, int]:
        """Counters since the start: texts, calls, restarts, drifted, and failures by kind."""
        restarts = sum(max(process.num_starts - 1, 0) for process in self._processes)
        with self._lock:
            return {**dict.fromkeys(_COUNTED, 0), **self._counts, "restarts": restarts}

    def close(self) -> None:
        """End all processes; calls that are under way or wait fail with an `InfraError`."""
        for process in self._processes:
            process.interrupt()
        returned: list[RewardProcess] = []
        with contextlib.suppress(queue.Empty):
            while len(returned) < len(self._processes):
                returned.append(self._idle.get(timeout=_CLOSE_SECONDS))
        for process in returned:
            process.close()
            self._idle.put(process)

    @contextlib.contextmanager
    def _borrowed(self) -> Iterator[RewardProcess]:
        try:
            process = self._idle.get(timeout=_WAIT_SECONDS)
        except queue.Empty:
            raise InfraError(
                f"one of {len(self._processes)} reward processes must become free within "
                f"{_WAIT_SECONDS:g} s, none did",
                where="reward pool",
                fix="use more reward processes or a shorter deadline",
            ) from None
        try:
            yield process
        finally:
            if process.num_asked > RECYCLE_AFTER:
                process.kill()
            self._idle.put(process)

    def _first(
        self, process: RewardProcess, prompt: Prompt, texts: Sequence[str]
    ) -> Iterator[ScoredText | _Failure]:
        """All in one call, or in calls of their own where the reward asks for that."""
        self._prepare(process, prompt)
        size = 1 if process.loaded[prompt.reward] else len(texts)
        for start in range(0, len(texts), size):
            part = texts[start : start + size]
            outcome = self._attempt(process, prompt, part)
            yield from [outcome] * len(part) if isinstance(outcome, _Failure) else outcome

    def _alone(self, process: RewardProcess, prompt: Prompt, index: int, text: str) -> ScoredText:
        outcome = self._attempt(process, prompt, [text])
        if not isinstance(outcome, _Failure):
            return outcome[0]
        where = f"reward {prompt.reward}, prompt {prompt.id}, sample {index}"
        return ScoredText(0.0, False, error=f"{outcome.kind}: {outcome.detail} ({where})")

    def _attempt(
        self, process: RewardProcess, prompt: Prompt, texts: Sequence[str]
    ) -> list[ScoredText] | _Failure:
        self._prepare(process, prompt)
        question = {
            "do": "score",
            "prompt": {
                **asdict(prompt),
                "messages": [[m.role, m.content] for m in prompt.messages],
                "difficulty": None,
            },
            "texts": list(texts),
            "cpu_seconds": self._deadline + 1.0,
            "audit": self._is_audited(),
        }
        try:
            reply = process.ask(question, self._deadline)
        except Silent as error:
            return _Failure("reward_timeout", str(error))
        except Died as error:
            return _Failure("reward_died", str(error))
        if "raised" in reply:
            raised = reply["raised"]
            if reply["infra"]:
                process.kill()
                raise InfraError(str(raised["message"]), where="reward pool")
            if raised["type"] == "MemoryError":
                process.kill()
            detail = f"{raised['type']}: {raised['message']} at {raised['where']}"
            return _Failure("reward_raised", detail)
        if reply["drifted"]:
            self._report_drift(prompt)
        return [_scored(verdict, prompt, n) for n, verdict in enumerate(reply["verdicts"])]

    def _prepare(self, process: RewardProcess, prompt: Prompt) -> None:
        """Have the verifier's libraries imported before the clock of a verdict runs."""
        try:
            process.start()
            if prompt.reward in process.loaded:
                return
            if prompt.reward not in process.names:
                raise unknown_reward(prompt.reward, process.names, where=f"prompt {prompt.id}")
            reply = process.ask({"do": "load", "reward": prompt.reward}, START_SECONDS)
        except (Silent, Died) as error:
            raise InfraError(
                f"reward {prompt.reward!r} must load within {START_SECONDS:g} s, got: {error}",
                where="reward pool",
            ) from None
        if "raised" in reply:
            raised = reply["raised"]
            raise RewardError(
                f"reward {prompt.reward!r} cannot be loaded: {raised['type']}: {raised['message']}",
                where=raised["where"],
            )
        process.loaded[prompt.reward] = bool(reply["one_by_one"])

    def _is_audited(self) -> bool:
        with self._lock:
            self._counts["calls"] += 1
            return bool(self._audit_every) and self._counts["calls"] % self._audit_every == 0

    def _report_drift(self, prompt: Prompt) -> None:
        with self._lock:
            self._counts["drifted"] += 1
        logger.warning(
            "reward %s gave two different verdicts on the same completions of prompt %s",
            prompt.reward,
            prompt.id,
        )

    def _account(self, prompt: Prompt, scored: Sequence[ScoredText]) -> None:
        """Count, and tell a broken function from bad completions."""
        kinds = Counter(each.error.partition(":")[0] for each in scored if each.error)
        blamed = kinds["reward_raised"] + kinds["reward_refused"] == len(scored)
        with self._lock:
            self._counts["texts"] += len(scored)
            self._counts += kinds
            failed = self._failed_prompts[prompt.reward] + 1 if blamed else 0
            self._failed_prompts[prompt.reward] = failed
        if failed >= MAX_FAILED_PROMPTS:
            raise RewardError(
                f"reward {prompt.reward!r} failed on every completion of {failed} prompts in a row",
                where=scored[-1].error,
                fix="mend the function or the prompts' `answer`",
            )


def _told(sandbox: SandboxSettings, deadline_seconds: float) -> dict[str, str]:
    seconds = min(sandbox.seconds, _PROGRAM_SHARE * deadline_seconds)
    return {SANDBOX_VARIABLE: sandbox.model_copy(update={"seconds": seconds}).model_dump_json()}


def _scored(verdict: Reply, prompt: Prompt, index: int) -> ScoredText:
    if "refused" in verdict:
        where = f"reward {prompt.reward}, prompt {prompt.id}, sample {index}"
        return ScoredText(0.0, False, error=f"reward_refused: {verdict['refused']} ({where})")
    return ScoredText(verdict["reward"], verdict["passed"], verdict["parts"])
