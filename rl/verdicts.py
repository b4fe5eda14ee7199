"""What a group that came back means for its draw, or why there is none."""

from __future__ import annotations

from typing import Literal

from curation.bands import Band, band
from curation.curriculum import Observation
from ground.records import Group
from rl.advantages import group_advantages
from rl.buffer import Outcome
from rl.objective_config import AdvantageSection
from rl.source import Draw

Broken = Literal["broken", "refused"]
"""Why a draw has no group: the machinery could not finish it, or the prompt does not fit the engine
and leaves the pool. Neither says anything about how hard the prompt is."""
MISVERSIONED = "misversioned"
"""Reason of a group with a token of a version that it cannot have been sampled with: older than its
slot, or newer than what was handed out. A worker errs about its weights."""


def verdict(
    draw: Draw, group: Group | Broken, advantages: AdvantageSection, newest: int
) -> Outcome:
    """The outcome of a draw.

    Args:
        newest: version that was handed out last, or is being handed out.
    """
    if not isinstance(group, Group):
        return Outcome(draw, group)
    versions = group.versions
    if len(group.rollouts) < 2 or not versions:
        return Outcome(draw, "broken")
    passed = sum(rollout.passed for rollout in group.rollouts)
    observation = Observation(draw.prompt.id, passed, len(group.rollouts))
    if min(versions) < draw.version or max(versions) > newest:
        return Outcome(draw, MISVERSIONED, None, group)
    kind = band(group, group_advantages(group, advantages))
    return Outcome(draw, "" if kind is Band.MIXED else kind, observation, group)
