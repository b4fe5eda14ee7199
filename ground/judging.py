"""How a judge is asked for a difficulty: one wording for who teaches judges and who asks them.

The herd trains its teacher on exactly these conversations and `curation.judge` reads the
probabilities of the three labels where the answer would stand, so neither may have its own copy.
"""

from __future__ import annotations

from collections.abc import Sequence

from ground.records import Label, Message

JUDGE_QUESTION = "How hard is this task for a small model? Answer easy, medium or hard.\n\n"
"""What a judge is asked; the task follows."""


def judge_messages(task: Sequence[Message]) -> tuple[Message, ...]:
    """The conversation that ends where the judge has to answer with a label.

    A task of a single user message is quoted as it stands; a longer conversation is quoted turn by
    turn with its roles, so that a system instruction inside it is something to judge, not to obey.

    Example:
        judge_messages((Message("user", "2+2="),))[0].content → "How hard is this … hard.\\n\\n2+2="
    """
    if len(task) == 1:
        quoted = task[0].content
    else:
        quoted = "\n\n".join(f"[{message.role}]\n{message.content}" for message in task)
    return (Message("user", JUDGE_QUESTION + quoted),)


def judgement(task: Sequence[Message], label: Label) -> tuple[Message, ...]:
    """A whole judging conversation, as a judge learns from it."""
    return (*judge_messages(task), Message("assistant", label))
