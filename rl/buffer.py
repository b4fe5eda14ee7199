"""Slots that hold drawn prompts until the learner has consumed them.

    open ──▶ put(outcome) ──▶ settled ──▶ take ──▶ free
              └── flat or broken, draws left: the next draw ──▶ put again

S = max_staleness, G = groups_per_step. The buffer has (S + 1) * G slots. A slot opened at version v
must be consumed while the learner is at version v + S or below. Every step consumes G slots and
every publication opens G, so when slots are numbered as they are opened, slot o can only be
consumed by step o // G: to take a younger one first would push an older one past its bound. Hence
the rule is one line: step u takes slots u * G to u * G + G - 1 and waits for them (`late: wait`).
Nothing is starved or dropped, and what a step trains on does not depend on who finished first.

A slot whose draws are all spent is settled without a group, and so is one that is given up because
it is late (`late: drop`, rl/books.py); they are consumed like the others.

Example (G = 2, S = 1): open 0 1 2 3; groups for 0, 2, 3 are in → step 0 waits for 1 (2 and 3 are
step 1's); 1 comes in → take(0) gives 0 and 1; version 1 is published → free(0), open 4 and 5.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from curation.curriculum import Observation
from distill.word import Word
from ground.records import Group
from rl.source import Draw

LATE = "late"
"""Reason of a draw whose step went on without it; it is asked again in another slot."""
UNTAUGHT = "untaught"
"""Reason of a group that the teacher could not speak to: it is not trained on without its word."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one draw.

    Example:
        Outcome(draw, reason="all-1", observation=Observation(id, 8, 8), group=group)
    """

    draw: Draw
    reason: str = ""
    """Why its group is not trained on; empty when it teaches."""
    observation: Observation | None = None
    """What it tells the curriculum; None when the group is broken or late."""
    group: Group | None = None
    """None when broken or late, or when the outcome was restored from a checkpoint."""
    word: Word | None = None
    """What the teacher said to a group that teaches; None where there is no teacher."""

    @property
    def without_group(self) -> Outcome:
        """The same without what was sampled and said: all that the books need."""
        return replace(self, group=None, word=None)


@dataclass(slots=True)
class Slot:
    """A place in the buffer, its draws in order of attempt and what came of those made so far."""

    number: int
    draws: Sequence[Draw]
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def is_settled(self) -> bool:
        """Whether a teaching group is in, all draws are spent, or it is given up as late."""
        ends = bool(self.outcomes) and self.outcomes[-1].reason in ("", LATE)
        return ends or len(self.outcomes) == len(self.draws)

    @property
    def capability(self) -> str:
        """What all its draws are of."""
        return self.draws[0].prompt.capability

    @property
    def group(self) -> Group | None:
        """The group to train on, if there is one."""
        last = self.outcomes[-1] if self.outcomes else None
        return last.group if last and not last.reason else None

    @property
    def draw(self) -> Draw:
        """The draw that an unsettled slot waits for."""
        return self.draws[len(self.outcomes)]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a step trains on, and why the other slots give nothing.

    Example:
        Plan(step=3, groups=(group,), filtered={"all-1": 2}, …)    # one slot kept, 2 flat draws
    """

    step: int
    groups: tuple[Group, ...]
    filtered: dict[str, int]
    """Draws of the step's slots that were filtered, by reason."""
    rollouts: int
    """Answers that the step's slots cost, those of filtered groups included."""
    reward: float
    """Mean reward of all those answers."""
    pass_rate: float
    """Share of them that the verifier accepted."""
    outcomes: tuple[Outcome, ...] = ()
    """What became of every draw of the step's slots, in slot order: what the journal keeps."""
    surveyed: tuple[Outcome, ...] = ()
    """What became of its askings (rl/survey.py), without their answers: the journal's as well."""

    @property
    def told(self) -> list[Outcome]:
        """Everything that the books need to do the step again, askings last."""
        return [outcome.without_group for outcome in (*self.outcomes, *self.surveyed)]

    @property
    def words(self) -> dict[str, Word]:
        """What the teacher said to the groups, by their ids."""
        return {o.group.id: o.word for o in self.outcomes if o.group and o.word}

    @staticmethod
    def of(step: int, outcomes: Sequence[Outcome], surveyed: Sequence[Outcome] = ()) -> Plan:
        """The plan that follows from what became of the draws."""
        answers = [r for outcome in outcomes if outcome.group for r in outcome.group.rollouts]
        return Plan(
            step=step,
            groups=tuple(o.group for o in outcomes if o.group and not o.reason),
            filtered=dict(Counter(outcome.reason for outcome in outcomes if outcome.reason)),
            rollouts=len(answers),
            reward=sum(answer.reward for answer in answers) / max(len(answers), 1),
            pass_rate=sum(answer.passed for answer in answers) / max(len(answers), 1),
            outcomes=tuple(outcomes),
            surveyed=tuple(surveyed),
        )


class Buffer:
    """The open slots; bounded by construction, since opening beyond capacity is a defect."""

    def __init__(self, *, groups_per_step: int, max_staleness: int) -> None:
        self.groups_per_step, self.max_staleness = groups_per_step, max_staleness
        self.capacity = (max_staleness + 1) * groups_per_step
        self._slots: dict[int, Slot] = {}
        self._unsettled: Counter[int] = Counter()
        """Slots by step; so that nobody has to look at them all whenever one is settled."""

    def __len__(self) -> int:
        """Slots that are held."""
        return len(self._slots)

    def open(self, draws: Sequence[Draw], outcomes: Iterable[Outcome] = ()) -> Slot:
        """Hold a slot from now until `free`.

        Args:
            outcomes: what became of its first draws already, in a run that is resumed.
        """
        number = draws[0].slot
        if len(self._slots) >= self.capacity or number in self._slots:
            raise ValueError(f"slot {number}: {len(self)} of {self.capacity} slots are held")
        slot = self._slots[number] = Slot(number, draws, list(outcomes))
        self._unsettled[self._step(slot)] += not slot.is_settled
        return slot

    def put(self, outcome: Outcome) -> Draw | None:
        """Record what became of a slot's current draw; returns the draw that replaces it."""
        slot = self._slots.get(outcome.draw.slot)
        if slot is None or not self.waits_for(outcome.draw):
            number = outcome.draw.number
            raise ValueError(f"slot {outcome.draw.slot} does not wait for draw {number}")
        slot.outcomes.append(outcome)
        self._unsettled[self._step(slot)] -= slot.is_settled
        return None if slot.is_settled else slot.draw

    def waits_for(self, draw: Draw) -> bool:
        """Whether what becomes of this draw still matters to its slot."""
        slot = self._slots.get(draw.slot)
        return slot is not None and not slot.is_settled and slot.draw == draw

    def has(self, step: int) -> bool:
        """Whether the slots of a step are open."""
        return step * self.groups_per_step in self._slots

    def is_ready(self, step: int) -> bool:
        """Whether every slot of a step is settled."""
        return not self.num_waiting(step)

    def num_waiting(self, step: int) -> int:
        """How many slots of a step are still waited for."""
        return self._unsettled[step]

    def waiting(self, step: int) -> list[Slot]:
        """The slots of a step that are still waited for."""
        return [slot for slot in self.take(step) if not slot.is_settled]

    def take(self, step: int) -> list[Slot]:
        """The slots of a step, in order; they stay held until `free`."""
        first = step * self.groups_per_step
        return [self._slots[number] for number in range(first, first + self.groups_per_step)]

    def free(self, step: int) -> list[Slot]:
        """Give up the slots of a step, all settled, and return them in order."""
        slots = self.take(step)
        if not self.is_ready(step):
            raise ValueError(f"step {step} has unsettled slots")
        for slot in slots:
            del self._slots[slot.number]
        del self._unsettled[step]
        return slots

    def slots(self) -> list[Slot]:
        """All held slots, oldest first."""
        return [self._slots[number] for number in sorted(self._slots)]

    @property
    def num_settled(self) -> int:
        """Slots whose group is in or given up: the buffer's fill."""
        return len(self._slots) - self._unsettled.total()

    def _step(self, slot: Slot) -> int:
        return slot.number // self.groups_per_step
