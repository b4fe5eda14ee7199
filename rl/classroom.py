"""Groups between sampling and training that the teacher still has to speak to.

    put(outcome) → waiting → asked → settle(outcome with its word, or `untaught`)
                      └── no longer waited for (late): forgotten

Several are asked side by side, the oldest slot first, while the fleet samples others and the
learner trains. There are never more than the buffer has slots. A group that no teacher could speak
to is filtered with the reason `untaught` and drawn again: it is never trained on without its word.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Protocol

from distill.word import Word
from ground.errors import InfraError
from ground.records import Group
from rl.buffer import UNTAUGHT, Outcome
from rl.source import Draw

logger = logging.getLogger("packtrain")


class Speakers(Protocol):
    """What the classroom needs of rl/teachers.py."""

    @property
    def places(self) -> int:
        """Groups that may be asked about at a time."""
        ...

    async def speak(self, group: Group) -> Word:
        """The teacher's word on a group.

        Raises:
            InfraError: teachers were lost under it.
            WorkersLostError: none is left.
        """
        ...


class Classroom:
    """Carries groups to the teacher and back.

    Args:
        waits_for: whether a draw's group is still wanted.
        settle: takes an outcome that is decided.
    """

    def __init__(
        self,
        teachers: Speakers,
        waits_for: Callable[[Draw], bool],
        settle: Callable[[Outcome], Awaitable[None]],
    ) -> None:
        self._teachers, self._waits_for, self._settle = teachers, waits_for, settle
        self._queue: asyncio.PriorityQueue[tuple[int, int, Outcome]] = asyncio.PriorityQueue()
        self._asked = 0

    @property
    def places(self) -> int:
        """How many `run` side by side."""
        return self._teachers.places

    @property
    def num_groups(self) -> int:
        """Groups that wait or are asked about."""
        return self._queue.qsize() + self._asked

    def put(self, outcome: Outcome) -> None:
        """A group that would teach has come in."""
        self._queue.put_nowait((outcome.draw.slot, outcome.draw.attempt, outcome))

    async def run(self) -> None:
        """One of `places` loops."""
        while True:
            _, _, outcome = await self._queue.get()
            if not self._waits_for(outcome.draw):
                continue
            self._asked += 1
            try:
                taught = await self._taught(outcome)
            finally:
                self._asked -= 1
            if self._waits_for(outcome.draw):
                await self._settle(taught)

    async def _taught(self, outcome: Outcome) -> Outcome:
        assert outcome.group
        try:
            return replace(outcome, word=await self._teachers.speak(outcome.group))
        except InfraError as error:
            logger.warning("group %s is untaught: %s", outcome.draw.group_id, error)
            return replace(outcome, reason=UNTAUGHT, observation=None)
