"""Faults strike where and when they are told to, once, and cost nothing unless armed."""

from __future__ import annotations

import ast
import os
import signal
import subprocess
import sys
import timeit
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from ground import faults
from ground.errors import InfraError
from ground.faults import POINTS, Faults, chaos
from ground.strikes import (
    Action,
    Unpicklable,
    corrupt,
    delay,
    enospc,
    hang_gil,
    kill9,
    raise_,
    segv,
    stop,
)

ROOT = Path(__file__).parents[1]
PASSES = """
import signal
from ground import faults
signal.signal(signal.SIGUSR1, lambda *_: None)
faults.enter({role!r})
for _ in range({count}):
    faults.point("gen.mid")
print("whole")
"""


@pytest.fixture(autouse=True)
def disarmed() -> Iterator[None]:
    """Whatever a test armed in this very process is gone afterwards."""
    yield
    os.environ.pop(faults.VARIABLE, None)
    faults.enter("test")


def arm(plan: Faults, role: str = "rollout/0") -> None:
    os.environ.update(plan.environment())
    faults.enter(role)


def live(plan: Faults, role: str = "rollout/0", count: int = 5) -> subprocess.Popen[str]:
    """A process that passes `gen.mid` a few times."""
    return subprocess.Popen(
        [sys.executable, "-c", PASSES.format(role=role, count=count)],
        cwd=ROOT,
        env=os.environ | plan.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


def ended(process: subprocess.Popen[str]) -> tuple[int, bool]:
    output, _ = process.communicate(timeout=20)
    return process.returncode, "whole" in output


def points_in_the_code() -> set[str]:
    """Names that are passed to `faults.point` and `faults.corrupted`."""
    return {
        ast.literal_eval(node.args[0])
        for room in ("ground", "rollout", "rl", "curation", "sft", "dpo", "packtrain")
        for path in (ROOT / room).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("faults.point", "faults.corrupted")
    }


def test_the_list_of_points_is_that_of_the_code() -> None:
    assert {name for _, name in POINTS} == points_in_the_code()
    assert len(set(POINTS)) == len(POINTS)
    kinds = {"supervisor", "controller", "learner", "keeper", "rollout", "reward"}
    kinds |= {"judge", "engine", "courier"}
    assert {kind for kind, _ in POINTS} <= kinds


@pytest.mark.parametrize(("action", "number"), [(kill9, signal.SIGKILL), (segv, signal.SIGSEGV)])
def test_a_fault_ends_its_process_once_over_all_lives(
    tmp_path: Path, action: Action, number: int
) -> None:
    plan = Faults(tmp_path).at("rollout/0", "gen.mid", nth=3).do(action)
    assert ended(live(plan, count=2)) == (0, True)
    assert ended(live(plan, role="rollout/1")) == (0, True)
    assert plan.fired() == []
    assert ended(live(plan)) == (-number, False)
    [firing] = plan.fired()
    assert (firing.role, firing.point, firing.action) == ("rollout/0", "gen.mid", action.name)
    assert ended(live(plan)) == (0, True)
    assert len(plan.fired()) == 1


def test_a_fault_strikes_as_often_as_it_is_told_to(tmp_path: Path) -> None:
    plan = Faults(tmp_path).at("rollout/*", "gen.mid").do(kill9, times=2)
    codes = [ended(live(plan, role=f"rollout/{number}"))[0] for number in range(3)]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert [firing.role for firing in plan.fired()] == ["rollout/0", "rollout/1"]


def test_a_stopped_process_stands_still_until_it_is_continued(tmp_path: Path) -> None:
    plan = Faults(tmp_path).at("rollout/0", "gen.mid", nth=2).do(stop)
    process = live(plan)
    [firing] = plan.wait(seconds=20)
    os.waitid(os.P_PID, process.pid, os.WSTOPPED | os.WNOWAIT)
    assert firing.pid == process.pid and process.poll() is None
    os.kill(process.pid, signal.SIGCONT)
    assert ended(process) == (0, True)


def test_a_native_deadlock_holds_python_but_not_a_fatal_signal(tmp_path: Path) -> None:
    plan = Faults(tmp_path).at("rollout/0", "gen.mid").do(hang_gil)
    process = live(plan)
    plan.wait(seconds=20)
    process.send_signal(signal.SIGUSR1)  # a signal that is handled ends a sleep, not a deadlock
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    process.kill()
    assert ended(process) == (-signal.SIGKILL, False)


def test_what_an_armed_point_raises(tmp_path: Path) -> None:
    plan = (
        Faults(tmp_path)
        .at("rollout/0", "gen.begin").do(raise_("InfraError"))
        .at("rollout/0", "gen.mid").do(raise_("MemoryError"))
        .at("rollout/0", "gen.scored").do(enospc)
        .at("rollout/0", "ping").do(raise_("Unpicklable"))
        .at("rollout/0", "weights.load").do(delay(0.05))
    )  # fmt: skip
    arm(plan)
    for point, kind in (("gen.begin", InfraError), ("gen.mid", MemoryError), ("ping", Unpicklable)):
        with pytest.raises(kind):
            faults.point(point)
    with pytest.raises(OSError, match="No space left on device"):
        faults.point("gen.scored")
    assert timeit.timeit(lambda: faults.point("weights.load"), number=1) >= 0.05
    assert [firing.point for firing in plan.fired()] == [
        "gen.begin", "gen.mid", "ping", "gen.scored", "weights.load"
    ]  # fmt: skip


def test_values_are_damaged_in_a_copy(tmp_path: Path) -> None:
    good = {"a": np.array([1.0, 2.0]), "b": np.array([3.0, 4.0]), "c": np.array([5.0])}
    seen = {}
    for how, only in (("scale", "b"), ("nan", ""), ("zero", "c"), ("swap", "")):
        folder = tmp_path / how
        folder.mkdir()
        arm(Faults(folder).at("rollout/0", "weights.loaded").do(corrupt(how, only)))
        bad = faults.corrupted("weights.loaded", good)
        seen[how] = {name: value.tolist() for name, value in bad.items()}
        assert faults.corrupted("weights.loaded", good) is good
    assert seen["scale"]["b"] == pytest.approx([3.03, 4.04]) and seen["scale"]["a"] == [1, 2]
    assert seen["zero"] == {"a": [1, 2], "b": [3, 4], "c": [0]}
    assert seen["swap"] == {"a": [3, 4], "b": [1, 2], "c": [5]}
    assert np.isnan(seen["nan"]["a"][0]) and seen["nan"]["a"][1] == 2
    assert {name: value.tolist() for name, value in good.items()}["a"] == [1, 2]


def test_bytes_and_numbers_are_damaged_too(tmp_path: Path) -> None:
    place = Faults(tmp_path).at("rollout/0", "weights.loaded")
    arm(place.do(corrupt("flip")).at("rollout/0", "weights.loaded").do(corrupt("flip")))
    assert faults.corrupted("weights.loaded", b"abc") == b"abc"  # two flips of the same bit
    again = tmp_path / "again"
    again.mkdir()
    arm(Faults(again).at("rollout/0", "weights.loaded").do(corrupt("flip"), times=2))
    assert faults.corrupted("weights.loaded", b"abc") == b"acc"
    assert faults.corrupted("weights.loaded", b"ab") == b"ac"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda plan: plan.at("rollout/0", "gen.midd"), "must have a point 'gen.midd'"),
        (lambda plan: plan.at("learner", "gen.mid"), "learner must have a point"),
        (lambda plan: plan.at("rollout/0", "gen.mid", nth=0), "counted from 1, got 0"),
        (lambda plan: raise_("NoSuchError"), "an error of this name, got 'NoSuchError'"),
        (lambda plan: corrupt("melt"), "damage must be one of .* got 'melt'"),
    ],
)
def test_a_plan_that_could_never_strike_is_refused(
    tmp_path: Path, make: object, message: str
) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make(Faults(tmp_path))


def test_waiting_for_a_fault_that_never_strikes_says_which(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"gen\.mid"):
        Faults(tmp_path).at("rollout/0", "gen.mid").do(kill9).wait(seconds=0.05)


def test_chaos_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    plans = [chaos(seed, tmp_path, actions=(kill9, stop)) for seed in range(40)]
    assert plans == [chaos(seed, tmp_path, actions=(kill9, stop)) for seed in range(40)]
    struck = {(fault.role.partition("/")[0], fault.point) for p in plans for fault in p.faults}
    assert len(struck) > len(POINTS) / 3 and struck <= set(POINTS)
    assert {fault.action for p in plans for fault in p.faults} == {kill9, stop}


def test_an_unarmed_point_costs_less_than_a_tenth_of_a_microsecond() -> None:
    faults.enter("rollout/0")
    seconds = min(timeit.repeat(lambda: faults.point("gen.mid"), number=20_000, repeat=7)) / 20_000
    nothing = min(timeit.repeat(lambda: None, number=20_000, repeat=7)) / 20_000
    assert seconds - nothing < 100e-9
