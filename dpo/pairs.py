"""Preference pairs from the groups that RL sampled: best against worst, and what was bad.

    group → chosen: passed, ended by itself, highest reward, then shortest
          → rejected: a failed answer, lowest reward first; if all passed, one with a fault of form
          → reason: truncated > repetition > format_break > length_outlier > wrong

Pure functions; the same groups give the same pairs.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import get_args

from dpo.config import PairsSection, Reason
from ground.records import Pair, Prompt

SEVERITY: tuple[Reason, ...] = get_args(Reason)
"""Reasons from the plainest fault to the vaguest; an answer with several gets the first."""

_FAULTS_OF_FORM = frozenset({"truncated", "repetition", "length_outlier"})
"""What makes an answer worse even though its result is right."""

_FORMAT_MARKS = re.compile(r"\\boxed\{|<answer>|####|=>|```|(?i:\banswer\s*:)")
_LEAST_UNIT, _MOST_UNIT, _LEAST_REPEATS = 4, 200, 3


@dataclass(frozen=True, slots=True)
class Answer:
    """One rollout of a group, as far as preferences go.

    Example:
        Answer(0, "2+2 => 4", reward=1.0, passed=True, ended=True, num_tokens=8)
    """

    index: int
    text: str
    reward: float
    passed: bool
    ended: bool
    """The model stopped by itself, rather than at the length limit."""
    num_tokens: int


@dataclass(frozen=True, slots=True)
class GroupRow:
    """One row of the groups file."""

    id: str
    version: int
    prompt: Prompt
    system: str
    answers: tuple[Answer, ...]


@dataclass(frozen=True, slots=True)
class MinedPair:
    """A pair, and where it comes from."""

    pair: Pair
    group: str
    version: int
    chosen_reward: float
    rejected_reward: float


@dataclass(frozen=True, slots=True)
class Mined:
    """What mining gave: the pairs, and why other groups gave none."""

    pairs: tuple[MinedPair, ...]
    counts: dict[str, int] = field(default_factory=dict)
    """Pairs by reason, and groups without a pair by cause."""


def mine_pairs(groups: Sequence[GroupRow], version: int, section: PairsSection) -> Mined:
    """At most one pair per prompt, from the group nearest to the model that has one.

    Args:
        version: of the model that DPO starts from. RL exports its best version, which need not be
            its last, so that a group may be as far ahead of it as another is behind.
    """
    counts: Counter[str] = Counter()
    found: dict[str, MinedPair] = {}
    for group in sorted(groups, key=lambda group: (abs(group.version - version), group.id)):
        if abs(group.version - version) > section.max_age:
            counts["group_too_far"] += 1
        elif group.prompt.id in found:
            counts["prompt_has_a_pair"] += 1
        elif isinstance(pair := pair_of(group, section), MinedPair):
            found[group.prompt.id] = pair
        else:
            counts[pair] += 1
    kept = _in_turn(found.values(), section.max_pairs)
    counts["over_max_pairs"] = len(found) - len(kept)
    counts.update(f"pair_{pair.pair.reason}" for pair in kept)
    return Mined(tuple(kept), {name: count for name, count in sorted(counts.items()) if count})


def pair_of(group: GroupRow, section: PairsSection) -> MinedPair | str:
    """The group's best against its worst answer, or why there is no such pair.

    Example:
        rewards [1, 0, 0, 1] → the shorter of answers 0 and 3 against answer 1
    """
    good = [a for a in group.answers if a.passed and a.ended and a.text and not is_looping(a.text)]
    if not good:
        return "nothing_to_choose"
    chosen = min(good, key=lambda answer: (-answer.reward, answer.num_tokens, answer.index))
    worse = [
        (reason, answer)
        for answer in group.answers
        if answer.text != chosen.text
        and (reason := fault(answer, chosen, section)) in section.reasons
    ]
    if not worse:
        return "nothing_to_reject"
    reason, rejected = min(
        worse,
        key=lambda fault: (
            fault[1].passed,
            fault[1].reward,
            SEVERITY.index(fault[0]),
            fault[1].index,
        ),
    )
    pair = Pair(group.prompt, chosen.text, rejected.text, reason, group.system)
    return MinedPair(pair, group.id, group.version, chosen.reward, rejected.reward)


def fault(answer: Answer, chosen: Answer, section: PairsSection) -> Reason | None:
    """What is worse about an answer than about the chosen one; None when nothing is."""
    excess = answer.num_tokens - chosen.num_tokens
    ratio = answer.num_tokens / max(1, chosen.num_tokens)
    faults: dict[Reason, bool] = {
        "truncated": not answer.ended,
        "repetition": is_looping(answer.text),
        "format_break": not format_marks(chosen.text) <= format_marks(answer.text),
        "length_outlier": ratio > section.outlier_ratio and excess >= section.outlier_tokens,
        "wrong": True,
    }
    for reason in SEVERITY:
        if faults[reason] and (not answer.passed or reason in _FAULTS_OF_FORM):
            return reason
    return None


def is_looping(text: str) -> bool:
    """Whether a text ends in the same 4 to 200 characters three times over, white space aside.

    Example:
        "2+2 => 4 => 4 => 4" → True;  "1000000" → False
    """
    text = " " + " ".join(text.split())
    for length in range(_LEAST_UNIT, min(_MOST_UNIT, len(text) // _LEAST_REPEATS) + 1):
        unit = text[-length:]
        if len(set(unit)) > 1 and text.endswith(unit * _LEAST_REPEATS):
            return True
    return False


def format_marks(text: str) -> set[str]:
    """Signs by which answers are found: boxes, answer tags, arrows, code fences."""
    return {re.sub(r"\s", "", mark).lower() for mark in _FORMAT_MARKS.findall(text)}


def _in_turn(pairs: Iterable[MinedPair], most: int) -> list[MinedPair]:
    """At most so many pairs, one capability after the other, nearest first within each."""
    by_capability: dict[str, list[MinedPair]] = defaultdict(list)
    for pair in pairs:
        by_capability[pair.pair.prompt.capability].append(pair)
    kept: list[MinedPair] = []
    for rank in range(max(map(len, by_capability.values()), default=0)):
        for capability in sorted(by_capability):
            if rank < len(by_capability[capability]) and len(kept) < most:
                kept.append(by_capability[capability][rank])
    return kept
