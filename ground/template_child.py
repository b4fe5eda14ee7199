"""Renders one chat template in a process of its own, under limits that the kernel enforces.

A template comes with the model, so it is hostile: the Jinja sandbox keeps it from Python objects,
but not from `{{ 'a' * 10**9 }}` or from loops within loops. `ground.chat` runs this file as a
child, sends one JSON request on stdin and reads one JSON reply from stdout. It imports nothing of
packtrain or of transformers, so that it starts in about 0.1 s.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from collections.abc import Callable
from datetime import datetime
from typing import cast

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_MEMORY_BYTES = 512 * 2**20
MAX_CPU_SECONDS = 5
MAX_OUTPUT_CHARACTERS = 1_000_000
TODAY = datetime(2025, 4, 5)
"""What `strftime_now` says: a prompt must not depend on the day it is rendered."""


def main() -> int:
    """Read a request, render, answer {"text": …} or {"error": …}."""
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (MAX_CPU_SECONDS, MAX_CPU_SECONDS + 1))
    request = json.load(sys.stdin)
    try:
        reply = {"text": render(request["template"], request["variables"])}
    except MemoryError:
        reply = {"error": f"it needs more than {MAX_MEMORY_BYTES // 2**20} MiB"}
    except RecursionError:
        reply = {"error": "it is nested too deeply"}
    except Exception as error:  # the template's own fault, whatever it is
        reply = {"error": f"{type(error).__name__}: {error}"[:500]}
    sys.stdout.write(json.dumps(reply))
    return 0


def render(template: str, variables: dict[str, object]) -> str:
    """The text of a template, cut off with an error when it grows too long."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = cast(Callable[..., str], TODAY.strftime)
    pieces: list[str] = []
    length = 0
    for piece in environment.from_string(_without_generation_tags(template)).generate(**variables):
        length += len(piece)
        if length > MAX_OUTPUT_CHARACTERS:
            raise ValueError(f"it writes more than {MAX_OUTPUT_CHARACTERS} characters")
        pieces.append(piece)
    return "".join(pieces)


def _without_generation_tags(template: str) -> str:
    """Keep what `{% generation %}` encloses; the mask comes from the split at contents instead."""
    opened = re.sub(r"\{%([-+]?)\s*generation\s*([-+]?)%\}", r"{%\1 if true \2%}", template)
    return re.sub(r"\{%([-+]?)\s*endgeneration\s*([-+]?)%\}", r"{%\1 endif \2%}", opened)


def _tojson(value: object, indent: int | None = None, ensure_ascii: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


if __name__ == "__main__":
    sys.exit(main())
