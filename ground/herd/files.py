"""The data files of the demo: demonstrations, RL prompts and held-out prompts, disjoint.

Each file has as many rows of every family and level, in a seeded order. A row is one JSON object:
id, messages, capability, reward, answer, difficulty. In sft.jsonl the last message is the
assistant's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import islice
from random import Random

from ground.herd.config import HerdSection
from ground.herd.corpus import Authors, Habits, conversation
from ground.herd.families import SOLVED
from ground.herd.tasks import Task, draw
from ground.records import LABELS, Message, Prompt, content_id

_HELDOUT_SEED = 0


def data_files(section: HerdSection, seed: int) -> dict[str, str]:
    """File name → content of all data files; equal arguments give equal bytes."""
    seen: set[str] = set()
    heldout = heldout_tasks(section)
    seen.update(task.question for task in heldout)
    prompts = _unseen(section.prompts_per_level, seen, seed, "prompts")
    demonstrated = _unseen(section.demonstrations_per_level, seen, seed, "sft")
    authors = Authors(Habits(section.think), seed, "sft")
    return {
        "sft.jsonl": _lines(demonstration_row(task, authors.answer(task)) for task in demonstrated),
        "prompts.jsonl": _lines(prompt_row(task) for task in prompts),
        "heldout.jsonl": _lines(prompt_row(task) for task in heldout),
    }


def heldout_tasks(section: HerdSection) -> list[Task]:
    """The tasks of heldout.jsonl, the same for every run: the shipped models never saw them."""
    return _unseen(section.heldout_per_level, set(), _HELDOUT_SEED, "heldout")


def prompt_row(task: Task) -> dict[str, object]:
    """A task as a row of prompts.jsonl."""
    prompt = task.prompt
    return _row(prompt, prompt.id, prompt.messages)


def demonstration_row(task: Task, completion: str) -> dict[str, object]:
    """A task and an answer to it as a row of sft.jsonl."""
    prompt = task.prompt
    messages = conversation(task, completion)
    return _row(prompt, content_id(messages, prompt.reward, prompt.answer), messages)


def _row(prompt: Prompt, row_id: str, messages: Sequence[Message]) -> dict[str, object]:
    return {
        "id": row_id,
        "messages": [asdict(message) for message in messages],
        "capability": prompt.capability,
        "reward": prompt.reward,
        "answer": prompt.answer,
        "difficulty": asdict(prompt.difficulty) if prompt.difficulty else None,
    }


def _unseen(per_level: int, seen: set[str], seed: int, purpose: str) -> list[Task]:
    """So many new tasks of every family and level, shuffled; `seen` grows by their questions."""
    tasks: list[Task] = []
    for family in SOLVED:
        for label in LABELS:
            stream = draw(family, label, seed, purpose)
            tasks += islice(_new(stream, seen), per_level)
    Random(f"{seed}/{purpose}").shuffle(tasks)
    return tasks


def _new(stream: Iterable[Task], seen: set[str]) -> Iterable[Task]:
    for task in stream:
        if task.question not in seen:
            seen.add(task.question)
            yield task


def _lines(rows: Iterable[dict[str, object]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
