"""Named points at which a fault can be made to happen, so that a test breaks what it wants to.

    faults.point("gen.mid")  ─ unarmed: one attribute test ─▶ on
                             └ armed: nth passage of this role? ─▶ logged ─▶ killed, stopped, …

The points are compiled in always and armed by the environment alone, which all our processes
inherit; a process takes part once it has said who it is:

    broken = Faults(folder).at("rollout/0", "gen.mid", nth=3).do(kill9)
    subprocess.Popen(…, env=os.environ | broken.environment());  broken.wait(seconds=60)

A fault fires once over all lives of its role (a marker file in the folder), unless told to fire
more often, and it is written to the folder's log before it strikes.
"""

from __future__ import annotations

import json
import logging
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TypeVar

from ground.strikes import Action, damage, kill9, strike

VARIABLE = "PACKTRAIN_FAULTS"
"""The plan as JSON, or `@` and the path of a file with it, which may come later or never."""

POINTS: tuple[tuple[str, str], ...] = (
    ("learner", "publish.copy"),
    ("keeper", "keep"),
    ("rollout", "open"),
    ("rollout", "gen.begin"),
    ("rollout", "gen.mid"),
    ("rollout", "gen.scored"),
    ("rollout", "weights.fetch"),
    ("rollout", "weights.load"),
    ("rollout", "weights.loaded"),
    ("courier", "weights.taken"),
    ("courier", "weights.send"),
    ("rollout", "ping"),
    ("reward", "score"),
    ("judge", "judge.open"),
    ("judge", "judge.score"),
    ("engine", "engine.open"),
    ("engine", "engine.sample"),
    ("engine", "engine.score"),
    ("supervisor", "life.begin"),
    ("supervisor", "report"),
    ("supervisor", "sweep"),
    ("controller", "draw"),
    ("controller", "settle"),
    ("controller", "plan"),
    ("learner", "plan.received"),
    ("learner", "journal.staged"),
    ("learner", "journal.written"),
    ("learner", "step.forward"),
    ("learner", "step.behavior"),
    ("learner", "step.backward"),
    ("learner", "step.applied"),
    ("learner", "publish.begin"),
    ("learner", "publish.kept"),
    ("controller", "publish.begin"),
    ("controller", "publish.handed"),
    ("controller", "publish.freed"),
    ("learner", "publish.done"),
    ("learner", "score.recorded"),
    ("learner", "best.staged"),
    ("learner", "best.kept"),
    ("controller", "state"),
    ("learner", "cut.staged"),
    ("learner", "cut.committed"),
    ("learner", "export"),
)
"""(kind of role, name) of every point in the code, in the order of the loop."""

_LOG = "fired.jsonl"
_POLL_SECONDS = 0.02

logger = logging.getLogger(__name__)

Value = TypeVar("Value")


@dataclass(frozen=True, slots=True)
class Fault:
    """When, where and what.

    Example:
        Fault("rollout/0", "gen.mid", nth=3, action=kill9, times=1)
    """

    role: str
    """A role, or a pattern such as `rollout/*`."""
    point: str
    nth: int
    """It strikes at this passage of a process's life, counted from 1, and the ones after it."""
    action: Action
    times: int = 1
    """Strikes in all, over all lives of all processes that the role stands for."""


@dataclass(frozen=True, slots=True)
class Firing:
    """A line of the log: a fault that struck."""

    role: str
    point: str
    action: str
    pid: int
    time: float
    """Unix seconds."""


@dataclass(frozen=True, slots=True)
class Faults:
    """A plan of faults, and what has become of it.

    Example:
        Faults(tmp_path).at("learner", "step.applied", nth=4).do(kill9).environment()
    """

    folder: Path
    """For the log and the markers; exists, on a file system that all processes see."""
    faults: tuple[Fault, ...] = ()

    def at(self, role: str, point: str, nth: int = 1) -> Place:
        """Name a point; `do` adds the fault."""
        kind = role.partition("/")[0]
        if not any(name == point and fnmatchcase(known, kind) for known, name in POINTS):
            raise ValueError(f"{kind} must have a point {point!r}; its points: {_points_of(kind)}")
        if nth < 1:
            raise ValueError(f"passages are counted from 1, got {nth}")
        return Place(self, role, point, nth)

    def environment(self) -> dict[str, str]:
        """What arms it."""
        faults = [asdict(fault) for fault in self.faults]
        return {VARIABLE: json.dumps({"folder": str(self.folder), "faults": faults})}

    def fired(self) -> list[Firing]:
        """What has struck so far, oldest first."""
        try:
            lines = (self.folder / _LOG).read_text().splitlines()
        except FileNotFoundError:
            return []
        return [Firing(**json.loads(line)) for line in lines]

    def wait(self, seconds: float, count: int = 1) -> list[Firing]:
        """Return once so many faults have struck.

        Raises:
            TimeoutError: they have not.
        """
        deadline = time.monotonic() + seconds
        while len(fired := self.fired()) < count:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"{count} of {self.faults} must strike in {seconds:g} s, got {fired}"
                )
            time.sleep(_POLL_SECONDS)
        return fired


@dataclass(frozen=True, slots=True)
class Place:
    """A point of a plan that waits for its action."""

    plan: Faults
    role: str
    point: str
    nth: int

    def do(self, action: Action, times: int = 1) -> Faults:
        """The plan with this fault added."""
        fault = Fault(self.role, self.point, self.nth, action, times)
        return Faults(self.plan.folder, (*self.plan.faults, fault))


def chaos(
    seed: int,
    folder: Path,
    *,
    points: Sequence[tuple[str, str]] | None = None,
    actions: Sequence[Action] = (kill9,),
    max_nth: int = 4,
) -> Faults:
    """A plan with one fault at random, the same one for the same seed; says which.

    Args:
        points: (role, point) to choose from; all of `POINTS` when left out, `rollout` as worker 0.
    """
    chance = random.Random(seed)
    known = points or [(_first(kind), name) for kind, name in POINTS]
    role, point = chance.choice(list(known))
    nth, action = chance.randint(1, max_nth), chance.choice(list(actions))
    logger.warning("chaos %d: %s at %s, passage %d: %s", seed, role, point, nth, action.name)
    return Faults(folder).at(role, point, nth).do(action)


class _Armed:
    """The faults of this process's role, and how often it has passed their points."""

    def __init__(self, role: str, folder: Path, faults: Mapping[int, Fault]) -> None:
        self._role, self._folder, self._faults = role, folder, faults
        self._passed: Counter[str] = Counter()
        self._lock = threading.Lock()

    def due(self, name: str) -> list[Fault]:
        """Count a passage; the faults that strike at it, already in the log."""
        with self._lock:
            self._passed[name] += 1
            return [
                fault
                for number, fault in self._faults.items()
                if fault.point == name
                and self._passed[name] >= fault.nth
                and self._claim(number, fault)
            ]

    def _claim(self, number: int, fault: Fault) -> bool:
        """Take one of the fault's strikes, if this or another process has not taken all."""
        for turn in range(fault.times):
            try:
                (self._folder / f"fault-{number}.{turn}").touch(exist_ok=False)
            except FileExistsError:
                continue
            self._log(fault)
            return True
        return False

    def _log(self, fault: Fault) -> None:
        firing = Firing(self._role, fault.point, fault.action.name, os.getpid(), time.time())
        with (self._folder / _LOG).open("a") as log:
            log.write(json.dumps(asdict(firing)) + "\n")


class _Here:
    """This process; `armed` is None in every process that nobody wants to break."""

    __slots__ = ("armed",)

    def __init__(self) -> None:
        self.armed: _Armed | None = None


_here = _Here()


def enter(role: str) -> None:
    """Say who this process is: supervisor, controller, learner, keeper, rollout/<n> or reward."""
    plan = json.loads(_plan() or "{}")
    faults = {
        number: Fault(**{**fault, "action": Action(**fault["action"])})
        for number, fault in enumerate(plan.get("faults", ()))
        if fnmatchcase(role, fault["role"])
    }
    _here.armed = _Armed(role, Path(plan["folder"]), faults) if faults else None
    if faults:
        logger.warning("%s is armed with faults: %s", role, list(faults.values()))


def point(name: str) -> None:
    """A place where this process may be made to fail."""
    if _here.armed is not None:
        for fault in _here.armed.due(name):
            strike(fault.action)


def corrupted(name: str, value: Value) -> Value:
    """A point that a value passes; returns it as it is, or a damaged copy."""
    if _here.armed is not None:
        for fault in _here.armed.due(name):
            value = damage(fault.action, value)
    return value


def _plan() -> str:
    text = os.environ.get(VARIABLE, "")
    if not text.startswith("@"):
        return text
    path = Path(text[1:])
    return path.read_text() if path.exists() else ""


def _first(kind: str) -> str:
    return f"{kind}/0" if kind in ("rollout", "judge", "engine") else kind


def _points_of(kind: str) -> list[str]:
    return [name for known, name in POINTS if fnmatchcase(known, kind)]
