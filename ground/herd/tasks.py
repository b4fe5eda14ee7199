"""Questions of the demo, drawn from reasoning-gym by (seed, family, level), and their answers.

A prompt's `answer` is compact JSON that carries what reasoning-gym's verifier needs:

    {"family": "chain_sum", "answer": "6", "metadata": {}}

and is scored by `reasoning_gym.get_score_answer_fn(family)(final_answer(text), entry=...)`, where
`entry` is that mapping. A completion is an optional scratchpad, the marker and the answer:

    "4;+5=9=>9" (thought) or "=>9" (answered directly)
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import reasoning_gym

from ground.answers import ANSWER_MARKER
from ground.herd.families import Family
from ground.records import Difficulty, Label, Message, Prompt

REWARD = "reasoning_gym"
_DRAWS_PER_STREAM = 1_000_000


@dataclass(frozen=True, slots=True)
class Task:
    """A question of one family and level, with its answer and the way to think about it.

    Example:
        Task("chain_sum", "arithmetic", "easy", "... problem: 4 + 5 =", "9", "4;+5=9")
    """

    family: str
    capability: str
    label: Label
    question: str
    answer: str
    scratchpad: str
    """Empty for families that are only judged."""

    @property
    def prompt(self) -> Prompt:
        """The task as the rest of the house knows it."""
        answer = {"family": self.family, "answer": self.answer, "metadata": {}}
        return Prompt.make(
            (Message("user", self.question),),
            capability=self.capability,
            reward=REWARD,
            answer=json.dumps(answer, ensure_ascii=False, separators=(",", ":")),
            difficulty=Difficulty(label=self.label, judged_by="level"),
        )

    def completion(self, *, think: bool, answer: str | None = None) -> str:
        """The text of an answer, after thinking or directly; `answer` replaces the right one."""
        scratchpad = self.scratchpad if think else ""
        return f"{scratchpad}{ANSWER_MARKER}{self.answer if answer is None else answer}"


def stream_seed(*parts: object) -> int:
    """A seed in [0, 2^48) that follows from the parts alone."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:6], "big")


def draw(family: Family, label: Label, *seed: object) -> Iterator[Task]:
    """An endless stream of questions; equal arguments give equal streams, others differ."""
    dataset = reasoning_gym.create_dataset(
        family.name,
        seed=stream_seed(*seed, family.name, label),
        size=_DRAWS_PER_STREAM,
        **family.levels[label],
    )
    for entry in dataset:
        if family.keep is None or family.keep(entry["metadata"]):
            yield _task(family, label, entry)


def _task(family: Family, label: Label, entry: dict[str, Any]) -> Task:
    scratchpad = family.scratchpad(entry["metadata"]) if family.scratchpad else ""
    return Task(
        family=family.name,
        capability=family.capability,
        label=label,
        question=entry["question"].strip(),
        answer=str(entry["answer"]),
        scratchpad=scratchpad,
    )
