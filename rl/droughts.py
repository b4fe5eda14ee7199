"""Which capabilities lack groups that teach, told to whoever watches the run.

publish ──▶ tell(version): events "widened" and "lent", a line in the log ──▶ gauges()
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping

from rl.books import Books

logger = logging.getLogger("packtrain")


class Droughts:
    """Compares the books with what it told last.

    Args:
        note: receives an event for the timeline.
    """

    def __init__(
        self, books: Books, max_empty_steps: int, note: Callable[[Mapping[str, object]], None]
    ) -> None:
        self._books, self._max_empty_steps, self._note = books, max_empty_steps, note
        self.begin()

    def begin(self) -> None:
        """What the books say now needs no telling: a resumed run told it before."""
        self._wide, self._lent = self._books.curriculum.wide, _lent(self._books)

    def tell(self, version: int) -> None:
        """Say what this version's draws begin with; what is over goes without saying."""
        wide, lent = self._books.curriculum.wide, _lent(self._books)
        if fresh := wide - self._wide:
            counts = self._books.curriculum.counts()
            logger.warning(
                "no group of %d steps in %s teaches: from version %d on solved and hopeless "
                "prompts, of all there are %d and %d, get half of its draws",
                self._max_empty_steps,
                ", ".join(sorted(fresh)),
                version,
                counts["retired"],
                counts["deferred"],
            )
            self._event("widened", version, fresh)
        if fresh := lent - self._lent:
            logger.warning(
                "a wider band was in vain for %s: from version %d on the other capabilities have "
                "its quota, all but one slot a step, until a group of it teaches",
                ", ".join(sorted(fresh)),
                version,
            )
            self._event("lent", version, fresh)
        self.begin()

    def gauges(self) -> dict[str, float]:
        """Whether a band is wide; with quotas the share of each capability in all that was trained
        on, and by how many groups the worst one is off."""
        wide = {"curriculum_wide": float(bool(self._books.curriculum.wide))}
        if not (mixture := self._books.mixture):
            return wide
        total = max(sum(mixture.taught.values()), 1)
        shares = {f"trained_share/{name}": n / total for name, n in mixture.taught.items()}
        return wide | shares | {"quota_error": mixture.error}

    def _event(self, kind: str, version: int, capabilities: Collection[str]) -> None:
        now = time.time()
        event: dict[str, object] = {"time": now, "kind": kind, "role": "controller"}
        event |= {"start": now, "end": now, "version": version}
        self._note(event | {"capabilities": sorted(capabilities)})


def _lent(books: Books) -> frozenset[str]:
    return books.mixture.lent if books.mixture else frozenset()
