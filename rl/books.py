"""Source, buffer and ledger kept in step: the loop's whole bookkeeping, without a clock or Ray.

    open(0) ─▶ send(draw) ─▶ settle(draw, group) ─▶ plan(step) ─▶ publish(step + 1) ─▶ send(draw) …
                   ▲               │ flat or broken, draws left
                   └───────────────┘ (settle returns the draw that replaces it)

What a version's curriculum knows is exactly the outcomes of the slots consumed before it, told in
slot order. So with `max_staleness: 0` the run is a pure function of the seed and of the groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Literal, TypedDict, cast

from curation.bands import Band, band
from curation.curriculum import Curriculum, Observation
from ground.records import Group, Prompt
from rl.advantages import group_advantages
from rl.buffer import Buffer, Outcome, Slot
from rl.config import AdvantageSection, BaselineAdvantages
from rl.ledger import Ledger, State
from rl.source import Draw, Source

Broken = Literal["broken", "refused"]
"""Why a draw has no group: the machinery could not finish it, or the prompt does not fit the engine
and leaves the pool. Neither says anything about how hard the prompt is."""


_CENTERED = BaselineAdvantages()


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


class _SavedSlot(TypedDict):
    slot: int
    prompts: list[str]
    version: int
    outcomes: list[tuple[str, dict[str, object] | None]]


class Books:
    """The state of every slot, draw and prompt of a run."""

    def __init__(
        self,
        source: Source,
        buffer: Buffer,
        write: Callable[[Mapping[str, object]], None],
        advantages: AdvantageSection = _CENTERED,
    ) -> None:
        self.source, self.buffer, self.ledger = source, buffer, Ledger(write)
        self._advantages = advantages
        self.version = 0
        """The last published version, whose draws are being made."""

    @property
    def curriculum(self) -> Curriculum:
        """What is known of the prompts as of `version`."""
        return self.source.curriculum

    def open(self) -> list[Draw]:
        """Open the slots that the current version makes room for; returns their first draws."""
        slots = [self.buffer.open(draws) for draws in self.source.open(self.version)]
        for slot in slots:
            self.ledger.admit(slot.draw)
        return [slot.draw for slot in slots]

    def send(self, draw: Draw) -> None:
        """A draw goes to the fleet."""
        self.ledger.move(draw.number, State.IN_FLIGHT)

    def settle(self, draw: Draw, group: Group | Broken) -> Draw | None:
        """A group came back, or why there is none; returns the draw that replaces it."""
        outcome = _outcome(draw, group, self._advantages)
        refill = self.buffer.put(outcome)
        if outcome.reason:
            self.ledger.move(draw.number, State.FILTERED, outcome.reason)
        else:
            self.ledger.move(draw.number, State.BUFFERED)
        if refill is not None:
            self.ledger.admit(refill)
        return refill

    def is_ready(self, step: int) -> bool:
        """Whether a step's slots are open and settled."""
        return self.buffer.has(step) and self.buffer.is_ready(step)

    def describe_waiting(self, step: int) -> str:
        """What a step still waits for, in words."""
        if not self.buffer.has(step):
            return f"version {step - self.buffer.max_staleness} to be published"
        draws = [slot.draw for slot in self.buffer.waiting(step)]
        names = ", ".join(f"slot {draw.slot} (group {draw.group_id})" for draw in draws[:3])
        return names + (f" and {len(draws) - 3} more" if len(draws) > 3 else "")

    def plan(self, step: int) -> Plan:
        """What a ready step trains on; asking twice gives the same."""
        slots = self.buffer.take(step)
        outcomes = [outcome for slot in slots for outcome in slot.outcomes]
        answers = [r for outcome in outcomes if outcome.group for r in outcome.group.rollouts]
        return Plan(
            step=step,
            groups=tuple(slot.group for slot in slots if slot.group),
            filtered=dict(Counter(outcome.reason for outcome in outcomes if outcome.reason)),
            rollouts=len(answers),
            reward=sum(answer.reward for answer in answers) / max(len(answers), 1),
            pass_rate=sum(answer.passed for answer in answers) / max(len(answers), 1),
        )

    def publish(self, version: int) -> tuple[list[Outcome], list[Draw]]:
        """Version `version` is out: its step's slots are trained and freed, new ones opened.

        Returns what became of the freed slots' draws, in slot order, and the new first draws.
        """
        slots = self.buffer.free(version - 1)
        outcomes = [outcome for slot in slots for outcome in slot.outcomes]
        for outcome in outcomes:
            if not outcome.reason:
                self.ledger.move(outcome.draw.number, State.TRAINED)
        self.version = version
        self.curriculum.refuse(o.draw.prompt.id for o in outcomes if o.reason == "refused")
        told = [outcome.observation for outcome in outcomes if outcome.observation]
        self.curriculum.observe(version, told)
        return outcomes, self.open()

    def state_dict(self) -> dict[str, object]:
        """Everything as JSON types. Groups stay out: what was buffered is sampled again."""
        return {
            "version": self.version,
            "curriculum": self.curriculum.state_dict(),
            "ledger": self.ledger.state_dict(),
            "slots": [_saved(slot) for slot in self.buffer.slots()],
        }

    def load_state_dict(
        self, state: Mapping[str, object], pool: Mapping[str, Prompt]
    ) -> list[Draw]:
        """Go back to a saved state; returns the draws that wait, all re-admitted.

        Args:
            pool: prompts by id; the curriculum has refused a pool that differs by then.
        """
        self.version = cast(int, state["version"])
        self.curriculum.load_state_dict(**cast(dict, state["curriculum"]))
        ledger = cast(dict, state["ledger"])
        self.ledger.load_state_dict(ledger["drawn"], ledger["open"], ledger["closed"])
        for saved in cast(Sequence[_SavedSlot], state["slots"]):
            self._restore(saved, pool)
        self.ledger.readmit_all("resumed")
        return [slot.draw for slot in self.buffer.slots() if not slot.is_settled]

    def _restore(self, saved: _SavedSlot, pool: Mapping[str, Prompt]) -> None:
        prompts = [pool[prompt_id] for prompt_id in saved["prompts"]]
        slot = self.buffer.open(self.source.draws_of(saved["slot"], saved["version"], prompts))
        for draw, (reason, seen) in zip(slot.draws, saved["outcomes"], strict=False):
            observation = Observation(**cast(dict, seen)) if seen else None
            slot.outcomes.append(Outcome(draw, reason, observation))


def _outcome(draw: Draw, group: Group | Broken, advantages: AdvantageSection) -> Outcome:
    if not isinstance(group, Group):
        return Outcome(draw, group)
    if len(group.rollouts) < 2:
        return Outcome(draw, "broken")
    passed = sum(rollout.passed for rollout in group.rollouts)
    observation = Observation(draw.prompt.id, passed, len(group.rollouts))
    kind = band(group, group_advantages(group, advantages))
    return Outcome(draw, "" if kind is Band.MIXED else kind, observation, group)


def _saved(slot: Slot) -> _SavedSlot:
    filtered = [outcome for outcome in slot.outcomes if outcome.reason]
    return {
        "slot": slot.number,
        "prompts": [draw.prompt.id for draw in slot.draws],
        "version": slot.draws[0].version,
        "outcomes": [
            (str(outcome.reason), asdict(outcome.observation) if outcome.observation else None)
            for outcome in filtered
        ],
    }
