"""Groups that are asked only to learn how hard their prompts are by now; nobody trains on them.

    open(v) ──▶ waiting ──▶ put(outcome) ──▶ take(v + S) ──▶ free: told at publication v + S + 1
                   └── not in when step v + S is ready and not waited for: put(late) ──▲

An asking is like a slot of step v + S, S = max_staleness: its tokens are as young as a trained
sample's, and its outcome is journaled with that step's plan and told at its publication. But it has
no place in the step, no gradient and no refill. Its number is negative, so that it shares neither
number nor seeds with a draw of a slot.

Whom to ask follows from what was told: the prompt that was observed longest ago comes first, those
that were never observed before all others, in an order of their own for each seed. So with n
askings a version the whole pool is seen every P / n versions, solved and hopeless ones included.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypedDict

import numpy as np

from curation.curriculum import Observation
from ground.records import Prompt
from rl.buffer import LATE, Outcome
from rl.source import Draw

SURVEYED = "surveyed"
"""Reason of a group that was asked for its pass rate alone."""
NO_SLOT = -1
_SALT = (0, 0, 5)
"""Sets its random numbers apart from those of draws, which have version and capability here."""


class SavedAsking(TypedDict):
    """An asking whose step was not trained yet, and what came of it."""

    number: int
    version: int
    prompt: str
    reason: str | None
    """None while it waits."""
    successes: int | None
    trials: int | None


class SurveyState(TypedDict):
    """What a checkpoint keeps."""

    place: int
    seen: list[str]
    late: list[str]
    gone: list[str]
    askings: list[SavedAsking]


class Survey:
    """The askings of a run, and whose turn it is.

    Args:
        groups: askings that a version opens.

    Example:
        survey.open(4) → two draws with numbers -9 and -10, for step 5 where S = 1
    """

    def __init__(
        self, prompts: Sequence[Prompt], *, groups: int, max_staleness: int, seed: int
    ) -> None:
        self._pool = {prompt.id: prompt for prompt in sorted(prompts, key=lambda p: p.id)}
        self._ids = list(self._pool)
        self._order = np.random.default_rng([seed, *_SALT]).permutation(len(self._ids))
        self._groups, self._max_staleness = groups, max_staleness
        self._place = 0
        """In the order of those that were never observed."""
        self._seen: OrderedDict[str, None] = OrderedDict()
        """Observed or asked before, the one that was longest ago first."""
        self._late: dict[str, None] = {}
        """Asked and not answered in time; they are before all others."""
        self._gone: dict[str, None] = {}
        """Those that do not fit the engine."""
        self._askings: dict[int, Draw] = {}
        self._outcomes: dict[int, Outcome] = {}

    def open(self, version: int) -> list[Draw]:
        """The askings of a version."""
        first = version * self._groups + 1
        opened = list[Draw]()
        for number, prompt in zip(range(first, first + self._groups), self._turns(), strict=False):
            draw = Draw(-number, NO_SLOT, 0, version, prompt)
            self._askings[draw.number] = draw
            opened.append(draw)
        return opened

    def waits_for(self, draw: Draw) -> bool:
        """Whether an asking is still wanted."""
        return draw.number in self._askings and draw.number not in self._outcomes

    def put(self, outcome: Outcome) -> None:
        """An asking is answered."""
        if not self.waits_for(outcome.draw):
            raise ValueError(f"the survey does not wait for asking {outcome.draw.number}")
        self._outcomes[outcome.draw.number] = outcome

    def waiting(self, step: int | None = None) -> list[Draw]:
        """Askings without an answer, of a step or of all, oldest first."""
        return [
            draw
            for draw in self._askings.values()
            if draw.number not in self._outcomes and step in (None, self._step(draw))
        ]

    def of_step(self, step: int) -> dict[int, Draw]:
        """The askings of a step by number, in the order in which they were opened."""
        return {n: draw for n, draw in self._askings.items() if self._step(draw) == step}

    def take(self, step: int) -> list[Outcome]:
        """What came of the askings of a step, in the order in which they were opened."""
        return [self._outcomes[n] for n in self.of_step(step) if n in self._outcomes]

    def free(self, step: int) -> list[Outcome]:
        """What came of the askings of a step is told: others have their turn first.

        Those that were late are the next ones. Nothing else changes whose turn it is, so that it
        follows from what was told, and not from when an answer came in.
        """
        outcomes = self.take(step)
        for outcome in outcomes:
            del self._askings[outcome.draw.number], self._outcomes[outcome.draw.number]
            self.see([outcome.draw.prompt.id])
        late = [outcome.draw.prompt.id for outcome in outcomes if outcome.reason == LATE]
        self._late |= dict.fromkeys(late)
        return outcomes

    def see(self, observed: Iterable[str]) -> None:
        """Prompts were observed, by whoever asked them: others have their turn first."""
        for prompt_id in observed:
            self._seen[prompt_id] = None
            self._seen.move_to_end(prompt_id)
            self._late.pop(prompt_id, None)

    def leave_out(self, refused: Iterable[str]) -> None:
        """Prompts that do not fit the engine are never asked again."""
        self._gone |= dict.fromkeys(refused)

    def state_dict(self) -> SurveyState:
        """The survey as JSON types."""
        return {
            "place": self._place,
            "seen": list(self._seen),
            "late": list(self._late),
            "gone": list(self._gone),
            "askings": [self._saved(draw) for draw in self._askings.values()],
        }

    def load_state_dict(self, state: SurveyState, pool: Mapping[str, Prompt]) -> None:
        """Go back to a saved state."""
        self._place, self._gone = state["place"], dict.fromkeys(state["gone"])
        self._seen, self._late = OrderedDict.fromkeys(state["seen"]), dict.fromkeys(state["late"])
        self._askings, self._outcomes = {}, {}
        for each in state["askings"]:
            draw = Draw(each["number"], NO_SLOT, 0, each["version"], pool[each["prompt"]])
            self._askings[draw.number] = draw
            if each["reason"] is not None:
                seen = None
                if each["successes"] is not None and each["trials"] is not None:
                    seen = Observation(draw.prompt.id, each["successes"], each["trials"])
                self._outcomes[draw.number] = Outcome(draw, each["reason"], seen)

    def _saved(self, draw: Draw) -> SavedAsking:
        outcome = self._outcomes.get(draw.number)
        seen = outcome.observation if outcome else None
        return {
            "number": draw.number,
            "version": draw.version,
            "prompt": draw.prompt.id,
            "reason": outcome.reason if outcome else None,
            "successes": seen.successes if seen else None,
            "trials": seen.trials if seen else None,
        }

    def _step(self, draw: Draw) -> int:
        return draw.version + self._max_staleness

    def _turns(self) -> Iterator[Prompt]:
        """Prompts in the order of their turns, without those that are being asked."""
        busy = {draw.prompt.id for draw in self._askings.values()}
        for prompt_id in [each for each in self._late if each not in busy | self._gone.keys()]:
            del self._late[prompt_id]
            busy.add(prompt_id)
            yield self._pool[prompt_id]
        while self._place < len(self._order):
            prompt_id = self._ids[self._order[self._place]]
            self._place += 1
            if prompt_id not in self._seen and prompt_id not in self._gone:
                yield self._pool[prompt_id]
        for prompt_id in list(self._seen):
            if prompt_id not in busy and prompt_id not in self._gone:
                yield self._pool[prompt_id]
