"""How a judge is asked for a difficulty: one wording for who teaches judges and who asks them.

The herd trains its teacher on exactly these conversations and the `bare` wording of pruning asks
them (curation/label_prompt.py), so neither may have its own copy.
"""

from __future__ import annotations

from collections.abc import Sequence

from ground.records import Label, Message

JUDGE_QUESTION = "How hard is this task for a small model? Answer easy, medium or hard.\n\n"
"""What a judge is asked; the task follows."""


def task_text(task: Sequence[Message]) -> str:
    """A task as one text: a single message as it stands, a longer conversation turn by turn with
    its roles, so that a system instruction inside it is something to judge, not to obey."""
    if len(task) == 1:
        return task[0].content
    return "\n\n".join(f"[{message.role}]\n{message.content}" for message in task)


def judge_messages(task: Sequence[Message]) -> tuple[Message, ...]:
    """The conversation that ends where the judge has to answer with a label.

    Example:
        judge_messages((Message("user", "2+2="),))[0].content → "How hard is this … hard.\\n\\n2+2="
    """
    return (Message("user", JUDGE_QUESTION + task_text(task)),)


def judgement(task: Sequence[Message], label: Label) -> tuple[Message, ...]:
    """A whole judging conversation, as a judge learns from it."""
    return (*judge_messages(task), Message("assistant", label))
