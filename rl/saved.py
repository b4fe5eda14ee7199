"""The books' draws and slots as JSON types: what a cut keeps of them."""

from __future__ import annotations

from typing import TypedDict

from rl.buffer import LATE, Slot
from rl.groups import row_of
from rl.source import Draw


class SavedDraw(TypedDict):
    """A draw that is to be asked again."""

    number: int
    slot: int
    version: int
    prompt: str


class SavedSlot(TypedDict):
    """An open slot."""

    slot: int
    prompts: list[str]
    version: int
    again: int | None
    """Number of its first draw when that one is asked again."""
    outcomes: list[dict[str, object]]
    """Rows of rl/groups.py: what its earlier draws came to belongs to the step's record."""


def saved_draw(draw: Draw) -> SavedDraw:
    """A draw without its prompt's text."""
    return {
        "number": draw.number,
        "slot": draw.slot,
        "version": draw.version,
        "prompt": draw.prompt.id,
    }


def saved_slot(slot: Slot) -> SavedSlot:
    """A slot without what is sampled again after a restart."""
    kept = [outcome for outcome in slot.outcomes if outcome.reason not in ("", LATE)]
    first = slot.draws[0]
    return {
        "slot": slot.number,
        "prompts": [draw.prompt.id for draw in slot.draws],
        "version": first.version,
        "again": first.number if first.is_again else None,
        "outcomes": [row_of(outcome, ()) for outcome in kept],
    }
