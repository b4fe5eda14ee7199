"""What the measured speeds of RL say about its devices, in a sentence for `packtrain status`."""

from __future__ import annotations

import math
from collections.abc import Mapping

from packtrain.observe import number
from rl.speeds import BAND, Speeds, wanted

_MANY = 1_000_000


def advice(metrics: Mapping[str, object]) -> str:
    """Who waits for whom and what would mend it; empty when both keep pace, or before speeds are
    known.

    Args:
        metrics: the newest line of rl/metrics.jsonl.
    """
    names = ("learner_seconds_per_sample", "rollout_seconds_per_sample", "workers")
    learner, rollout, workers = (number(metrics.get(name)) for name in names)
    if not learner or not rollout or not workers:
        return ""
    pace = rollout / workers
    if metrics.get("overlaps") == 0:
        return _in_turns(learner, pace, rollout / (workers + 1))
    number_wanted = wanted(Speeds(learner, rollout, 0.0), int(workers), 1, _MANY)
    if pace > learner * (1 + BAND):
        return (
            f"the learner waits {1 - learner / pace:.0%} of the time: {number_wanted} workers "
            f"would keep pace with it, there are {workers:g} (rl.fleet.num_workers; "
            "rl.fleet.max_workers lets the fleet grow by itself)"
        )
    if pace < learner * (1 - BAND):
        enough = min(math.ceil(rollout / learner), int(workers))
        fewer = f"; {enough} workers would do" if enough < workers else ""
        return (
            f"rollout idles {1 - pace / learner:.0%} of the time: give the learner "
            f"{learner / (learner + rollout):.0%} of the devices{fewer}"
        )
    return ""


def _in_turns(learner: float, pace: float, pace_of_one_more: float) -> str:
    """The step is the sum, so whoever gets faster makes it shorter."""
    step = learner + pace
    return (
        f"learner and rollout take turns, {pace / step:.0%} of a step is rollout's: one worker "
        f"more would save {(pace - pace_of_one_more) / step:.0%} of the step "
        f"(rl.fleet.num_workers), side by side would save up to {min(learner, pace) / step:.0%} "
        "(rl.max_staleness=1)"
    )
