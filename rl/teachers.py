"""The teachers of a run as one: asks whoever has least to do, and another one if he is lost.

    speak(group) → attempt on a healthy teacher → Word
                     └─ lost, late, or failed for no fault of the group ─▶ next attempt elsewhere

Who is well is the roster's business, as with the fleet (rollout/roster.py): restarts within
`rl.fleet.max_restarts`, hung ones are replaced, and the run ends when none is left. Who is asked is
the dealer's (rollout/dealer.py).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Protocol, cast

from distill.config import RolloutDistillSection
from distill.word import Word
from ground.records import Group
from rl.teacher_use import TeacherUse
from rl.teacher_worker import TeacherConfig, TeacherWorker
from rollout.config import FleetSection
from rollout.dealer import Dealer
from rollout.fleet import WorkerStats, stats_of
from rollout.machines import Machines, StillMachines
from rollout.ray_worker import RayMember
from rollout.roster import Event, Roster
from rollout.seat import Crew, Member, Seat

_CREW = Crew("teacher", "teachers", "rl.distill.pass_tokens", "rl.distill.num_teachers")
_IN_HAND = 2
"""Groups that a teacher is given at a time: the next one is there when it is through with one."""
Said = tuple[Word, float]
"""A word, and the seconds that it took."""


class TeacherMember(Member, Protocol):
    """A member that speaks."""

    async def speak(self, group: Group) -> Said:
        """The word on a group."""
        ...


class RayTeacher(RayMember[TeacherWorker]):
    """A `TeacherMember` in a process of its own, somewhere in the Ray cluster."""

    def __init__(self, config: TeacherConfig, avoided: frozenset[str] = frozenset()) -> None:
        super().__init__(TeacherWorker, (config,), config.bundle, config.incarnation, avoided)

    async def speak(self, group: Group) -> Said:
        """See `TeacherWorker.speak`."""
        asked = pickle.dumps((self._incarnation, group))
        answer = await self._surely(lambda: self._actor.speak.remote(asked))
        return cast(Said, pickle.loads(answer))


class Teachers:
    """Spreads groups over teachers.

    Lives on one asyncio loop: `start → speak … → close`.

    Args:
        fleet: when one counts as lost is the same for teachers and workers.
        spawn: makes a new teacher (`RayTeacher`); returns at once.
        note: receives an event for the timeline, kinds "lost" and "restart".
        machines: on which they are; without them nothing ever happens to these.
    """

    def __init__(
        self,
        section: RolloutDistillSection,
        fleet: FleetSection,
        spawn: Callable[[], TeacherMember],
        note: Callable[[Event], None] = lambda event: None,
        machines: Machines | None = None,
    ) -> None:
        own = {"num_workers": section.num_teachers, "max_workers": None, "min_workers": 1}
        self._section = fleet.model_copy(update=own | {"spare": False})
        self._deadline = section.speak_deadline_seconds
        self._roster = Roster[TeacherMember](
            self._section, spawn, note, machines or StillMachines(), _CREW
        )
        self._dealer = Dealer(self._roster, self._section.max_attempts, _IN_HAND)
        self._seconds, self._rollouts = 0.0, 0

    @property
    def places(self) -> int:
        """Groups that may be asked about at a time."""
        return _IN_HAND * self._section.num_workers

    async def start(self) -> None:
        """Bring up all teachers; returns when they have their weights.

        Raises:
            WorkersLostError: none came up.
            DataError: their weights are not those of the run.
        """
        await self._roster.start()
        await self._roster.refit(0, None)

    async def speak(self, group: Group) -> Word:
        """The word on a group.

        Raises:
            InfraError: `rl.fleet.max_attempts` teachers were lost under it.
            WorkersLostError: none is left.
            PacktrainError: what a teacher says is wrong with the group, or with itself.
        """

        async def attempt(seat: Seat[TeacherMember], number: int) -> Word:
            assert seat.worker
            call, seconds = seat.worker.speak(group), self._deadline * seat.in_flight
            word, seconds = await seat.within(seconds, f"the word on {group.id}", call)
            self._seconds += seconds
            self._rollouts += len(group.rollouts)
            return word

        return await self._dealer.deal(
            f"a teacher's word on group {group.id}",
            attempt,
            where="teachers",
            fix="look at the teachers' logs for what this group does to them",
        )

    def use(self) -> TeacherUse:
        """What they have done since they began.

        Raises:
            PacktrainError: what they failed with.
        """
        self._roster.check()
        return TeacherUse(len(self._roster.staying), self._seconds, self._rollouts)

    def stats(self) -> list[WorkerStats]:
        """A snapshot of their seats."""
        return [stats_of(seat) for seat in self._roster.seats]

    async def close(self) -> None:
        """End all; their processes are gone when this returns."""
        await self._roster.close()
