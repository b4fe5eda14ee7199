"""The teacher at work: from a group's answers to its word on them."""

from __future__ import annotations

from distill.config import RolloutDistillSection
from distill.reading import asked_row, word_of
from distill.store import TokenRow
from distill.targets import TargetFormat
from distill.teacher import Teacher
from distill.word import Teaching, Word
from ground.model import load_model
from ground.records import Group
from rl.batch import written_by


def open_teacher(section: RolloutDistillSection, teaching: Teaching) -> Teacher:
    """The teacher's weights, on the GPU where the recipe gives it one.

    Raises:
        DataError: the weights are not those that the run was begun with.
    """
    teaching.require_teacher()
    model = load_model(teaching.teacher)
    model.to("cuda" if section.gpus_per_teacher else "cpu")  # pyright: ignore[reportArgumentType]
    format = TargetFormat.of(section, teaching.always)
    vocabulary = teaching.identity.vocabulary
    return Teacher(model, format, vocabulary=vocabulary, pass_tokens=section.pass_tokens)


def word_on(group: Group, teacher: Teacher, teaching: Teaching) -> Word:
    """The word on all answers of a group.

    Its passes hold this group's answers and nothing else, by length. So what is said is a function
    of the group, whoever else waits: in synchronous training it is the same bits in every life.
    """
    rows = _asked(group, teaching)
    spoken = {row.key: said for row, said in teacher.speak(list({r.key: r for r in rows}.values()))}
    return word_of(teaching.identity, rows, spoken)


def _asked(group: Group, teaching: Teaching) -> list[TokenRow]:
    vocabulary = teaching.identity.vocabulary
    return [asked_row(*written_by(group, each), vocabulary) for each in group.rollouts]
