"""Lines for a person to page through on a terminal; the same lines, plain, for a pipe."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TextIO

_CODES = {"title": "1", "dim": "2", "good": "32", "bad": "31"}
_LESS = "FRX"
"""Leave at once where all fits on one screen, show colours, keep the screen."""


@dataclass(frozen=True, slots=True)
class Line:
    """A line without control characters of its own.

    Example:
        Line("── step 3 · group 9c1f.14", "title")
    """

    text: str
    style: str = ""
    """title, dim, good or bad; empty for none."""


def show(lines: Iterable[Line], out: TextIO) -> None:
    """Page through lines where `out` is a terminal, write them where it is not.

    `PAGER` names another pager than less; where there is none, all is written at once. Lines are
    made as the reader gets to them.
    """
    if not out.isatty():
        out.writelines(f"{line.text}\n" for line in lines)
        return
    styled = (_styled(line, "NO_COLOR" not in os.environ) for line in lines)
    command = shlex.split(os.environ.get("PAGER", "less"))
    if command and shutil.which(command[0]):
        _page(command, styled)
    else:
        out.writelines(styled)


def _page(command: list[str], lines: Iterable[str]) -> None:
    environment = {"LESS": _LESS, "LESSCHARSET": "utf-8"} | os.environ
    pager = subprocess.Popen(
        command, stdin=subprocess.PIPE, env=environment, text=True, encoding="utf-8"
    )
    assert pager.stdin is not None
    try:
        pager.stdin.writelines(lines)
        pager.stdin.close()
    except (BrokenPipeError, KeyboardInterrupt):
        pass  # the reader has seen enough
    while True:
        try:
            pager.wait()
            return
        except KeyboardInterrupt:
            continue  # meant for the pager, which has the terminal


def _styled(line: Line, is_coloured: bool) -> str:
    code = _CODES.get(line.style) if is_coloured else None
    return f"\x1b[{code}m{line.text}\x1b[0m\n" if code else f"{line.text}\n"
