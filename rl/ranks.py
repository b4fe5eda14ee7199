"""Who starts the learner's processes of a life: we ourselves, with a launcher's help, or Ray.

one process, or `accelerate launch`   LaunchedRanks: the launcher has started a host per rank
`rl.learner.num_ranks` of 2 and more  TrainRanks (rl/train_ranks.py): Ray Train starts them
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from rl.job import Job
from rl.learner_process import LearnerProcess, learner_process
from rl.watchdog import dump_stacks

if TYPE_CHECKING:
    from rl.hosts import Hosts


class Ranks(Protocol):
    """What the supervisor needs of them."""

    def begun(
        self, job: Job, joined: AbstractContextManager[str]
    ) -> AbstractContextManager[tuple[LearnerProcess, str]]:
        """The learners of all ranks, and Ray, as long as this lasts.

        Args:
            joined: the cluster of this life, with its address.

        Returns:
            Rank 0's learner, and the cluster's address.
        """
        ...

    def require_all(self) -> None:
        """Once we were told to leave: was it because another rank's host has died?

        Raises:
            WorkersLostError: naming it.
        """
        ...


@dataclass(frozen=True, slots=True)
class LaunchedRanks:
    """One learner, or those of all the processes that a launcher has started.

    Example:
        LaunchedRanks({"RANK": "0", "WORLD_SIZE": "2", …}, hosts)
    """

    environment: Mapping[str, str] = field(default_factory=dict)
    """By which the launcher made us rank 0, for our learner."""
    hosts: Hosts | None = None
    """Those of the other ranks, where there are any."""

    @contextmanager
    def begun(
        self, job: Job, joined: AbstractContextManager[str]
    ) -> Iterator[tuple[LearnerProcess, str]]:
        """See `Ranks.begun`; learners come up while Ray starts, for their imports take long."""
        with (
            learner_process(job, lambda: dump_stacks(job), self.environment) as learner,
            self.hosts.life(job, learner.give_up) if self.hosts else nullcontext(),
            joined as address,
        ):
            yield learner, address

    def require_all(self) -> None:
        """See `Ranks.require_all`."""
        if self.hosts:
            self.hosts.require_all()
