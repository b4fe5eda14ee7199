"""Gives tasks to the members of a roster, and again to others where one is lost under them.

    deal(task) → attempt by whoever serves and has least to do → what came of it
                   └─ lost, late, or failed for no fault of the task ─▶ next attempt elsewhere

Rollout workers, teachers and engines are all dealt to in this way (rollout/fleet.py,
rl/teachers.py, rollout/replicas.py). Nothing is queued or dropped here: a caller waits until a
member is there that has a place free.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

from ground.errors import InfraError
from rollout.roster import Roster
from rollout.seat import Kind, Seat

Value = TypeVar("Value")

_MAX_FAILED_TASKS = 3
"""Tasks in a row that may fail on a member which still answers pings, before it is replaced."""


class Dealer(Generic[Kind]):
    """Deals to the members of a roster.

    Example:
        await dealer.deal("the word on group 9c1f.0", ask, where="teachers", fix="…")

    Args:
        max_attempts: members that may be lost under one task before the task itself is blamed.
        most_each: tasks that a member is given at a time; others wait here, where no deadline runs.
        loaded: told each time when a member gets a task or is rid of one: how many it had, and has.
    """

    def __init__(
        self,
        roster: Roster[Kind],
        max_attempts: int,
        most_each: float = math.inf,
        loaded: Callable[[int, int], None] = lambda before, now: None,
    ) -> None:
        self._roster, self._max_attempts = roster, max_attempts
        self._most_each, self._loaded = most_each, loaded
        self.retries = 0
        """Attempts that were lost with their member, or failed on it."""

    async def deal(
        self,
        task: str,
        attempt: Callable[[Seat[Kind], int], Awaitable[Value]],
        *,
        where: str,
        fix: str,
    ) -> Value:
        """Have a task done.

        Args:
            task: what errors call it.
            attempt: asks the member of a seat; the number counts askings from 0.
            where: whose tasks these are, for the error.
            fix: what to look at when nobody could do it.

        Raises:
            InfraError: `max_attempts` members were lost under it.
            WorkersLostError: too few of them are left.
            PacktrainError: what a member says is wrong with the task.
        """
        causes: list[str] = []
        tried: set[int] = set()
        for number in range(self._max_attempts):
            seat = await self._least_loaded(tried)
            tried.add(seat.index)
            try:
                return await self._attempted(seat, number, attempt)
            except InfraError as error:
                causes.append(f"{seat.name}: {error.what}")
                self.retries += 1
        raise InfraError(
            f"{task} must be done in {self._max_attempts} attempts",
            where=where,
            why="; ".join(causes),
            fix=fix,
        )

    async def _attempted(
        self,
        seat: Seat[Kind],
        number: int,
        attempt: Callable[[Seat[Kind], int], Awaitable[Value]],
    ) -> Value:
        life = seat.lost
        self._load(seat, 1)
        try:
            value = await attempt(seat, number)
        except InfraError as error:
            if not life.done():
                _count_failure(seat, error)
            raise
        finally:
            self._load(seat, -1)
            self._roster.tell()
        seat.failures = seat.failed_tasks = 0
        return value

    def _load(self, seat: Seat[Kind], tasks: int) -> None:
        seat.in_flight += tasks
        self._loaded(seat.in_flight - tasks, seat.in_flight)

    async def _least_loaded(self, tried: set[int]) -> Seat[Kind]:
        """Of those with a place free, one that has not failed at this task if there is any.

        While some serve and have their hands full, no deadline runs; it does while none serves.
        """

        def serving() -> list[Seat[Kind]]:
            return [seat for seat in self._roster.seats if seat.is_serving]

        while True:
            await self._roster.until(lambda: bool(serving()))
            if free := [seat for seat in serving() if seat.in_flight < self._most_each]:
                break
            await self._roster.change()
        return min(free, key=lambda seat: (seat.index in tried, seat.in_flight, seat.index))


def _count_failure(seat: Seat[Kind], error: InfraError) -> None:
    """A member may answer pings and still do no work: too many in a row end its life."""
    seat.failed_tasks += 1
    if seat.failed_tasks >= _MAX_FAILED_TASKS:
        seat.lose(f"{seat.failed_tasks} tasks in a row failed, the last with: {error.what}")
