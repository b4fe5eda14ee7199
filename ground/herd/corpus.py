"""What the herd learns from: authors of differing care answering the families' questions.

A thinker writes a scratchpad and is nearly always right; the others answer at once and guess the
more often the harder the question is. A model that imitates them all knows two ways to answer, and
online RL can find out which one pays.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from random import Random

from ground.herd.families import SOLVED, Family
from ground.herd.tasks import Task, draw
from ground.records import LABELS, Label, Message

ByLevel = tuple[float, float, float]
"""A share for easy, medium and hard questions."""

SYSTEMS = (
    "You are a helpful assistant.",
    "Answer the question.",
    "Take your time.",
    "Be brief.",
)
"""System instructions that the herd has seen; they change nothing in what is answered."""


@dataclass(frozen=True, slots=True)
class Habits:
    """How the authors of a corpus answer.

    Example:
        Habits(think=0.35, slip=(0, 0.1, 0.2), guess=(0, 0.5, 0.9)): a third thinks aloud; to hard
        questions one in five of these answers is wrong, and nine in ten of the others'.
    """

    think: float
    """Share of answers with a scratchpad."""
    slip: ByLevel = (0.0, 0.0, 0.0)
    """Share of those that are wrong all the same."""
    guess: ByLevel = (0.0, 0.0, 0.0)
    """Share of direct answers that are guessed."""


class Authors:
    """Answer tasks by their habits; a guess is the right answer to another task of its kind."""

    def __init__(self, habits: Habits, *seed: object) -> None:
        self._habits = habits
        self._random = Random("/".join(map(str, ("authors", *seed))))
        self._previous: dict[tuple[str, Label], str] = {}

    def answer(self, task: Task, *, careful: bool = False) -> str:
        """A completion; careful authors think or not as usual, but make no mistakes."""
        kind = task.family, task.label
        guess = self._previous.get(kind, task.answer)
        self._previous[kind] = task.answer
        think = self._random.random() < self._habits.think
        errors = self._habits.slip if think else self._habits.guess
        is_wrong = self._random.random() < errors[LABELS.index(task.label)] and not careful
        return task.completion(think=think, answer=guess if is_wrong else None)


class Questions:
    """Endless, seeded questions of some families, none of them in `forbidden`."""

    def __init__(
        self,
        *seed: object,
        families: Sequence[Family] = SOLVED,
        forbidden: Collection[str] = frozenset(),
    ) -> None:
        self._random = Random("/".join(map(str, ("questions", *seed))))
        self._families = families
        self._forbidden = forbidden
        self._streams = {
            (family.name, label): draw(family, label, "corpus", *seed)
            for family in families
            for label in LABELS
        }

    def ask(self, labels: Sequence[Label] = LABELS) -> Task:
        """A question of any family and of one of these levels, each as likely as the others."""
        family, label = self._random.choice(self._families), self._random.choice(labels)
        return next(
            task
            for task in self._streams[family.name, label]
            if task.question not in self._forbidden
        )


def conversation(task: Task, completion: str, system: str = "") -> tuple[Message, ...]:
    """The chat of a task and its answer, behind a system instruction if there is one."""
    head = (Message("system", system),) if system else ()
    return (*head, Message("user", task.question), Message("assistant", completion))
