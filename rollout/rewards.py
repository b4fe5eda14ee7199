"""Named reward functions, and what they may return.

A reward has the signature of TRL's reward functions on conversational data:

    @reward("short")
    def short(prompts, completions, answer, **columns) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        return [1.0 if text == right else 0.0 for text, right in zip(texts, answer)]

Columns are lists with a value per completion: `answer`, `capability` and `prompt_id`. It may return
plain numbers (then "solved" means a reward of exactly 1) or `Score`s, where the verdict is apart
from the reward. Rewards are found by name only; a recipe never holds an import path, though it may
list files (`rewards: [my_rewards.py]`) whose functions register themselves.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.machinery
import math
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import SupportsFloat

from ground.errors import DataError, FailureKind, PacktrainError, RecipeError
from ground.records import Prompt

Turn = dict[str, str]
RewardFunction = Callable[..., Sequence["float | Score"]]

SANDBOX_VARIABLE = "PACKTRAIN_SANDBOX"
"""Where a reward process finds the recipe's `sandbox` section, as JSON."""

MAX_REWARD = 1e6
"""Beyond this a reward is a defect: one such number would drown every other in the mean."""
MAX_PARTS = 32
_BUILT_IN = {
    "code": "rollout.code_reward",
    "compliance": "rollout.compliance_reward",
    "exact": "rollout.text_rewards",
    "format": "rollout.text_rewards",
    "judge": "rollout.judge_reward",
    "math": "rollout.math_reward",
    "reasoning_gym": "rollout.reasoning_reward",
}


class RewardError(PacktrainError):
    """A reward function breaks its contract; its author has to act (exit 2)."""

    exit_code = 2
    kind = FailureKind.CODE


@dataclass(frozen=True, slots=True)
class Score:
    """What one completion is worth.

    Example:
        Score(reward=0.9, passed=True, parts={"correct": 1.0, "length": -0.1})
    """

    reward: float
    """Drives the advantage; partial credit and penalties belong here."""
    passed: bool
    """The verdict: is the task solved? Drives pass@k and the curriculum."""
    parts: dict[str, float] = field(default_factory=dict)
    """What the reward is made of, for the eye; at most 32 numbers."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A return value that is no score, and why.

    Example:
        Refusal("must be a finite number, got nan")
    """

    reason: str


@dataclass(frozen=True, slots=True)
class Registered:
    """A reward function and how it wants to be called.

    Example:
        Registered(code, one_by_one=True, prepare=probe_sandboxes)
    """

    function: RewardFunction
    one_by_one: bool = False
    """A call gets one completion, so that each has the whole deadline for itself."""
    prepare: Callable[[], object] | None = None
    """Called once per process before the first verdict, outside of any deadline of a verdict."""


_registered: dict[str, Registered] = {}


def reward(
    name: str, *, one_by_one: bool = False, prepare: Callable[[], object] | None = None
) -> Callable[[RewardFunction], RewardFunction]:
    """Register the decorated function under `name`; a name can be taken once.

    Args:
        one_by_one, prepare: see `Registered`.
    """

    def register(function: RewardFunction) -> RewardFunction:
        if name in _registered or (name in _BUILT_IN and function.__module__ != _BUILT_IN[name]):
            raise RewardError(f"reward {name!r} is registered already", fix="choose another name")
        _registered[name] = Registered(function, one_by_one, prepare)
        return function

    return register


def reward_names() -> list[str]:
    """All names that `find_reward` knows now."""
    return sorted({*_BUILT_IN, *_registered})


def find_reward(name: str) -> RewardFunction:
    """The function of that name; see `find_registered`."""
    return find_registered(name).function


def find_registered(name: str) -> Registered:
    """What is registered under that name; its module is imported when it is first asked for.

    Raises:
        DataError: nothing is.
    """
    if name not in _registered and name in _BUILT_IN:
        importlib.import_module(_BUILT_IN[name])
    if name not in _registered:
        raise unknown_reward(name, reward_names())
    return _registered[name]


def unknown_reward(name: str, known: Sequence[str], where: str = "") -> DataError:
    """The error for a name that is not among those known."""
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return DataError(f"reward {name!r} is not registered", where=where, fix=hint)


def load_rewards(path: Path) -> None:
    """Run a user's file, whose functions register themselves.

    Raises:
        RecipeError: it cannot be read or fails; names the file and the line that failed.
    """
    if not path.is_file():
        raise RecipeError("this reward file does not exist", where=str(path))
    name = f"reward_file_{path.stem}"
    loader = importlib.machinery.SourceFileLoader(name, str(path))
    module = types.ModuleType(name)
    sys.modules[name] = module  # dataclasses look their module up
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        own = [f for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        line = error.lineno if isinstance(error, SyntaxError) else own[-1].lineno if own else None
        raise RecipeError(
            f"a reward file must load, got {type(error).__name__}: {error}",
            where=f"{path}:{line}" if line else str(path),
            fix="mend that line, or take the file out of `rewards`",
        ) from None


def call_reward(
    function: RewardFunction, prompt: Prompt, texts: Sequence[str]
) -> list[Score | Refusal]:
    """Score completions of one prompt; the function gets copies that it may do anything to.

    Raises:
        RewardError: it did not return one value per completion.
        BaseException: whatever the function raises.
    """
    num = len(texts)
    returned: object = function(
        prompts=[[turn(m.role, m.content) for m in prompt.messages] for _ in texts],
        completions=[[turn("assistant", text)] for text in texts],
        answer=[prompt.answer] * num,
        capability=[prompt.capability] * num,
        prompt_id=[prompt.id] * num,
    )
    values = _as_list(returned)
    if values is None or len(values) != num:
        got = type(returned).__name__ if values is None else f"{len(values)} values"
        raise RewardError(
            f"a reward must return a list of {num} numbers for {num} completions, got {got}",
            where=f"{function.__module__}.{function.__qualname__}",
        )
    return [as_score(value) for value in values]


def turn(role: str, content: str) -> Turn:
    """A message as TRL writes it."""
    return {"role": role, "content": content}


def as_score(value: object) -> Score | Refusal:
    """Turn what a function returned for one completion into a score, or say why it is none.

    Whatever converts to one float counts as a number: numpy and torch scalars, also on a graph, and
    bool (a comparison). None, text, NaN, infinities and numbers beyond a million are refused, and
    so is a verdict that is not a bool: "no" and NaN are true to Python.
    """
    if not isinstance(value, Score):
        number = _as_number(value)
        return number if isinstance(number, Refusal) else Score(number, number == 1.0)
    number = _as_number(value.reward)
    if isinstance(number, Refusal):
        return number
    if not isinstance(value.passed, bool):
        got = type(value.passed).__name__
        return Refusal(f"passed must be True or False, got {got}: wrap it in bool(…)")
    if not isinstance(value.parts, Mapping) or len(value.parts) > MAX_PARTS:
        return Refusal(f"parts must be a mapping of at most {MAX_PARTS} numbers")
    parts: dict[str, float] = {}
    for key, part in value.parts.items():
        converted = _as_number(part)
        if isinstance(converted, Refusal):
            return Refusal(f"part {str(key)[:40]!r} {converted.reason}")
        parts[str(key)[:40]] = converted
    return Score(number, value.passed, parts)


def _as_list(returned: object) -> list[object] | None:
    if isinstance(returned, str | bytes | Mapping | set):
        return None
    if not (isinstance(returned, Sized) and isinstance(returned, Iterable)):
        return None
    try:
        return list(returned)
    except TypeError:  # a tensor or array without dimensions has a length only in name
        return None


def _as_number(value: object) -> float | Refusal:
    if isinstance(value, str | bytes) or not isinstance(value, SupportsFloat):
        return Refusal(f"must be a number, got {type(value).__name__}")
    try:
        number = float(value)
    except (OverflowError, TypeError, ValueError, RuntimeError) as error:
        return Refusal(f"must be a number, got {type(value).__name__} ({error})")
    if not math.isfinite(number):
        return Refusal(f"must be a finite number, got {number}")
    if abs(number) > MAX_REWARD:
        return Refusal(f"must lie within ±{MAX_REWARD:g}, got {number:g}")
    return number
