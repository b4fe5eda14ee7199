"""The `code` reward: does the program in a completion pass its tests, run in a sandbox?

What a prompt's `answer` looks like: rollout/code_tests.py. What the sandbox is: docs/rewards.md.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence

from ground.config import SandboxSettings
from rollout.code_runs import Ran, run_tests
from rollout.code_tests import read_tests
from rollout.rewards import SANDBOX_VARIABLE, Score, Turn, reward
from rollout.sandbox import Sandbox
from rollout.sandbox_probe import CODE, sandbox_for


@functools.cache
def _sandbox() -> tuple[Sandbox, float]:
    """Chosen once per process: every kind is attacked before it is trusted."""
    settings = SandboxSettings.model_validate_json(os.environ.get(SANDBOX_VARIABLE, "{}"))
    return sandbox_for(settings), settings.seconds


@reward(CODE, one_by_one=True, prepare=_sandbox)
def code(
    prompts: Sequence[list[Turn]],
    completions: Sequence[list[Turn]],
    answer: Sequence[str],
    **columns: object,
) -> list[Score]:
    """1 if the program passes all its tests, else 0; the share that it passed is in the parts.

    Example:
        answer {"inputs": ["3 4"], "outputs": ["7"]}:
        "```python\\nprint(sum(map(int, input().split())))\\n```" → 1
    """
    sandbox, seconds = _sandbox()
    return [
        _score(run_tests(sandbox, completion[-1]["content"], read_tests(asked), seconds))
        for completion, asked in zip(completions, answer, strict=True)
    ]


def _score(ran: Ran) -> Score:
    parts = {"tests": ran.num_passed / ran.num_tests, "timeout": float(ran.outcome == "timeout")}
    return Score(float(ran.passed), ran.passed, parts)
