"""Who may still speak: leases end what nobody owns any more, fences refuse what comes too late."""

from __future__ import annotations

import logging
import os
import threading
import time

from ground.errors import InfraError

ABANDONED = 3
"""Exit code of a process whose lease has lapsed."""

logger = logging.getLogger(__name__)


class Lease:
    """Ends this process when it was not renewed for so long: its owner is gone.

        renewed ⇄ running → lapsed (the process ends with exit code 3)

    A thread named `lease` watches, so that a busy event loop does not matter.
    """

    def __init__(self, owner: str, seconds: float) -> None:
        self._owner, self._seconds = owner, seconds
        self._renewed = time.monotonic()
        threading.Thread(target=self._watch, name="lease", daemon=True).start()

    def renew(self) -> None:
        """The owner lives."""
        self._renewed = time.monotonic()

    def _watch(self) -> None:
        while time.monotonic() - self._renewed < self._seconds:
            time.sleep(min(self._seconds / 4, 1.0))
        logger.error(
            "the %s was silent for %g s: it is gone, so this ends", self._owner, self._seconds
        )
        os._exit(ABANDONED)


class Fence:
    """Refuses messages of another life of the run.

    Example:
        Fence(2).check(1) raises InfraError: "messages of life 2 of the run are taken, got one of 1"
    """

    def __init__(self, incarnation: int) -> None:
        self._incarnation = incarnation

    def check(self, incarnation: int) -> None:
        """Let a message of this life pass.

        Raises:
            InfraError: it is of another one, most likely of a process that was given up.
        """
        if incarnation != self._incarnation:
            raise InfraError(
                f"messages of life {self._incarnation} of the run are taken, "
                f"got one of life {incarnation}",
                where="fence",
            )
