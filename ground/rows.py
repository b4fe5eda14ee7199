"""One row of a table to one Prompt or Demonstration, and back; explicit types, no guessing.

Accepted shapes, those of TRL among them:
  demonstration  messages: […]  |  prompt: text or messages, completion: text or messages
  prompt         messages: […]  |  prompt: text or messages        (a completion is not read)
Further columns: id, capability, reward, answer, difficulty; `meta_…` columns are left alone, any
other column is refused. `data.columns` renames columns, `data.defaults` fills missing ones.
"""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import asdict

from ground.config import Column, Data
from ground.jsonl import RowError, kind_of
from ground.records import (
    LABELS,
    Demonstration,
    Difficulty,
    Label,
    Message,
    Prompt,
    Role,
    content_id,
)
from ground.validation import suggest

GENERAL = "general"
"""Capability of rows that name none."""
COLUMNS: tuple[str, ...] = typing.get_args(Column)
_OURS = {"id", "messages", "capability", "reward", "answer", "difficulty"}
_ROLES: tuple[str, ...] = typing.get_args(Role)
_MESSAGE_KEYS = ("role", "content")
_DIFFICULTY_KEYS = ("label", "score", "judged_by", "successes", "trials", "version")

Row = Mapping[str, object]


def prompt_of(row: Row, data: Data) -> Prompt:
    """Read a prompt.

    Raises:
        RowError: a column is missing, unknown, or of the wrong type.
    """
    columns = _our_columns(row, data)
    messages = _conversation(columns, data)
    if messages[-1].role == "assistant":
        raise RowError("a prompt must end with the user's message, it ends with the assistant's")
    made = Prompt.make(
        messages,
        capability=_text(columns, "capability", GENERAL),
        reward=_text(columns, "reward", None),
        answer=_text(columns, "answer", None, may_be_empty=True),
        difficulty=_difficulty(columns.get("difficulty")),
    )
    own = _text(columns, "id", made.id)
    return Prompt(own, messages, made.capability, made.reward, made.answer, made.difficulty)


def demonstration_of(row: Row, data: Data) -> Demonstration:
    """Read a demonstration, whose last message is the assistant's.

    Raises:
        RowError: a column is missing, unknown, or of the wrong type.
    """
    columns = _our_columns(row, data)
    messages = _conversation(columns, data)
    if columns.get("prompt") is not None:
        if columns.get("completion") is None:
            raise RowError(_missing("completion", data))
        messages += _messages(columns["completion"], "completion", "assistant")
    if messages[-1].role != "assistant":
        last = messages[-1].role
        raise RowError(f"a demonstration must end with the assistant's message, not the {last}'s")
    reward = _text(columns, "reward", "", may_be_empty=True)
    answer = _text(columns, "answer", "", may_be_empty=True)
    return Demonstration(
        id=_text(columns, "id", content_id(messages, reward, answer)),
        messages=messages,
        capability=_text(columns, "capability", GENERAL),
        reward=reward,
        answer=answer,
        difficulty=_difficulty(columns.get("difficulty")),
    )


def row_of(record: Prompt | Demonstration) -> dict[str, object]:
    """The row that reads back as `record`."""
    row: dict[str, object] = asdict(record)
    return row | {"messages": [asdict(message) for message in record.messages]}


def _our_columns(row: Row, data: Data) -> dict[str, object]:
    """Columns under our names: renamed, filled from the defaults, unknown ones refused.

    A row with all our columns was written by a stage of ours: there is nothing to rename in it.
    """
    renamed = {} if set(row) >= _OURS else data.columns
    ours: dict[str, object] = {**data.defaults}
    taken = set(renamed.values())
    for name, value in row.items():
        if name in taken or name.startswith("meta_"):
            continue
        if name not in COLUMNS:
            near = suggest(name, COLUMNS) or "; prefix it with meta_ or rename it in data.columns"
            raise RowError(f"'{name}' is not a column{near}")
        if value is not None or name not in ours:
            ours[name] = value
    for name, theirs in renamed.items():
        if row.get(theirs) is not None or (theirs in row and name not in ours):
            ours[name] = row[theirs]
    return {name: value for name, value in ours.items() if value is not None or name in _WANTED}


_WANTED = ("messages", "prompt", "reward", "answer")
"""Columns whose null is an error rather than an absence."""


def _missing(name: str, data: Data) -> str:
    source = data.columns.get(typing.cast(Column, name))
    return f"{name} is missing" + (f" (data.columns reads it from '{source}')" if source else "")


def _conversation(columns: Row, data: Data) -> tuple[Message, ...]:
    """The messages of `messages` or of `prompt`."""
    given = [name for name in ("messages", "prompt") if columns.get(name) is not None]
    if len(given) == 2:
        raise RowError("a row has either messages or prompt, this one has both")
    if not given:
        null = [name for name in ("messages", "prompt") if name in columns]
        what = f"{null[0]} is null" if null else _missing("prompt", data)
        raise RowError(what + ("" if null else "; a row has messages, or a prompt"))
    messages = _messages(columns[given[0]], given[0], "user")
    if not any(message.role == "user" for message in messages):
        raise RowError(f"{given[0]} holds no message of the user")
    return messages


def _messages(value: object, name: str, role: Role) -> tuple[Message, ...]:
    """Text as one message of `role`, or a list of messages."""
    if isinstance(value, str):
        return (Message(role, _checked_text(value, name)),)
    if not isinstance(value, list):
        raise RowError(f"{name} must be text or a list of messages, got {kind_of(value)}")
    if not value:
        raise RowError(f"{name} is an empty list")
    messages = tuple(_message(item, f"{name}[{index}]") for index, item in enumerate(value))
    for index, message in enumerate(messages[1:], start=1):
        if message.role == "system":
            raise RowError(f"{name}[{index}]: a system message must be the first")
    return messages


def _message(value: object, name: str) -> Message:
    if not isinstance(value, dict):
        raise RowError(f"{name} must be an object with role and content, got {kind_of(value)}")
    present = {key: item for key, item in value.items() if item is not None}
    for key in present:
        if key not in _MESSAGE_KEYS:
            raise RowError(f"{name}: '{key}' is not a key{suggest(str(key), _MESSAGE_KEYS)}")
    for key in _MESSAGE_KEYS:
        if key not in present:
            raise RowError(f"{name}.{key} is {'null' if key in value else 'missing'}")
    role = _one_of(present["role"], _ROLES, f"{name}.role")
    content = present["content"]
    if not isinstance(content, str):
        raise RowError(f"{name}.content must be text, got {kind_of(content)}")
    return Message(typing.cast(Role, role), _checked_text(content, f"{name}.content"))


def _text(columns: Row, name: str, default: str | None, *, may_be_empty: bool = False) -> str:
    """A text column; without it the default, or an error where there is none."""
    value = columns.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        fix = f"add the column, or set data.defaults.{name}" if name == "reward" else ""
        what = f"{name} is null" if name in columns else f"{name} is missing"
        raise RowError(f"{what}; {fix}" if fix else what)
    if not isinstance(value, str):
        raise RowError(f"{name} must be text, got {kind_of(value)}")
    return _checked_text(value, name, may_be_empty=may_be_empty)


def _checked_text(text: str, name: str, *, may_be_empty: bool = False) -> str:
    if not may_be_empty and not text.strip():
        raise RowError(f"{name} is empty")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = f"\\u{ord(text[error.start]):04x}"
        raise RowError(f"{name} holds half a surrogate pair ({code}), which is no text") from None
    return text


def _difficulty(value: object) -> Difficulty | None:
    if value is None:
        return None
    if not isinstance(value, dict):
        raise RowError(f"difficulty must be an object, got {kind_of(value)}")
    for key in value:
        if key not in _DIFFICULTY_KEYS:
            near = suggest(str(key), _DIFFICULTY_KEYS)
            raise RowError(f"difficulty: '{key}' is not a key{near}")
    label, judged_by = value.get("label"), value.get("judged_by")
    if not isinstance(judged_by, (str, type(None))):
        raise RowError(f"difficulty.judged_by must be text, got {kind_of(judged_by)}")
    if label is not None:
        label = _one_of(label, LABELS, "difficulty.label")
    successes, trials, version = (
        _count(value.get(key), key) for key in ("successes", "trials", "version")
    )
    if successes > trials:
        raise RowError(f"difficulty: {successes} successes in {trials} trials")
    score = _score(value.get("score"))
    return Difficulty(
        typing.cast(Label | None, label), score, judged_by or "", successes, trials, version
    )


def _one_of(value: object, known: tuple[str, ...], name: str) -> str:
    if value in known:
        return str(value)
    near = suggest(value, known) if isinstance(value, str) else ""
    raise RowError(f"{name} must be one of {', '.join(known)}, got {kind_of(value)}{near}")


def _count(value: object, key: str) -> int:
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise RowError(f"difficulty.{key} must be a count, got {kind_of(value)}")
    return value


def _score(value: object) -> float | None:
    if value is None:
        return None
    if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1:
        return float(value)
    raise RowError(f"difficulty.score must be a number from 0 to 1, got {kind_of(value)}")
