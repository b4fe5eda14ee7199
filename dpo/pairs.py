"""Preference pairs from the groups that RL sampled: best against worst, and what was bad.

    group → chosen: passed, ended by itself, highest reward, of middle length
          → rejected: an answer with a fault of form, the plainest first; else a failed one
          → reason: a fault (rollout/quality.py) > regression > wrong

Light DPO is for corner cases of quality, while being right is RL's business: pairs that are only
`wrong` come last and are a bounded share. Pure functions; the same groups give the same pairs.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import get_args

from dpo.config import PairsSection, Reason
from ground.records import Finish, Pair, Prompt
from rollout.quality import fault_of, typical

SEVERITY: tuple[Reason, ...] = get_args(Reason)
"""Reasons from the plainest fault to the vaguest; an answer with several gets the first."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One rollout of a group, as far as preferences go.

    Example:
        Answer(0, "2+2 => 4", reward=1.0, passed=True, finish="stop", num_tokens=8)
    """

    index: int
    text: str
    reward: float
    passed: bool
    finish: Finish
    num_tokens: int
    error: str = ""
    """Why there is no verdict; such an answer is neither chosen nor rejected."""


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
    """At most one pair per prompt: a fault of form before a wrong result, then the nearest group.

    Args:
        version: of the model that DPO starts from. RL exports its best version, which need not be
            its last, so that a group may be as far ahead of it as another is behind.
    """
    counts: Counter[str] = Counter()
    candidates: list[MinedPair] = []
    solved = _solved_since(groups)
    for group in groups:
        if abs(group.version - version) > section.max_age:
            counts["group_too_far"] += 1
            continue
        was_solved = solved.get(group.prompt.id, group.version) < group.version
        pair = pair_of(group, section, was_solved=was_solved)
        if isinstance(pair, MinedPair):
            candidates.append(pair)
        else:
            counts[pair] += 1

    def rank(mined: MinedPair) -> tuple[bool, int, str]:
        return mined.pair.reason == "wrong", abs(mined.version - version), mined.group

    found: dict[str, MinedPair] = {}
    for mined in sorted(candidates, key=rank):
        found.setdefault(mined.pair.prompt.id, mined)
    counts["prompt_has_a_pair"] = len(candidates) - len(found)
    kept = _bounded(list(found.values()), section, counts)
    counts.update(f"pair_{pair.pair.reason}" for pair in kept)
    return Mined(tuple(kept), {name: count for name, count in sorted(counts.items()) if count})


def pair_of(group: GroupRow, section: PairsSection, *, was_solved: bool = False) -> MinedPair | str:
    """The group's best against its worst answer, or why there is no such pair.

    Args:
        was_solved: an earlier model solved this prompt every time, so a failure is a regression.

    Example:
        rewards [1, 0, 0, 1], answer 2 without a final answer → answer 3 against answer 2
    """
    judged = [answer for answer in group.answers if not answer.error]
    chosen = typical(judged)
    if chosen is None:
        return "nothing_to_choose"
    worse: list[tuple[Reason, Answer]] = []
    for answer in judged:
        reason = _reason(answer, chosen, group.prompt, section, was_solved)
        if reason in section.reasons and answer.text != chosen.text:
            worse.append((reason, answer))
    if not worse:
        return "nothing_to_reject"
    reason, rejected = min(
        worse,
        key=lambda fault: (SEVERITY.index(fault[0]), fault[1].reward, fault[1].index),
    )
    pair = Pair(group.prompt, chosen.text, rejected.text, reason, group.system)
    return MinedPair(pair, group.id, group.version, chosen.reward, rejected.reward)


def _reason(
    answer: Answer, chosen: Answer, prompt: Prompt, section: PairsSection, was_solved: bool
) -> Reason | None:
    """What is worse about an answer than about the chosen one; None when nothing is."""
    if answer.finish == "aborted":
        return None
    fault = fault_of(
        answer,
        chosen,
        " ".join(message.content for message in prompt.messages),
        ratio=section.outlier_ratio,
        tokens=section.outlier_tokens,
    )
    if fault or answer.passed:
        return fault
    return "regression" if was_solved else "wrong"


def _solved_since(groups: Iterable[GroupRow]) -> dict[str, int]:
    """The earliest version that solved a prompt in every answer of a group, by prompt."""
    versions: dict[str, int] = {}
    for group in groups:
        if group.answers and all(answer.passed for answer in group.answers):
            first = versions.get(group.prompt.id, group.version)
            versions[group.prompt.id] = min(first, group.version)
    return versions


def _bounded(
    pairs: Sequence[MinedPair], section: PairsSection, counts: Counter[str]
) -> list[MinedPair]:
    """Faults of form first, then as many merely wrong pairs as their share and the total allow."""
    faulty = [pair for pair in pairs if pair.pair.reason != "wrong"]
    wrong = [pair for pair in pairs if pair.pair.reason == "wrong"]
    kept = _in_turn(faulty, section.max_pairs)
    share = Fraction(str(section.max_wrong_share))
    allowed = int(len(kept) * share / (1 - share)) if share < 1 else len(wrong)
    added = _in_turn(wrong, min(allowed, section.max_pairs - len(kept)))
    counts["over_max_pairs"] = len(faulty) - len(kept)
    counts["over_max_wrong"] = len(wrong) - len(added)
    return kept + added


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
