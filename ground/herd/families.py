"""The task families of the demo: what is asked, at which levels, and how one thinks about it.

Seven families are solved by the herd; three of them are unknown to the judge when it learns to
label (`judge_learns=False`). Four more serve only the judge's lessons.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from reasoning_gym.arithmetic.leg_counting import ANIMALS
from reasoning_gym.cognition.color_cube_rotation import Color, Side

from ground.herd import scratchpads
from ground.herd.scratchpads import Metadata, Scratchpad
from ground.records import Label

Options = Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Family:
    """One task family of reasoning-gym as the herd meets it.

    Example:
        Family("gcd", "arithmetic", {"easy": {"max_value": 9}, ...}, phrases=("Find the ...",))
    """

    name: str
    """Its name in reasoning-gym."""
    capability: str
    levels: Mapping[Label, Options]
    """Options of the family's configuration that make a question easy, medium or hard."""
    keep: Callable[[Metadata], bool] | None = None
    """Which of its questions are asked; None keeps all."""
    scratchpad: Scratchpad | None = None
    """How to think; None for families that are only judged, never solved."""
    judge_learns: bool = True
    """False keeps the family out of the judge's lessons, so that its judgement can be tested."""
    phrases: tuple[str, ...] = ()
    """Fixed parts of the question: one token each."""
    words: tuple[str, ...] = field(default=())
    """Words of the question and its scratchpad that are one token each."""


def _between(
    low: str, high: str, easy: int, medium: int, hard: int, most: int
) -> dict[Label, Options]:
    """Levels that differ in one range: [easy, medium), [medium, hard), [hard, most]."""
    return {
        "easy": {low: easy, high: medium - 1},
        "medium": {low: medium, high: hard - 1},
        "hard": {low: hard, high: most},
    }


def _with(levels: Mapping[Label, Options], **options: object) -> dict[Label, Options]:
    return {label: {**level, **options} for label, level in levels.items()}


_CHAIN = _between("min_terms", "max_terms", 2, 4, 6, 7)
_TURNS = (
    "The cube is rotated so that the side which was before at the ",
    "Then the cube is rotated to bring the ",
    " side to the top.",
    "After that the cube is turned to make the ",
    " face the top.",
    "Now the cube is rotated to place its ",
    " side at the top.",
    "Next, the ",
    " side is rotated to become the top face.",
    " is now at the top.",
)
_FACES = ("top=", *(f"{sign}{side.value}=" for side in Side for sign in ",;"))

SOLVED: tuple[Family, ...] = (
    Family(
        "chain_sum",
        "arithmetic",
        _with(_CHAIN, min_digits=1, max_digits=1),
        scratchpad=scratchpads.running_total,
        keep=scratchpads.stays_small,
        phrases=(
            "State the final answer to the following arithmetic problem: ",
            " + ",
            " - ",
            " =",
        ),
    ),
    Family(
        "basic_arithmetic",
        "arithmetic",
        _with(_CHAIN, min_digits=1, max_digits=1, operators=("+", "-"), allow_parentheses=False),
        scratchpad=scratchpads.running_total,
        keep=scratchpads.stays_small,
        judge_learns=False,
        phrases=("Calculate ",),
    ),
    Family(
        "letter_counting",
        "counting",
        _between("min_words", "max_words", 2, 3, 5, 7),
        scratchpad=scratchpads.letters_so_far,
        phrases=('How many times does the letter "', '" appear in the text: "', '"?'),
    ),
    Family(
        "leg_counting",
        "counting",
        _with(_between("min_animals", "max_animals", 1, 4, 6, 7), max_instances=1),
        scratchpad=scratchpads.legs_so_far,
        judge_learns=False,
        phrases=(
            "Your task is to count how many legs there are in total when given a list of animals."
            "\n\nNow, how many legs are there in total if you have ",
        ),
        words=(*ANIMALS, *(f"{animal}s" for animal in ANIMALS)),
    ),
    Family(
        "spell_backward",
        "strings",
        _between("min_word_len", "max_word_len", 3, 5, 8, 10),
        scratchpad=scratchpads.numbered_letters,
        phrases=("Spell this word backward (example: sun -> nus): ",),
    ),
    Family(
        "word_sequence_reversal",
        "strings",
        _between("min_words", "max_words", 2, 3, 5, 6),
        scratchpad=scratchpads.numbered_words,
        judge_learns=False,
        phrases=(
            "Solve the following problem.\n\nProvide you answer as a comma-separated list of words "
            "with a space after the comma.\n\nReverse this list of words: ",
            ", ",
        ),
    ),
    Family(
        "color_cube_rotation",
        "logic",
        _between("min_rotations", "max_rotations", 1, 2, 3, 3),
        scratchpad=scratchpads.cube_by_cube,
        phrases=(
            "A cube has:\n- a ",
            " side\n- a ",
            *_TURNS,
            *_FACES,
            "What is now the color of the ",
            " side of the cube?\nProvide only the color as your final answer.",
        ),
        words=(*(str(color.value) for color in Color), *(str(side.value) for side in Side)),
    ),
)

JUDGED_ONLY: tuple[Family, ...] = (
    Family(
        "decimal_chain_sum",
        "arithmetic",
        _with(_CHAIN, max_digits=1, max_decimal_places=1),
    ),
    Family(
        "caesar_cipher",
        "strings",
        _between("min_words", "max_words", 2, 3, 5, 6),
        phrases=(
            "Decrypt this Caesar cipher text: ",
            ". Provide only the decrypted text as your final answer.",
        ),
    ),
    Family(
        "number_filtering",
        "logic",
        _with(_between("min_numbers", "max_numbers", 2, 4, 6, 7), max_decimals=0),
        phrases=(
            " all numbers smaller than ",
            " all numbers larger than ",
            " in this list: ['",
            "', '",
            "']\nReturn the new list in the same format.",
        ),
    ),
    Family(
        "sentence_reordering",
        "strings",
        _between("min_words_in_sentence", "max_words_in_sentence", 3, 4, 6, 7),
        phrases=("Restore the correct order of words in the following sentence: ",),
    ),
)

FAMILIES: dict[str, Family] = {family.name: family for family in (*SOLVED, *JUDGED_ONLY)}
