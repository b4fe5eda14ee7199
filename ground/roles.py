"""What every process of ours does first: say who it is."""

from __future__ import annotations

from ground import faults, stacks


def enter_role(role: str) -> None:
    """This process is the supervisor, controller, learner, keeper, courier, rollout/<n>,
    judge/<n> or reward.

    From now on its armed faults strike, and it tells its stacks when it is asked to.
    """
    faults.enter(role)
    stacks.offer(role)
