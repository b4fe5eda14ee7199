"""Where slots get their prompts: all draws of a slot are fixed when the slot is opened.

    version v is published ──▶ open(v) ──▶ slots of the steps that v makes room for, draws included

A slot's first draw and the ones that replace it, should its group be flat, follow from
(seed, v, capability, n) and the curriculum at v alone; neither the order in which groups finish nor
the moment of a refill enters. What a slot never needed of its draws is never counted as drawn.
A draw that came too late for its step (`late: drop`) takes the place of the first draw of the first
new slot of its capability, number and seeds included.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from curation.curriculum import Curriculum
from curation.mixture import Mixture
from ground.records import Prompt


@dataclass(frozen=True, slots=True)
class Draw:
    """One asking of a prompt.

    Example:
        Draw(number=14, slot=4, attempt=2, version=0, prompt=prompt)      # with max_refills = 2
    """

    number: int
    """slot * (max_refills + 1) + attempt: the pass of its prompt, unique in the run."""
    slot: int
    attempt: int
    """0 at first, then one more for each flat or broken group that it replaces."""
    version: int
    """Version at which its slot was opened; no token of it is older."""
    prompt: Prompt
    is_again: bool = False
    """It was late for a step before, so this time it is waited for."""

    @property
    def group_id(self) -> str:
        """Id of the group it makes."""
        return f"{self.prompt.id}.{self.number}"

    @property
    def task_id(self) -> str:
        """The same, but for a draw that is asked again one that no earlier asking has had."""
        return f"{self.group_id}~{self.slot}" if self.is_again else self.group_id


class Source:
    """Opens slots, `groups_per_step` at each publication and `max_staleness` steps' more at first.

    Example:
        groups_per_step 2, max_staleness 1, 3 steps: slots 0-3 at version 0, then 4, 5, then none
    """

    def __init__(
        self,
        curriculum: Curriculum,
        *,
        steps: int,
        groups_per_step: int,
        max_staleness: int,
        max_refills: int,
        mixture: Mixture | None = None,
    ) -> None:
        self.curriculum, self.mixture = curriculum, mixture
        self._groups_per_step, self._max_staleness = groups_per_step, max_staleness
        self._num_slots, self._max_refills = steps * groups_per_step, max_refills

    def open(self, version: int, late: Sequence[Draw] = ()) -> tuple[list[list[Draw]], list[Draw]]:
        """The slots that a version makes room for, as the draws of each in order of attempt.

        A capability with g slots gives its k-th slot draws k, g + k, 2 g + k and so on: no prompt
        comes twice in a version before all of its capability were drawn.

        Args:
            late: draws to ask again, oldest first; returned second are those that found no slot.
        """
        first, last = self._range(version)
        turns = self._turns(last - first)
        counts = Counter(turns)
        again: dict[str, deque[Draw]] = {name: deque() for name in turns}
        left = [draw for draw in late if draw.prompt.capability not in again]
        for draw in late:
            if draw.prompt.capability in again:
                again[draw.prompt.capability].append(draw)
        seen: Counter[str] = Counter()
        slots: list[list[Draw]] = []
        for slot, capability in enumerate(turns, start=first):
            rank, stride = seen[capability], counts[capability]
            seen[capability] += 1
            places = range(rank, rank + stride * (self._max_refills + 1), stride)
            prompts = [self.curriculum.draw(version, capability, n) for n in places]
            waiting = again[capability]
            slots.append(
                self.draws_of(slot, version, prompts, waiting.popleft() if waiting else None)
            )
        left += [draw for waiting in again.values() for draw in waiting]
        return slots, sorted(left, key=late.index)

    def opens(self, version: int) -> bool:
        """Whether a version makes room for slots; near the end of the run none does."""
        first, last = self._range(version)
        return last > first

    def draws_of(
        self, slot: int, version: int, prompts: Sequence[Prompt], late: Draw | None = None
    ) -> list[Draw]:
        """The draws of a slot, given their prompts in order of attempt.

        Args:
            late: a draw of an earlier slot that is asked again in place of the first.
        """
        draws = [
            Draw(self._number(slot, attempt), slot, attempt, version, prompt)
            for attempt, prompt in enumerate(prompts)
        ]
        if late is not None:
            draws[0] = Draw(late.number, slot, 0, version, late.prompt, is_again=True)
        return draws

    def _turns(self, num_slots: int) -> list[str]:
        """Capability of each new slot: by quota in every step, or as the weights ask."""
        shares = self.curriculum.shares()
        if self.mixture is None:
            return _interleave(apportion(shares, num_slots))
        present = {name for name, share in shares.items() if share}
        steps = range(num_slots // self._groups_per_step)
        batches = [self.mixture.turns(self._groups_per_step, present) for _ in steps]
        return [name for counts in batches for name in _interleave(counts)]

    def _range(self, version: int) -> tuple[int, int]:
        """First slot that a version opens, and the one behind the last."""
        reach = version + self._max_staleness
        first = self._groups_per_step * (reach if version else 0)
        last = min(self._groups_per_step * (reach + 1), self._num_slots)
        return first, max(first, last)

    def _number(self, slot: int, attempt: int) -> int:
        return slot * (self._max_refills + 1) + attempt


def apportion(shares: Mapping[str, float], total: int) -> dict[str, int]:
    """Whole numbers closest to the shares that sum to `total` (largest remainder, then name).

    Example:
        apportion({"a": 0.5, "b": 0.3, "c": 0.2}, 4) == {"a": 2, "b": 1, "c": 1}
    """
    exact = {name: share * total for name, share in sorted(shares.items())}
    counts = {name: int(value) for name, value in exact.items()}
    by_remainder = sorted(exact, key=lambda name: counts[name] - exact[name])
    for name in by_remainder[: total - sum(counts.values())]:
        counts[name] += 1
    return counts


def _interleave(counts: Mapping[str, int]) -> list[str]:
    """Spread the names evenly over the sequence, so that every step mixes its capabilities."""
    places = [
        ((turn + 0.5) / count, name) for name, count in counts.items() for turn in range(count)
    ]
    return [name for _, name in sorted(places)]
