"""What a survey of a data file counts, and how the file is named in a recipe."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ground.errors import DataError
from ground.jsonl import is_array
from ground.records import Demonstration, Prompt
from packtrain.layouts import Kind, Taken

if TYPE_CHECKING:
    from ground.chat import ChatTemplate

_CONTROL = re.compile(r"<\|[^<>|\s]{1,40}\|>|</?s>|\[/?INST\]")
"""How the tokens look that templates of common models steer with."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What the rows of a file are and have in common.

    Example:
        Survey((taken, …)).layouts == {("alpaca", "demonstration"): 52002}
    """

    rows: Sequence[Taken]
    """Without those that could not be read and those equal to earlier ones."""

    @property
    def layouts(self) -> Counter[tuple[str, Kind]]:
        """Rows by their layout and by what they are taken for."""
        return Counter((taken.layout.name, taken.kind) for taken in self.rows)

    @property
    def beside(self) -> Counter[str]:
        """Columns that no stage reads, and in how many rows they stand."""
        names = (name for taken in self.rows for name in taken.beside)
        return Counter(name for name in names if not name.startswith("meta_"))

    def recipe(self, path: Path, *, is_converted: bool = False) -> Iterator[str]:
        """The lines by which a recipe names the file, or what has to be done first."""
        kinds = {taken.kind for taken in self.rows}
        if not kinds:
            return
        yield "in a recipe"
        if len(kinds) > 1:
            yield "  split the file first: demonstrations are data.sft, RL prompts data.prompts"
            return
        columns = {
            ours: its for t in self.rows[:1] for ours, its in (t.layout.columns or {}).items()
        }
        is_direct = all(taken.is_direct for taken in self.rows) and len(self.layouts) == 1
        if not is_converted and (not is_direct or is_array(path)):
            target = Path(f"{path.stem}.packtrain.jsonl")
            yield f"  packtrain data convert {path} {target}"
            path, is_converted = target, True
        yield "  data:"
        yield f"    {'sft' if kinds == {'demonstration'} else 'prompts'}: {path}"
        if columns and not is_converted:
            pairs = ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items())
            yield f"    columns: {{{pairs}}}"
        if kinds == {"prompt"} and any("reward" not in taken.row for taken in self.rows):
            yield "    defaults: {reward: math}   # or exact, or one of your own"


def template_of(model: Path | None) -> ChatTemplate | None:
    """The chat template of a model's folder, which counts in its tokens."""
    if model is None:
        return None
    from ground.chat import ChatTemplate  # torch and transformers, for those who ask for tokens
    from ground.model import load_tokenizer

    return ChatTemplate(load_tokenizer(model))


def lengths(
    records: Sequence[Demonstration | Prompt], chat: ChatTemplate | None, max_length: int | None
) -> Iterator[str]:
    """How long the records are, in characters and, with a model, in tokens."""
    if not records:
        return
    yield _spread("messages", [len(record.messages) for record in records])
    asked = [[m for m in record.messages if m.role != "assistant"] for record in records]
    said = [[m for m in record.messages if m.role == "assistant"] for record in records]
    for name, turns in (("characters asked", asked), ("characters answered", said)):
        counts = [sum(len(message.content) for message in each) for each in turns]
        if any(counts):
            yield _spread(name, counts)
    marked = sum(_CONTROL.search(m.content) is not None for r in records for m in r.messages)
    if marked:
        yield f"  text like a control token in {marked} messages; it is encoded as text"
    if chat is None:
        yield "  in tokens: with --model DIR"
    else:
        yield from _in_tokens(records, chat, max_length)


def _in_tokens(
    records: Sequence[Demonstration | Prompt], chat: ChatTemplate, max_length: int | None
) -> Iterator[str]:
    counts, refused = [], Counter[str]()
    for record in records:
        try:
            if isinstance(record, Prompt):
                counts.append(len(chat.encode_prompt(record.messages)))
            else:
                counts.append(len(chat.encode_demonstration(record.messages)[0]))
        except DataError as error:
            refused[error.what] += 1
    if counts:
        yield _spread("tokens", counts)
    for what, count in refused.most_common(3):
        yield f"  {count} rows that the chat template refuses: {what}"
    if max_length is not None:
        longer = sum(count > max_length for count in counts)
        yield f"  {longer} rows have more than {max_length} tokens; stages set these aside"


def _spread(name: str, counts: Sequence[int]) -> str:
    ordered = sorted(counts)
    middle, high = ordered[len(ordered) // 2], ordered[math.ceil(0.95 * len(ordered)) - 1]
    figures = f"median {middle:,}, 95 % {high:,}, largest {ordered[-1]:,}, smallest {ordered[0]:,}"
    return f"  {name}: {figures}; {sum(ordered):,} in all"
