"""Source, buffer and ledger kept in step: the loop's whole bookkeeping, without a clock or Ray.

    open(0) ─▶ send(draw) ─▶ settle(draw, group) ─▶ plan(step) ─▶ publish(step + 1) ─▶ send(draw) …
                   ▲               │ flat or broken, draws left
                   └───────────────┘ (settle returns the draw that replaces it)

What a version's curriculum knows is exactly the outcomes of the slots consumed before it, told in
slot order. So with `max_staleness: 0` the run is a pure function of the seed and of the groups, and
from any version on the books can be brought forward again by the outcomes alone (`replay`).

`late: drop` is the number `late_floor` below 1: a step is ready as soon as that share of its slots
is settled, and `drop_late` gives the others up. Their draws come back, first in line, in the slots
that the step's own publication opens. A draw that comes back is waited for, so none is put off for
ever; and near the end of the run, when no slots open any more, all are.

After `max_empty_steps` steps in a row without a group that teaches, publications widen the
curriculum's band until one teaches; with quotas (curation/mixture.py) each capability's own band is
widened by its own slots. Steps and slots count, not seconds: draws follow from outcomes alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import cast

from curation.curriculum import Curriculum
from curation.mixture import Mixture, MixtureState, require_quotas
from ground.errors import DataError
from ground.records import Group, Prompt
from rl.buffer import LATE, Buffer, Outcome, Plan, Slot
from rl.config import RlSection
from rl.groups import outcome_of
from rl.ledger import Ledger, State
from rl.objective_config import AdvantageSection, BaselineAdvantages
from rl.saved import SavedDraw, SavedSlot, saved_draw, saved_slot
from rl.source import Draw, Source
from rl.survey import NO_SLOT, SURVEYED, Survey, SurveyState
from rl.verdicts import Broken, verdict

_CENTERED = BaselineAdvantages()


class Books:
    """The state of every slot, draw and prompt of a run."""

    def __init__(
        self,
        source: Source,
        buffer: Buffer,
        write: Callable[[Mapping[str, object]], None],
        advantages: AdvantageSection = _CENTERED,
        late_floor: float = 1.0,
        max_empty_steps: int = 3,
        survey: Survey | None = None,
    ) -> None:
        self.source, self.buffer, self.ledger = source, buffer, Ledger(write)
        self.survey = survey
        self._advantages, self._late_floor = advantages, late_floor
        self._max_empty_steps, self._empty_steps = max_empty_steps, 0
        self._late: list[Draw] = []
        """Given up by a step that is published, and still without a slot."""
        self.version = 0
        """The last published version, whose draws are being made."""

    @staticmethod
    def of(
        section: RlSection,
        prompts: Sequence[Prompt],
        seed: int,
        write: Callable[[Mapping[str, object]], None],
    ) -> Books:
        """The books of a run as they are before the first draw.

        Args:
            prompts: those that are trained on.
            write: receives the ledger's records.
        """
        curriculum = Curriculum(
            prompts,
            section.curriculum,
            seed=seed,
            group_size=section.group_size,
            steps=section.steps,
        )
        mixture = None
        if section.quotas:
            require_quotas(section.quotas, {prompt.capability for prompt in prompts})
            mixture = Mixture(
                section.quotas, batch=section.groups_per_step, patience=section.max_empty_steps
            )
        source = Source(
            curriculum,
            steps=section.steps,
            groups_per_step=section.groups_per_step,
            max_staleness=section.max_staleness,
            max_refills=section.max_refills,
            mixture=mixture,
        )
        buffer = Buffer(
            groups_per_step=section.groups_per_step, max_staleness=section.max_staleness
        )
        survey = None
        if groups := section.curriculum.survey_groups:
            survey = Survey(prompts, groups=groups, max_staleness=section.max_staleness, seed=seed)
        floor = section.late_floor if section.late == "drop" else 1.0
        empty = section.max_empty_steps
        return Books(source, buffer, write, section.advantages, floor, empty, survey)

    @property
    def curriculum(self) -> Curriculum:
        """What is known of the prompts as of `version`."""
        return self.source.curriculum

    @property
    def mixture(self) -> Mixture | None:
        """Account of the quotas, if the recipe has any."""
        return self.source.mixture

    def open(self) -> list[Draw]:
        """Open the slots that the current version makes room for; returns their first draws."""
        opened, self._late = self.source.open(self.version, self._late)
        slots = [self.buffer.open(draws) for draws in opened]
        for slot in slots:
            if not slot.draw.is_again:
                self.ledger.admit(slot.draw)
        if self.survey and self.source.opens(self.version + self.buffer.max_staleness + 1):
            for asking in self.survey.open(self.version):
                self.ledger.admit(asking)
        return [slot.draw for slot in slots]

    def send(self, draw: Draw) -> None:
        """A draw goes to the fleet."""
        self.ledger.move(draw.number, State.IN_FLIGHT)

    def settle(self, draw: Draw, group: Group | Broken) -> Draw | None:
        """A group came back, or why there is none; returns the draw that replaces it."""
        return self.record(self.outcome_of(draw, group))

    def outcome_of(self, draw: Draw, group: Group | Broken) -> Outcome:
        """What a group means for its draw; nothing is written down yet."""
        return verdict(draw, group, self._advantages, self.version + 1)

    def record(self, outcome: Outcome) -> Draw | None:
        """Write down what became of a draw; returns the draw that replaces it."""
        if outcome.draw.slot == NO_SLOT:
            return self._record_asking(outcome)
        number, refill = outcome.draw.number, self.buffer.put(outcome)
        if not outcome.reason:
            self.ledger.move(number, State.BUFFERED)
        elif outcome.reason == LATE:
            self.ledger.move(number, State.READMITTED, LATE)
        else:
            self.ledger.move(number, State.FILTERED, outcome.reason)
        if refill is not None:
            self.ledger.admit(refill)
        return refill

    def waits_for(self, draw: Draw) -> bool:
        """Whether a draw's group is still wanted; not when it was given up as late."""
        if draw.slot == NO_SLOT:
            return self.survey is not None and self.survey.waits_for(draw)
        return self.buffer.waits_for(draw)

    def is_ready(self, step: int) -> bool:
        """Whether a step's slots are open, and settled or such that the step may do without."""
        return self.buffer.has(step) and self._may_go_on(step)

    def drop_late(self, step: int) -> list[Draw]:
        """Give up what of a ready step is not settled, askings included; returns the draws."""
        late = [slot.draw for slot in self.buffer.waiting(step)]
        for draw in late:
            self.record(Outcome(draw, LATE))
        unanswered = self.survey.waiting(step) if self.survey else []
        for asking in unanswered:
            self.record(Outcome(asking, LATE))
        return late + unanswered

    def put_off(self, asking: Draw) -> None:
        """An asking makes room for a draw, and waits again."""
        self.ledger.move(asking.number, State.READMITTED, "put off")

    def describe_waiting(self, step: int) -> str:
        """What a step still waits for, in words."""
        if not self.buffer.has(step):
            return f"version {step - self.buffer.max_staleness} to be published"
        draws = [slot.draw for slot in self.buffer.waiting(step)]
        draws += self.survey.waiting(step) if self.survey and not draws else []
        names = ", ".join(f"slot {draw.slot} (group {draw.group_id})" for draw in draws[:3])
        return names + (f" and {len(draws) - 3} more" if len(draws) > 3 else "")

    def plan(self, step: int) -> Plan:
        """What a settled step trains on; asking twice gives the same."""
        slots = self.buffer.take(step)
        surveyed = self.survey.take(step) if self.survey else []
        return Plan.of(step, [outcome for slot in slots for outcome in slot.outcomes], surveyed)

    def publish(self, version: int) -> list[Draw]:
        """Version `version` is out: its step's slots are trained and freed, new ones opened.

        Returns the first draws of the new slots.
        """
        slots = self.buffer.free(version - 1)
        outcomes = [outcome for slot in slots for outcome in slot.outcomes]
        trained = [outcome.draw for outcome in outcomes if not outcome.reason]
        for draw in trained:
            self.ledger.move(draw.number, State.TRAINED)
        self.version = version
        self._late += [outcome.draw for outcome in outcomes if outcome.reason == LATE]
        outcomes += self.survey.free(version - 1) if self.survey else []
        told = [each.observation for each in outcomes if each.observation]
        refused = [each.draw.prompt.id for each in outcomes if each.reason == "refused"]
        if self.survey:
            self.survey.see(each.prompt_id for each in told)
            self.survey.leave_out(refused)
        self._empty_steps = 0 if trained else self._empty_steps + 1
        self.curriculum.observe(version, told, refused, wide=self._starved(slots))
        return self.open()

    def replay(self, outcomes: Sequence[Outcome]) -> None:
        """Do a step again that was journaled: the same outcomes, then its publication.

        Raises:
            DataError: the journal's draws are not those that these books make.
        """
        step = self.version
        seen: Counter[int] = Counter()
        for outcome in outcomes:
            draw, turn = outcome.draw, seen[outcome.draw.slot]
            seen[draw.slot] += 1
            own = _same(self._draw_at(draw, turn), draw, step)
            if self.waits_for(own):
                self.send(own)
                self.record(replace(outcome, draw=own))
        if self.buffer.num_waiting(step) or (self.survey and self.survey.waiting(step)):
            raise DataError(f"the journal of step {step} is not whole", where="rl/groups")
        self.publish(step + 1)

    def state_dict(self) -> dict[str, object]:
        """Everything as JSON types.

        What was buffered stays out, for it is sampled again; a filtered group stays in, for its
        slot has gone on to the next draw.
        """
        return {
            "version": self.version,
            "empty_steps": self._empty_steps,
            "mixture": self.mixture and self.mixture.state_dict(),
            "curriculum": self.curriculum.state_dict(),
            "survey": self.survey and self.survey.state_dict(),
            "ledger": self.ledger.state_dict(),
            "slots": [saved_slot(slot) for slot in self.buffer.slots()],
            "late": [saved_draw(draw) for draw in self._late],
        }

    def load_state_dict(self, state: Mapping[str, object], pool: Mapping[str, Prompt]) -> None:
        """Go back to a saved state, with every open draw re-admitted.

        Args:
            pool: prompts by id; the curriculum has refused a pool that differs by then.
        """
        self.version = cast(int, state["version"])
        self._empty_steps = cast(int, state["empty_steps"])
        self.curriculum.load_state_dict(**cast(dict, state["curriculum"]))
        if self.mixture:
            self.mixture.load_state_dict(cast(MixtureState, state["mixture"]))
        if self.survey:
            self.survey.load_state_dict(cast(SurveyState, state["survey"]), pool)
        ledger = cast(dict, state["ledger"])
        self.ledger.load_state_dict(ledger["drawn"], ledger["open"], ledger["closed"])
        for saved in cast(Sequence[SavedSlot], state["slots"]):
            self._restore(saved, pool)
        self._late = [
            Draw(late["number"], late["slot"], 0, late["version"], pool[late["prompt"]])
            for late in cast(Sequence[SavedDraw], state["late"])
        ]
        self.ledger.readmit_all("resumed")

    def waiting(self) -> list[Draw]:
        """The draws that are to be sent after a restart, oldest slot first."""
        return [slot.draw for slot in self.buffer.slots() if not slot.is_settled]

    def askings(self) -> list[Draw]:
        """Those of the survey that are not answered, oldest first."""
        return self.survey.waiting() if self.survey else []

    def _record_asking(self, outcome: Outcome) -> None:
        """Write down what became of an asking: whatever its group shows, nobody trains on it."""
        reason = SURVEYED if outcome.observation else outcome.reason
        assert self.survey
        self.survey.put(replace(outcome, reason=reason, group=None))
        end = State.WITHDRAWN if reason == LATE else State.FILTERED
        self.ledger.move(outcome.draw.number, end, reason)

    def _starved(self, slots: Sequence[Slot]) -> frozenset[str]:
        """Capabilities that need a wider band, after slots that are through."""
        starved = self._empty_steps >= self._max_empty_steps
        everyone = self.curriculum.capabilities if starved else ()
        if self.mixture is None:
            return frozenset(everyone)
        for slot in slots:
            taught = any(not outcome.reason for outcome in slot.outcomes)
            told = any(outcome.observation for outcome in slot.outcomes)
            self.mixture.settle(slot.capability, taught=taught, told=told)
        return self.mixture.dry | frozenset(everyone)

    def _may_go_on(self, step: int) -> bool:
        if not (num_waiting := self.buffer.num_waiting(step)):
            is_due = self._late_floor == 1 and not self.buffer.max_staleness
            return not (is_due and self.survey and self.survey.waiting(step))
        share = 1 - num_waiting / self.buffer.groups_per_step
        is_dropping = share >= self._late_floor and self.source.opens(step + 1)
        return is_dropping and not any(slot.draw.is_again for slot in self.buffer.waiting(step))

    def _draw_at(self, draw: Draw, turn: int) -> Draw | None:
        """What these books have drawn in its place: by number, or as its slot's turn comes."""
        if draw.slot == NO_SLOT:
            return self.survey and self.survey.of_step(self.version).get(draw.number)
        found = next((s for s in self.buffer.take(self.version) if s.number == draw.slot), None)
        return found.draws[turn] if found and turn < len(found.draws) else None

    def _restore(self, saved: SavedSlot, pool: Mapping[str, Prompt]) -> None:
        prompts = [pool[prompt_id] for prompt_id in saved["prompts"]]
        first = None
        if saved["again"] is not None:
            first = Draw(saved["again"], saved["slot"], 0, saved["version"], prompts[0])
        draws = self.source.draws_of(saved["slot"], saved["version"], prompts, first)
        spent = zip(draws, saved["outcomes"], strict=False)
        self.buffer.open(draws, [replace(outcome_of(row), draw=draw) for draw, row in spent])


def _same(own: Draw | None, draw: Draw, step: int) -> Draw:
    """The draw that these books have made where the journal has that one.

    Raises:
        DataError: they are not the same.
    """
    if own is None or _identity(own) != _identity(draw):
        raise DataError(
            f"step {step} must have consumed draw {own and _identity(own)} of slot {draw.slot}, "
            f"the journal has {_identity(draw)}",
            where="rl/groups",
            fix="give the prompts it began with, or start the stage again (--from rl)",
        )
    return own


def _identity(draw: Draw) -> tuple[int, str, int]:
    return draw.number, draw.prompt.id, draw.version
