"""Layouts of other people's data sets: recognised by their columns, read as our rows.

    TRL       messages  |  prompt, completion  |  prompt  |  [prompt,] chosen, rejected
    alpaca    instruction[, input], output[, system, history]
    ShareGPT  conversations: [{from, value}, …][, system]
    verl      prompt: [{role, content}, …], data_source, reward_model: {ground_truth}, ability
    Q and A   question, answer

A row becomes columns of ground/rows.py, by the strict readers there; what no stage reads is kept
beside it. Nothing is guessed: a value of another type than its layout's is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from ground.config import Data
from ground.jsonl import RowError, kind_of
from ground.records import Demonstration, Prompt
from ground.rows import Row, demonstration_of, prompt_of
from ground.validation import suggest

Kind = Literal["demonstration", "prompt"]


@dataclass(frozen=True, slots=True)
class Layout:
    """A way to lay out rows.

    Example:
        LAYOUTS["alpaca"].needs == {"instruction", "output"}
    """

    name: str
    needs: frozenset[str]
    """Columns by which it is recognised."""
    reads: frozenset[str]
    """Columns that it explains."""
    ours: Callable[[Row], dict[str, object]]
    """A row in our columns."""
    kind: Kind | None
    """None where the last message decides."""
    columns: Mapping[str, str] | None = None
    """The `data.columns` by which stages read it as it is; None where they cannot."""


@dataclass(frozen=True, slots=True)
class Taken:
    """A row as it was understood.

    Example:
        Taken(alpaca, "demonstration", {"messages": […]}, beside={"source": "x"})
    """

    layout: Layout
    kind: Kind
    row: dict[str, object]
    beside: dict[str, object]
    """Columns that no stage reads, the file's own `meta_…` among them."""

    @property
    def is_direct(self) -> bool:
        """Whether stages can read it without a conversion."""
        is_read = all(name.startswith("meta_") for name in self.beside)
        return self.layout.columns is not None and is_read

    def record(self, data: Data) -> Demonstration | Prompt:
        """What a stage would make of it.

        Raises:
            RowError: a column is missing or of the wrong type.
        """
        read = demonstration_of if self.kind == "demonstration" else prompt_of
        return read(self.row, data)


def take(row: Row) -> Taken:
    """Recognise a row and read it.

    Raises:
        RowError: no layout fits, or a value does not fit the layout.
    """
    layout = recognise(row)
    ours = layout.ours(row)
    for name in _BESIDES - layout.reads:
        if row.get(name) is not None:
            ours.setdefault(name, row[name])
    beside = {
        name: value
        for name, value in row.items()
        if value is not None and name not in layout.reads | _BESIDES
    }
    if "id" in ours and not isinstance(ours["id"], str):
        beside["id"] = ours.pop("id")
    return Taken(layout, layout.kind or _kind_of(ours), ours, beside)


def recognise(row: Row) -> Layout:
    """The layout whose columns a row has; the first of `LAYOUTS` that fits."""
    present = {name for name, value in row.items() if value is not None}
    for layout in LAYOUTS.values():
        if layout.needs <= present:
            return _unless_misspelt(layout, present)
    known = {name for layout in LAYOUTS.values() for name in layout.needs}
    for name in sorted(present - known):
        if near := suggest(name, sorted(known)):
            raise RowError(f"no known layout has the column '{name}'{near}")
    shown = ", ".join(f"'{name}'" for name in list(row)[:8]) or "none"
    raise RowError(f"no known layout has these columns: {shown}")


def _unless_misspelt(layout: Layout, present: set[str]) -> Layout:
    """A lone prompt is refused when a column beside it looks like its completion."""
    for name in sorted(present - layout.reads) if layout.name == "prompt" else ():
        if near := suggest(name, ["completion"]):
            raise RowError(f"'{name}' is not a column{near}")
    return layout


def _as_it_is(row: Row) -> dict[str, object]:
    return {name: row[name] for name in ("messages", "prompt", "completion") if name in row}


def _preference(row: Row) -> dict[str, object]:
    """The chosen side: a demonstration. packtrain mines its own pairs from RL's groups."""
    prompt, chosen = row.get("prompt"), row["chosen"]
    if prompt is not None:
        return {"prompt": prompt, "completion": chosen}
    if isinstance(chosen, str):
        raise RowError("chosen is text without a prompt: nothing says where the answer begins")
    return {"messages": chosen}


def _alpaca(row: Row) -> dict[str, object]:
    instruction, given = _text(row, "instruction"), _text(row, "input", may_miss=True)
    messages = _system(row)
    history = row.get("history") or []
    if not isinstance(history, list):
        raise RowError(f"history must be a list of [question, answer], got {kind_of(history)}")
    for index, turn in enumerate(history):
        if not (isinstance(turn, list) and len(turn) == 2):
            raise RowError(f"history[{index}] must be [question, answer], got {kind_of(turn)}")
        messages += [_message("user", turn[0]), _message("assistant", turn[1])]
    asked = f"{instruction}\n\n{given}" if given.strip() else instruction
    return {"messages": [*messages, _message("user", asked), _message("assistant", row["output"])]}


PAIRS = "prompt, chosen and rejected"
_SPEAKERS = {
    **{"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"},
    **{"chatgpt": "assistant", "model": "assistant", "system": "system"},
    **{"tool": "tool", "observation": "tool"},
}


def _sharegpt(row: Row) -> dict[str, object]:
    turns = row["conversations"]
    if not isinstance(turns, list):
        raise RowError(f"conversations must be a list of turns, got {kind_of(turns)}")
    return {"messages": [*_system(row), *(_turn(turn, n) for n, turn in enumerate(turns))]}


def _turn(turn: object, index: int) -> dict[str, object]:
    where = f"conversations[{index}]"
    if not isinstance(turn, dict):
        raise RowError(f"{where} must be an object with from and value, got {kind_of(turn)}")
    speaker, said = ("from", "value") if "from" in turn else ("role", "content")
    for key in turn:
        if key not in (speaker, said) and turn[key] is not None:
            raise RowError(f"{where}: '{key}' is not a key{suggest(str(key), (speaker, said))}")
    role = turn.get(speaker)
    if role not in _SPEAKERS:
        known = ", ".join(_SPEAKERS)
        raise RowError(f"{where}.{speaker} must be one of {known}, got {kind_of(role)}")
    return _message(_SPEAKERS[str(role)], turn.get(said))


def _verl(row: Row) -> dict[str, object]:
    judged = row.get("reward_model")
    if judged is not None and not isinstance(judged, dict):
        raise RowError(f"reward_model must be an object, got {kind_of(judged)}")
    answer = (judged or {}).get("ground_truth")
    if isinstance(answer, (int, float)) and not isinstance(answer, bool):
        answer = str(answer)
    if answer is not None and not isinstance(answer, str):
        raise RowError(f"reward_model.ground_truth must be text, got {kind_of(answer)}")
    ours: dict[str, object] = {"messages": row["prompt"], "answer": answer}
    if row.get("ability") is not None:
        ours["capability"] = row["ability"]
    return ours


def _question(row: Row) -> dict[str, object]:
    return {"prompt": row["question"], "completion": row["answer"]}


def _system(row: Row) -> list[dict[str, object]]:
    text = _text(row, "system", may_miss=True)
    return [_message("system", text)] if text.strip() else []


def _message(role: str, content: object) -> dict[str, object]:
    return {"role": role, "content": content}


def _text(row: Row, name: str, *, may_miss: bool = False) -> str:
    value = row.get(name)
    if value is None and may_miss:
        return ""
    if not isinstance(value, str):
        raise RowError(f"{name} must be text, got {kind_of(value)}")
    return value


def _kind_of(ours: Row) -> Kind:
    messages = ours.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else None
    ends = isinstance(last, dict) and last.get("role") == "assistant"
    return "demonstration" if ends else "prompt"


_BESIDES = frozenset({"id", "capability", "difficulty", "reward", "answer"})
"""Columns of ours that may stand beside those of any layout."""


LAYOUTS: Mapping[str, Layout] = {
    name: Layout(name, frozenset(needs.split()), frozenset(reads.split()), ours, kind, columns)
    for name, needs, reads, ours, kind, columns in (
        ("messages", "messages", "messages", _as_it_is, None, {}),
        (PAIRS, "chosen rejected", "prompt chosen", _preference, "demonstration", None),
        (
            *("prompt and completion", "prompt completion", "prompt completion"),
            *(_as_it_is, "demonstration", {}),
        ),
        ("verl", "prompt reward_model", "prompt reward_model ability", _verl, "prompt", None),
        ("ShareGPT", "conversations", "conversations system", _sharegpt, None, None),
        (
            *("alpaca", "instruction output", "instruction output input system history"),
            *(_alpaca, "demonstration", None),
        ),
        ("prompt", "prompt", "prompt", _as_it_is, "prompt", {}),
        (
            *("question and answer", "question answer", "question answer"),
            *(_question, "demonstration", {"prompt": "question", "completion": "answer"}),
        ),
    )
}
