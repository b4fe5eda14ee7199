"""What a stage says while it runs: a plain line per step, and a small file for `packtrain status`.

    stage=sft step=20 total=120 loss=1.934 seconds=14.2 eta_seconds=71

The live panel of `packtrain run` reads the files, never these lines.
"""

from __future__ import annotations

import json
import math
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from ground.logs import redact

_ESCAPES = re.compile(
    r"""
      \x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?   # OSC: titles, links, clipboard
    | \x1b[PX^_][^\x1b]*(?:\x1b\\)?        # DCS, SOS, PM, APC
    | \x1b\[[0-?]*[ -/]*[@-~]?             # CSI: colours, cursor
    | \x1b[ -/]*[0-~]?                     # other two-byte escapes
    """,
    re.VERBOSE,
)
_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # all but tab and newline
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"  # marks that reorder text
)


def progress(directory: Path, step: int, total: int, **numbers: float) -> None:
    """Tell how far the stage of this directory is: progress.json and one line on stdout.

    The file remembers when this process began, so that time left can be told; it is replaced in one
    step, but not synced: after a crash it may be old, never torn.
    """
    now = time.time()
    began, first_step = _beginning(directory / "progress.json", now, step)
    elapsed = now - began
    num_done = step - first_step
    eta = elapsed / num_done * (total - step) if num_done > 0 else None
    values = {name: float(f"{value:.6g}") for name, value in numbers.items()}
    where: dict[str, object] = {"stage": directory.name, "step": step, "total": total}
    clock = {"seconds": round(elapsed, 1), "eta_seconds": None if eta is None else round(eta, 1)}
    line = {**where, **values, **clock}
    say(" ".join(f"{name}={value}" for name, value in line.items() if value is not None))
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    own = {"pid": os.getpid(), "began": began, "first_step": first_step}
    replace_text(directory / "progress.json", json.dumps({**where, **finite, **clock, **own}))


def reporter(directory: Path, every_seconds: float = 2.0) -> Callable[[int, int], None]:
    """A callback (done, total) for loops that are faster than anyone can read.

    It tells the `progress` of this directory at most every few seconds, and at the end.
    """
    told = -math.inf

    def report(done: int, total: int) -> None:
        nonlocal told
        if done == total or time.monotonic() - told >= every_seconds:
            told = time.monotonic()
            progress(directory, done, total)

    return report


def say(text: str) -> None:
    """One line to stdout, without secrets or control characters; a closed pipe is no error."""
    try:
        sys.stdout.write(plain_text(redact(text)) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        pass


def plain_text(text: str) -> str:
    """Text that cannot move a cursor, change colours, set a title or reorder what is around it.

    Example:
        "\\x1b[31mred\\x1b[0m\\x07" → "red"
    """
    return _CONTROLS.sub("", _ESCAPES.sub("", text))


def replace_text(file: Path, text: str) -> None:
    """Replace a small file in one step; not synced: after a crash it may be old, never torn."""
    beside = file.with_name(f".{file.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(file)


def _beginning(file: Path, now: float, step: int) -> tuple[float, int]:
    """(when, at which step) this process made its first report here."""
    try:
        earlier = json.loads(file.read_text(encoding="utf-8"))
        if earlier["pid"] == os.getpid() and earlier["first_step"] <= step:
            return float(earlier["began"]), int(earlier["first_step"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # no report yet, or not one of ours
    return now, step
