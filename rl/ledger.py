"""Where every drawn prompt is: in exactly one state, from draw to end.

    pending ──▶ in flight ──▶ buffered ──▶ trained
       ▲            │  └──▶ filtered/reason  │
       └ re-admitted/reason ◀────────────────┘           (any open state) ──▶ withdrawn/reason

Trained, filtered and withdrawn are final. A re-admitted draw waits again, because the process that
held it is gone or its step went on without it; it keeps its number, so that it can still be trained
only once. Sums close by
construction: a draw is counted in its state and nowhere else; `audit_ledger` proves it again from
the file alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum

from ground.errors import DataError
from rl.source import Draw


class State(StrEnum):
    """Where a draw is."""

    PENDING = "pending"
    IN_FLIGHT = "in flight"
    BUFFERED = "buffered"
    TRAINED = "trained"
    FILTERED = "filtered"
    READMITTED = "re-admitted"
    WITHDRAWN = "withdrawn"


_OPEN_NEXT: dict[State, frozenset[State]] = {
    State.PENDING: frozenset({State.IN_FLIGHT, State.READMITTED, State.WITHDRAWN}),
    State.READMITTED: frozenset({State.IN_FLIGHT, State.READMITTED, State.WITHDRAWN}),
    State.IN_FLIGHT: frozenset({State.BUFFERED, State.FILTERED, State.READMITTED, State.WITHDRAWN}),
    State.BUFFERED: frozenset({State.TRAINED, State.READMITTED, State.WITHDRAWN}),
}
"""Open states and where each may lead; a state that is missing here is final."""


class Ledger:
    """The states of all draws: open ones by number, closed ones as sums.

    Args:
        write: receives one record per admission and move, in order (`Journal.append`).

    Example:
        ledger.admit(draw); ledger.move(draw.number, State.IN_FLIGHT); …; ledger.counts()
        → {"drawn": 1, "in flight": 1}
    """

    def __init__(self, write: Callable[[Mapping[str, object]], None]) -> None:
        self._write = write
        self._open: dict[int, State] = {}
        self._closed: Counter[str] = Counter()
        self._drawn = 0

    def admit(self, draw: Draw) -> None:
        """A prompt was drawn: it is pending from now on."""
        if draw.number in self._open:
            raise ValueError(f"draw {draw.number} is in the ledger already")
        self._open[draw.number] = State.PENDING
        self._drawn += 1
        self._write(
            {
                "draw": draw.number,
                "prompt_id": draw.prompt.id,
                "capability": draw.prompt.capability,
                "version": draw.version,
                "slot": draw.slot,
                "attempt": draw.attempt,
                "state": State.PENDING,
            }
        )

    def move(self, number: int, state: State, reason: str = "") -> None:
        """Bring a draw to its next state."""
        before = self._open.get(number)
        if before is None or state not in _OPEN_NEXT[before]:
            raise ValueError(f"draw {number} cannot go from {before or 'closed'} to {state}")
        if state in _OPEN_NEXT:
            self._open[number] = state
        else:
            del self._open[number]
            self._closed[f"{state}/{reason}" if reason else state] += 1
        self._write({"draw": number, "state": state} | ({"reason": reason} if reason else {}))

    def readmit_all(self, reason: str) -> None:
        """Every open draw waits again: whoever held it is gone."""
        for number in sorted(self._open):
            self.move(number, State.READMITTED, reason)

    def withdraw_all(self, reason: str) -> None:
        """The run ends: no draw stays open."""
        for number in sorted(self._open):
            self.move(number, State.WITHDRAWN, reason)

    def counts(self) -> dict[str, int]:
        """Draws in all, and by state (closed ones with their reason)."""
        return {"drawn": self._drawn, **Counter(map(str, self._open.values())), **self._closed}

    def state_dict(self) -> dict[str, object]:
        """The ledger as JSON types."""
        states = {str(number): str(state) for number, state in self._open.items()}
        return {"drawn": self._drawn, "open": states, "closed": dict(self._closed)}

    def load_state_dict(self, drawn: int, open_: dict[str, str], closed: dict[str, int]) -> None:
        """Go back to a saved state."""
        self._drawn = drawn
        self._open = {int(number): State(state) for number, state in open_.items()}
        self._closed = Counter(closed)


def audit_ledger(records: Iterable[Mapping[str, object]]) -> dict[str, int]:
    """Follow every draw through the file and return the draws by final state.

    Raises:
        DataError: a draw moves without having been drawn, is drawn twice, leaves a final state,
            makes a forbidden move, or is still open at the end.
    """
    states: dict[int, State] = {}
    for line, record in enumerate(records, start=1):
        number, state = int(str(record["draw"])), State(str(record["state"]))
        before = states.get(number)
        is_legal = before is None if state is State.PENDING else _leads(before, state)
        if not is_legal:
            raise DataError(
                f"draw {number} cannot go from {before or 'undrawn'} to {state}",
                where=f"ledger.jsonl:{line}",
            )
        states[number] = state
    still_open = [number for number, state in states.items() if state in _OPEN_NEXT]
    if still_open:
        raise DataError(
            f"every draw must be closed at the end, {len(still_open)} are not: {still_open[:5]}",
            where="ledger.jsonl",
        )
    return {str(state): count for state, count in Counter(states.values()).items()}


def _leads(before: State | None, after: State) -> bool:
    return before is not None and after in _OPEN_NEXT.get(before, frozenset())
