"""The loop of RL seen from outside: rl/loop.json, which its supervisor writes every second."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from ground.console import plain_text
from packtrain.observe import mapping, number, read_json, text

LOOP_FILE = "loop.json"
_OLD_SECONDS = 10.0
"""Beyond this age the file tells what was, not what is."""


def read_loop(run: Path) -> dict[str, object]:
    """What the loop said last; empty when there is none."""
    return read_json(run / "rl" / LOOP_FILE)


def loop_lines(loop: Mapping[str, object], now: float | None = None) -> list[str]:
    """The loop in words, a line for all and one for each worker.

    Example:
        rl: version 12; step 12 waits for slot 55 (group 9c1f.55), 4 s; 3 buffered, 5 in flight
          worker 0 healthy, version 12, 4 groups, life 2; lost before: a ping must be done …
    """
    now = time.time() if now is None else now
    parts = [f"version {_count(loop, 'version')}", _waiting(loop, now), _amounts(loop)]
    age = now - (number(loop.get("time")) or now)
    if age > _OLD_SECONDS:
        parts.append(f"as of {age:.0f} s ago")
    silent = number(loop.get("controller_silent_seconds")) or 0.0
    if silent > _OLD_SECONDS:
        parts.append(f"the controller has been silent for {silent:.0f} s")
    unmoved = number(loop.get("unmoved_seconds")) or 0.0
    if unmoved > _OLD_SECONDS:
        parts.append(f"nothing has moved for {unmoved:.0f} s")
    head = f"rl: {'; '.join(filter(None, parts))}"
    workers = loop.get("workers")
    seats = workers if isinstance(workers, Sequence) and not isinstance(workers, str) else []
    return [plain_text(line) for line in (head, *(_worker(mapping(seat)) for seat in seats))]


def _waiting(loop: Mapping[str, object], now: float) -> str:
    since = number(loop.get("since"))
    if text(loop.get("waits_for")) and since is not None:
        step = _count(loop, "step")
        return f"step {step} waits for {text(loop.get('waits_for'))}, {now - since:.0f} s"
    return f"the learner is to {text(loop.get('learner'))}" if loop.get("learner") else ""


def _amounts(loop: Mapping[str, object]) -> str:
    amounts = f"{_count(loop, 'buffered')} buffered, {_count(loop, 'in_flight')} in flight"
    failed = {
        name.removeprefix("reward_"): count
        for name, count in mapping(loop.get("verdicts")).items()
        if name.startswith("reward_") and number(count)
    }
    told = ", ".join(f"{name} {count}" for name, count in sorted(failed.items()))
    return amounts + (f"; verdicts that failed: {told}" if told else "")


def _worker(worker: Mapping[str, object]) -> str:
    state = (
        f"  {text(worker.get('name'))} {text(worker.get('state'))}, "
        f"version {_count(worker, 'version')}, {_count(worker, 'in_flight')} groups, "
        f"life {_count(worker, 'lives')}"
    )
    cause = text(worker.get("cause"))
    return state + (f"; lost before: {cause[:120]}" if cause else "")


def _count(record: Mapping[str, object], key: str) -> int:
    return int(number(record.get(key)) or 0)
