"""How a careful author thinks aloud: one short scratchpad per task family.

A scratchpad is a string without the answer marker; it ends where the answer can be read off. All
are computed from the metadata that reasoning-gym gives with each question.

Example:
    running_total on "4 - 1 + 7" → "4;-1=3;+7=10"
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import accumulate

from reasoning_gym.arithmetic.leg_counting import ANIMALS
from reasoning_gym.cognition.color_cube_rotation import Color, Cube, Side

Metadata = Mapping[str, object]
Scratchpad = Callable[[Metadata], str]

_STEP = ";"
_MOST = 20
_TURNS: dict[Side, Callable[[Cube], None]] = {
    Side.FRONT: Cube.rotate_front_to_top,
    Side.RIGHT: Cube.rotate_right_to_top,
    Side.BACK: Cube.rotate_back_to_top,
    Side.LEFT: Cube.rotate_left_to_top,
    Side.BOTTOM: Cube.rotate_bottom_to_top,
}
"""What brings each side to the top."""


def running_total(metadata: Metadata) -> str:
    """Sum a chain from left to right: "4 - 1 + 7" → "4;-1=3;+7=10"."""
    first, *rest = str(metadata["expression"]).split(" ")
    steps = [first]
    for sign, term, total in zip(rest[::2], rest[1::2], _totals(metadata)[1:], strict=True):
        steps.append(f"{sign}{term}={total}")
    return _STEP.join(steps)


def stays_small(metadata: Metadata) -> bool:
    """True when no running total of a chain leaves [0, 20]: small sums are learned in minutes."""
    return all(0 <= total <= _MOST for total in _totals(metadata))


def _totals(metadata: Metadata) -> list[int]:
    first, *rest = str(metadata["expression"]).split(" ")
    steps = (int(sign + term) for sign, term in zip(rest[::2], rest[1::2], strict=True))
    return list(accumulate(steps, initial=int(first)))


def letters_so_far(metadata: Metadata) -> str:
    """Count a letter word by word, naming each by its first letter: "e" in "we see" → "w1;s3"."""
    letter, total, steps = str(metadata["target_letter"]), 0, []
    for word in _words(metadata["span"]):
        total += word.lower().count(letter)
        steps.append(f"{word[0]}{total}")
    return _STEP.join(steps)


def legs_so_far(metadata: Metadata) -> str:
    """Add up legs animal by animal: "1 cat, 1 bird" → "4=4;2=6"."""
    animals = metadata["animals"]
    if not isinstance(animals, Mapping):
        raise TypeError(f"leg_counting's animals must be a mapping, got {type(animals).__name__}")
    total, steps = 0, []
    for animal, count in animals.items():
        legs = ANIMALS[animal] * count
        total += legs
        steps.append(f"{legs}={total}")
    return _STEP.join(steps)


def numbered_letters(metadata: Metadata) -> str:
    """Number the letters of the word that is to be spelled backward: "sun" → "1s2u3n"."""
    return "".join(f"{place}{letter}" for place, letter in enumerate(str(metadata["word"]), 1))


def numbered_words(metadata: Metadata) -> str:
    """Number the words that are to be reversed, each by its first letter: "go, on" → "1g2o"."""
    words = _words(metadata["words"])
    return "".join(f"{place}{word[0]}" for place, word in enumerate(words, 1))


def cube_by_cube(metadata: Metadata) -> str:
    """Write the cube as it is and after each turn, then what is asked: "top=red,...;back=red"."""
    start = metadata["initial_state"]
    turns = metadata["rotations"]
    if not isinstance(start, Mapping) or not isinstance(turns, list):
        raise TypeError("color_cube_rotation must give initial_state and rotations")
    target = str(metadata["target_side"])
    cube = Cube({side: Color(start[side.value]) for side in Side})
    steps = [_faces(cube)]
    for side in turns:
        _TURNS[Side(side)](cube)
        steps.append(_faces(cube))
    steps.append(f"{target}={cube.colors[Side(target)].value}")
    return _STEP.join(steps)


def _faces(cube: Cube) -> str:
    return ",".join(f"{face.value}={cube.colors[face].value}" for face in Side)


def _words(words: object) -> list[str]:
    if not isinstance(words, list):
        raise TypeError(f"expected a list of words, got {type(words).__name__}")
    return [str(word) for word in words]
