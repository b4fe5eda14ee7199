"""The prompts of an evaluation, refused when the run trains on any of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from ground.config import Data
from ground.errors import DataError
from ground.records import Message, Prompt
from ground.tables import read_demonstrations, read_prompts
from ground.trail import Trail

_MAX_SHOWN = 5


def read_heldout(trail: Trail, data: Data, quarantine: Path) -> list[Prompt]:
    """Read the held-out prompts and compare their questions with all that sft and rl learn from.

    Raises:
        DataError: a question is in both, so that a score would say what was learnt by heart.
    """
    path = trail.heldout()
    heldout = read_prompts(path, data, quarantine=quarantine)
    for source, questions in _trained_on(trail, data):
        shared = shared_ids(heldout, questions)
        if shared:
            more = ", …" if len(shared) > _MAX_SHOWN else ""
            raise DataError(
                f"{len(shared)} of {len(heldout)} held-out prompts are trained on: "
                f"{', '.join(shared[:_MAX_SHOWN])}{more}",
                where=str(path),
                why=f"{source} asks the same questions",
                fix="take them out of one of the two files",
            )
    return heldout


def shared_ids(heldout: Sequence[Prompt], questions: Iterable[Sequence[Message]]) -> list[str]:
    """Ids of the held-out prompts that are among `questions`, in the order given.

    System instructions and white space make no other question.

    Example:
        "2 + 2 =" is found in "You are brief." / "2 +  2 =", "2+2=" is not
    """
    keys = {_key(prompt.messages): prompt.id for prompt in heldout}
    found = {keys.get(_key(question), "") for question in questions}
    return [prompt.id for prompt in heldout if keys[_key(prompt.messages)] in found]


def _trained_on(trail: Trail, data: Data) -> Iterator[tuple[Path, list[Sequence[Message]]]]:
    """The file of each training stage that is on, and every question that it holds an answer to."""
    if "sft" in trail.stages:
        path = trail.demonstrations_before("sft")
        conversations = [row.messages for row in read_demonstrations(path, data)]
        yield path, [q for messages in conversations for q in _questions(messages)]
    if "rl" in trail.stages:
        path = trail.prompts_before("rl")
        yield path, [prompt.messages for prompt in read_prompts(path, data)]


def _questions(messages: Sequence[Message]) -> Iterator[Sequence[Message]]:
    """What each assistant turn of a conversation answers."""
    for place, message in enumerate(messages):
        if message.role == "assistant":
            yield messages[:place]


def _key(messages: Sequence[Message]) -> tuple[tuple[str, ...], ...]:
    return tuple((m.role, *m.content.split()) for m in messages if m.role != "system")
