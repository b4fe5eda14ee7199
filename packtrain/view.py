"""`packtrain view`: page through what pruning kept and dropped and what RL asked and was answered.

    rows of the run's files ─▶ filters ─▶ lines ─▶ pager on a terminal, plain text into a pipe

Texts of models and data sets are hostile: they come without control characters and secrets, and
every line of theirs stands behind a bar, so that none can pass for a line of ours.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from curation.artefacts import Row, group_rows, judged_rows, rollouts_of
from ground.console import plain_text
from ground.errors import RecipeError
from ground.run import require_run
from ground.validation import suggest
from packtrain.pager import Line, show
from packtrain.samples import shorten

BAR = "│ "
FLAT = ("all-0", "all-1", "flat")
SECTIONS = ("dropped", "kept", "groups")


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which rows to show; what is empty or None asks for all.

    Example:
        Wanted(capability="math", fate="flat")
    """

    prompt: str = ""
    """Beginning of a prompt's or row's id."""
    capability: str = ""
    step: int | None = None
    fate: str = ""
    """flat or trained."""
    is_full: bool = False
    """Texts whole rather than shortened."""

    def takes(self, prompt_id: str, capability: str) -> bool:
        """Whether a row of this prompt and capability is asked for."""
        return prompt_id.startswith(self.prompt) and self.capability in ("", capability)

    @property
    def is_of_groups(self) -> bool:
        """Whether it asks for something that only groups have."""
        return self.step is not None or bool(self.fate)


def command(arguments: argparse.Namespace) -> int:
    """Show the sections that were asked for, or all that there are."""
    require_run(arguments.run)
    for name in arguments.what:
        if name not in SECTIONS:
            hint = suggest(name, SECTIONS) or f"; there are {', '.join(SECTIONS)}"
            raise RecipeError(f"'{name}' is nothing to view{hint}", fix="packtrain view --help")
    wanted = Wanted(
        arguments.prompt, arguments.capability, arguments.step, arguments.fate, arguments.full
    )
    names = arguments.what or (["groups"] if wanted.is_of_groups else SECTIONS)
    show(lines_of(arguments.run, names, wanted), sys.stdout)
    return 0


def lines_of(run: Path, names: Sequence[str], wanted: Wanted) -> Iterator[Line]:
    """All lines of some sections, read as they are asked for."""
    for name in names:
        rows = _groups(run, wanted) if name == "groups" else _rows(run, name, wanted)
        count, seen = 0, set[str]()
        for number, capability, lines in rows:
            seen.add(capability)
            if lines is not None:
                count = number
                yield from lines()
        yield from _closing(name, count, sorted(seen), wanted)


_Item = tuple[int, str, Callable[[], Iterator[Line]] | None]
"""How many were shown, this one's capability, and its lines; None when it is not wanted."""


def _rows(run: Path, name: str, wanted: Wanted) -> Iterator[_Item]:
    number = 0
    for row in judged_rows(run, [name]):
        if not wanted.takes(row["id"], row["capability"]):
            yield number, row["capability"], None
            continue
        number += 1
        yield number, row["capability"], lambda row=row, n=number: _row_lines(row, name, n, wanted)


def _row_lines(row: Row, name: str, number: int, wanted: Wanted) -> Iterator[Line]:
    score = "unjudged" if row["score"] is None else f"difficulty {row['score']:.2f}"
    heading = [f"{name} {number}", row["id"], row["capability"], row["label"], score]
    yield _heading(heading)
    yield _note(row["reason"])
    yield from _text("asked", row["question"], wanted)
    yield from _text("answer", row["answer"], wanted)
    yield Line("")


def _groups(run: Path, wanted: Wanted) -> Iterator[_Item]:
    number = 0
    for row in group_rows(run, wanted.step, answers=True):
        has_fate = {
            "": True,
            "flat": row["reason"] in FLAT,
            "trained": row["state"] == "trained",
        }[wanted.fate]
        if not (has_fate and wanted.takes(row["prompt_id"], row["capability"])):
            yield number, row["capability"], None
            continue
        number += 1
        yield number, row["capability"], lambda row=row: _group_lines(row, wanted)


def _group_lines(row: Row, wanted: Wanted) -> Iterator[Line]:
    fate = f"{row['state']}: {_FATES.get(row['reason'], row['reason'])}".removesuffix(": ")
    passed = f"{row['successes']} of {row['trials']} passed" if row["trials"] else "no answers"
    yield _heading([f"step {row['step']}", f"group {row['group']}", row["capability"], fate])
    yield _note(f"{passed}; drawn at version {row['opened_at']}, oldest token {row['version']}")
    yield from _text("system", row["system"], wanted)
    yield from _text("asked", row["question"], wanted)
    yield from _text("solution", row["answer"], wanted)
    for rollout in rollouts_of(row):
        yield from _rollout_lines(rollout, wanted)
    yield Line("")


_FATES = {"all-0": "all wrong", "all-1": "all right", "flat": "equal rewards"}


def _rollout_lines(rollout: Row, wanted: Wanted) -> Iterator[Line]:
    parts = {name: value for name, value in rollout.items() if name.startswith("part_")}
    facts = [
        f"{rollout['index']}",
        "passed" if rollout["passed"] else "failed",
        f"reward {_number(rollout['reward'])}",
        f"advantage {_number(rollout['advantage'], '+')}",
        *(f"{name.removeprefix('part_')} {_number(value)}" for name, value in parts.items()),
        f"{rollout['tokens']} tokens",
        "" if rollout["finish"] == "stop" else f"ended by {rollout['finish']}",
        rollout["error"],
    ]
    style = "good" if rollout["passed"] else "bad"
    yield Line("  " + "  ".join(_one_line(fact) for fact in facts if fact), style)
    yield from _behind_bar(rollout["text"], wanted)


def _closing(name: str, shown: int, capabilities: Sequence[str], wanted: Wanted) -> Iterator[Line]:
    """How many there were; why there were none."""
    if shown:
        yield Line(f"{shown} {_NOUNS[name]}", "dim")
    elif not capabilities:
        yield Line(f"no {_NOUNS[name]}: {_ABSENT[name]}", "dim")
    else:
        known = ", ".join(_one_line(each) for each in capabilities)
        yield Line(f"no {_NOUNS[name]} that match; capabilities here: {known}", "dim")
    yield Line("")


_NOUNS = {"kept": "rows kept", "dropped": "rows dropped", "groups": "groups"}
_ABSENT: Mapping[str, str] = {
    "kept": "prune has not written any",
    "dropped": "prune has not written any",
    "groups": "rl has not consumed any, or none at that step",
}


def _heading(parts: Sequence[str | None]) -> Line:
    return Line("── " + " · ".join(_one_line(part) for part in parts if part), "title")


def _note(text: str) -> Line:
    return Line(f"   {_one_line(text)}", "dim")


def _text(name: str, text: str, wanted: Wanted) -> Iterator[Line]:
    if text:
        yield Line(f"  {name}", "dim")
        yield from _behind_bar(text, wanted)


def _behind_bar(text: str, wanted: Wanted) -> Iterator[Line]:
    shown = text if wanted.is_full else shorten(text)
    yield from (Line(f"    {BAR}{line}") for line in shown.split("\n"))


def _one_line(text: str) -> str:
    return " ".join(plain_text(text).split())


def _number(value: float | None, sign: str = "") -> str:
    return "none" if value is None else f"{value:{sign}.2f}"
