"""Logging of a process, with secrets removed from every record before any handler sees it.

Removed are tokens of known shape (Hugging Face, OpenAI and the like, GitHub, AWS, W&B),
Authorization headers, passwords in URLs, `name: value` pairs whose name speaks of a secret, and the
values of environment variables with such names.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from logging.handlers import RotatingFileHandler
from pathlib import Path

from ground.errors import SetupError
from ground.storage import replace_file

REDACTED = "[redacted]"
MAX_LOG_BYTES = 20_000_000

_LOG = logging.getLogger("packtrain")

_KNOWN_SHAPES = re.compile(
    r"""
      hf_[A-Za-z0-9]{16,}
    | api_org_[A-Za-z0-9]{16,}
    | sk-[A-Za-z0-9_-]{16,}
    | gh[pousr]_[A-Za-z0-9]{20,} | github_pat_[A-Za-z0-9_]{20,}
    | (?:AKIA|ASIA)[A-Z0-9]{16}
    | wandb_v1_[A-Za-z0-9_]{16,}
    | eyJ[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}\.[A-Za-z0-9_-]{10,}
    """,
    re.VERBOSE,
)
_HEADER = re.compile(
    r"(?i)(authorization[\"']?\s*[:=]\s*[\"']?)(?:(?:bearer|basic|token)\s+)?[^\s\"',}]+"
)
_BEARER = re.compile(r"(?i)\b(bearer\s+)[A-Za-z0-9._~+/=-]{8,}")
_URL_PASSWORD = re.compile(r"\b([a-z][a-z0-9+.-]*://)[^\s/@:]*:[^\s/@]+@")
_NAMED_VALUE = re.compile(
    r"""(?ix)
    ( (?:api[_-]?key | secret(?:[_-]?(?:access[_-]?)?key)? | password | passwd | credentials?
        | (?:access|auth|api|hub|hf)[_-]?token | wandb[^\s:=]{0,20}key)
      ["']? \s* [:=] \s* ["']? )
    [^\s"',}\[\]]{8,}
    """
)
_SECRET_VARIABLE = re.compile(r"(?i)token|secret|passw|credential|api_?key|access_?key|_key$|_pat$")
_LEAST_SECRET_LENGTH = 8


def setup_logging(file: Path, level: int = logging.INFO) -> None:
    """Send this process's log records to `file` (rotated), warnings to stderr too, all redacted."""
    install_redaction()
    file.parent.mkdir(parents=True, exist_ok=True)
    to_file = RotatingFileHandler(file, maxBytes=MAX_LOG_BYTES, backupCount=3, encoding="utf-8")
    to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    to_terminal = logging.StreamHandler()
    to_terminal.setLevel(logging.WARNING)
    to_terminal.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.setLevel(level)
    for handler in root.handlers[:]:
        root.removeHandler(handler)
        handler.close()
    root.addHandler(to_file)
    root.addHandler(to_terminal)


def install_redaction() -> None:
    """Make every log record of this process carry redacted text, whatever handler prints it."""
    logging.setLogRecordFactory(_redacted_record)


def redact(text: str) -> str:
    """The text with every secret replaced by [redacted].

    Example:
        "token hf_abcdefghijklmnopqrst used" → "token [redacted] used"
    """
    for value in _secret_values():
        text = text.replace(value, REDACTED)
    text = _HEADER.sub(rf"\1{REDACTED}", text)
    text = _BEARER.sub(rf"\1{REDACTED}", text)
    text = _URL_PASSWORD.sub(rf"\1{REDACTED}@", text)
    text = _KNOWN_SHAPES.sub(REDACTED, text)
    return _NAMED_VALUE.sub(rf"\1{REDACTED}", text)


@contextmanager
def raw_output_redacted(folder: Path, *patterns: str) -> Iterator[None]:
    """Remove the secrets from what processes wrote to their bare stdout and stderr.

    Such a file is open in the process itself, so that not even SIGKILL costs its last lines; it is
    gone over once the process is gone, at the end of the block. What a killed run of before could
    not go over is gone over at its beginning.

    Example:
        with raw_output_redacted(run.path / "log", "*.err"): learn()
    """
    _redact_files(folder, patterns)
    try:
        yield
    finally:
        _redact_files(folder, patterns)


def _redact_files(folder: Path, patterns: Sequence[str]) -> None:
    for path in sorted(file for pattern in patterns for file in folder.glob(pattern)):
        with path.open(encoding="utf-8", errors="surrogateescape", newline="") as lines:
            is_clean = all(redact(line) == line for line in lines)
        if not is_clean:
            _redact_file(path)


def _redact_file(path: Path) -> None:
    with (
        _failures_told(path),
        replace_file(path) as staging,
        path.open(encoding="utf-8", errors="surrogateescape", newline="") as lines,
        staging.open("w", encoding="utf-8", errors="surrogateescape", newline="") as out,
    ):
        out.writelines(redact(line) for line in lines)


@contextmanager
def _failures_told(path: Path) -> Iterator[None]:
    """A full disk here must not hide how the process ended."""
    try:
        yield
    except SetupError as error:
        _LOG.warning("secrets may be left in %s: %s", path, error)


def redact_tree(value: object) -> object:
    """A JSON-like value with its texts redacted, and whatever stands under a secret's name."""
    match value:
        case str():
            return redact(value)
        case dict():
            return {
                str(key): REDACTED if _hides(str(key), item) else redact_tree(item)
                for key, item in value.items()
            }
        case list() | tuple():
            return [redact_tree(item) for item in value]
        case _:
            return value


def _redacted_record(*args: object, **kwargs: object) -> logging.LogRecord:
    record = logging.LogRecord(*args, **kwargs)  # pyright: ignore[reportArgumentType]
    record.msg, record.args = redact(record.getMessage()), ()
    if record.exc_info:
        record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
    return record


def _secret_values() -> list[str]:
    """Values of environment variables that are named like secrets, longest first."""
    values = {
        value
        for name, value in os.environ.items()
        if _is_secret_name(name) and len(value) >= _LEAST_SECRET_LENGTH
    }
    return sorted(values, key=len, reverse=True)


@cache
def _is_secret_name(name: str) -> bool:
    return _SECRET_VARIABLE.search(name) is not None


def _hides(key: str, item: object) -> bool:
    """True for a long text under a key such as `api_key`; `eos_token: <|eot|>` stays readable."""
    return isinstance(item, str) and bool(_NAMED_VALUE.fullmatch(f"{key}: {item}"))
