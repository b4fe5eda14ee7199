"""Near-duplicates among rows: MinHash (Broder 1997) with banded locality-sensitive hashing.

    row → question and answer, each a set of w-word shingles → 128 slots each
        → rows that share a band of 4 + 4 slots are compared
        → alike in `similarity` of the slots, question and answer each: one cluster

The share of equal slots estimates the Jaccard similarity J of the shingle sets, with a deviation of
sqrt(J(1-J)/128), 0.035 at 0.8. A pair shares one of the 32 bands with chance 1-(1-J⁸)³²: 99.6 % at
J = 0.8 of both, 42 % at 0.6. Of a slot 16 bits are kept, which makes 512 bytes a row; two different
slots agree in them once in 65,536 times.

Two kinds of rows look alike and are not. Tasks that differ in a number: rows are compared only
where their seals are equal, which hold all numbers. And rows made from one template: shingles that
many rows share are left out. A row whose every shingle is shared is alike only to its equals.

Words are runs of letters, of digits, or single other signs; in scripts that are written without
blanks (Han, Kana, Thai, Lao, Burmese, Khmer) each letter is one.
"""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash  # pyright: ignore[reportAttributeAccessIssue]

from ground.records import Demonstration

NUM_SLOTS, HALF_BAND = 128, 4
_SEED = 1
_BATCH = 1024
_BLANKLESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
_WORD = re.compile(rf"\d+|[{_BLANKLESS}]|[^\W\d_{_BLANKLESS}]+|[^\w\s]|_")
_NUMBER = re.compile(r"\d+")
_SAMPLE = 20_000
"""Texts from which we learn what many share."""
_COMMON_SHARE, _LEAST_COMMON = 0.05, 10
"""A shingle in more than this share of the texts, and in more than so many, tells none apart."""


@dataclass(frozen=True, slots=True)
class Sides:
    """What of a row is compared.

    Example:
        Sides("Calculate 12 + 3.", "=>15", 2881746031)
    """

    question: str
    """The turn that is answered; a system message is not the row's own."""
    answer: str
    seal: int
    """Alike only where this is equal: a checksum of the numbers of both, of the answer that a
    verifier would compare with, and of the turns before, word for word."""


def sides(row: Demonstration) -> Sides:
    """What of a row is compared with others."""
    *earlier, asked = row.question or row.messages[:1]
    answer = row.messages[-1].content
    before = [turn.content for turn in earlier if turn.role != "system"]
    numbers = [_NUMBER.findall(text) for text in (asked.content, answer)]
    sealed = repr((numbers, row.answer, [_WORD.findall(text.lower()) for text in before]))
    return Sides(asked.content, answer, zlib.crc32(sealed.encode()))


def clusters(sides: Sequence[Sides], *, similarity: float, words: int) -> NDArray[np.int64]:
    """The cluster [B] of each row: the index of its first member.

    In a band every row is compared with the first that shares it, and with no other, so the work
    grows with the number of rows and not with that of pairs.

    Args:
        similarity: share of equal slots from which two rows belong together.
        words: length of a shingle; a text with fewer is one shingle.

    Example:
        "a b c d e f", "x y", "a b c d e f", all with one answer → [0, 1, 0]
    """
    seals_B = np.array([each.seal for each in sides], dtype=np.uint64)
    slots_B2S = np.stack(
        [
            _signatures([each.question for each in sides], words),
            _signatures([each.answer for each in sides], words),
        ],
        axis=1,
    )
    parents = np.arange(len(sides))
    for start in range(0, NUM_SLOTS, HALF_BAND):
        for head, other in _alike(slots_B2S, seals_B, start, similarity):
            _join(parents, head, other)
    return np.array([_root(parents, place) for place in range(len(parents))], dtype=np.int64)


def shingles(text: str, words: int) -> list[str]:
    """Runs of so many words, lower case; a shorter text is its own one shingle.

    Example:
        shingles("Add 12+3 now", 3) → ["add 12 +", "12 + 3", "+ 3 now"]
    """
    found = _WORD.findall(text.lower())
    last = max(len(found) - words, 0)
    return [" ".join(found[start : start + words]) for start in range(last + 1)]


def common(texts: Sequence[str], words: int) -> set[str]:
    """Shingles of a template: many texts have them. Learned from texts at equal distances."""
    sample = texts[:: len(texts) // _SAMPLE + 1]
    counts = Counter(each for text in sample for each in set(shingles(text, words)))
    limit = max(_LEAST_COMMON, _COMMON_SHARE * len(sample))
    return {shingle for shingle, count in counts.items() if count > limit}


def _signatures(texts: Sequence[str], words: int) -> NDArray[np.uint16]:
    """[B, S], computed in batches."""
    shared = common(texts, words)

    def own(text: str) -> list[str]:
        found = shingles(text, words)
        return [each for each in found if each not in shared] or [" ".join(found)]

    parts = [
        np.array(
            RMinHash.digests_from_token_sets([own(text) for text in batch], NUM_SLOTS, _SEED),
            dtype=np.uint32,
        ).astype(np.uint16)
        for batch in (texts[at : at + _BATCH] for at in range(0, len(texts), _BATCH))
    ]
    return np.concatenate(parts) if parts else np.empty((0, NUM_SLOTS), dtype=np.uint16)


def _alike(
    slots_B2S: NDArray[np.uint16], seals_B: NDArray[np.uint64], start: int, similarity: float
) -> Iterator[tuple[int, int]]:
    """Rows that share this band with an earlier one and are like the first that has it."""
    band_B24 = np.ascontiguousarray(slots_B2S[:, :, start : start + HALF_BAND])
    keys_B3 = np.column_stack([band_B24.view(np.uint64)[:, :, 0], seals_B])
    order = np.lexsort(keys_B3.T)  # stable: of equal keys the earlier first
    sorted_B3 = keys_B3[order]
    is_same = (sorted_B3[1:] == sorted_B3[:-1]).all(axis=1)
    places = np.arange(len(order))
    heads = np.maximum.accumulate(np.where(np.concatenate(([False], is_same)), 0, places))
    others = np.flatnonzero(is_same) + 1
    for batch in np.array_split(others, len(others) // _BATCH + 1):
        first, second = order[heads[batch]], order[batch]
        equal_B2 = (slots_B2S[first] == slots_B2S[second]).mean(axis=2)
        is_like = (equal_B2 >= similarity).all(axis=1)
        yield from zip(first[is_like].tolist(), second[is_like].tolist(), strict=True)


def _join(parents: NDArray[np.int64], one: int, other: int) -> None:
    """Put both under the lower of their roots."""
    first, second = _root(parents, one), _root(parents, other)
    parents[max(first, second)] = min(first, second)


def _root(parents: NDArray[np.int64], place: int) -> int:
    while parents[place] != place:
        parents[place] = parents[parents[place]]
        place = int(parents[place])
    return int(place)
