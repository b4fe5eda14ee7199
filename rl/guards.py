"""What ends a run, or holds a step back, before damage is done.

- `check_finite`: a loss or gradient that is no number; the update is not made (exit 5).
- `EssBrake`: tokens too far from the policy that sampled them; the update is made smaller, and a
  run of such steps ends the run (exit 5).
- `NoSignalGuard`: nothing to learn from for several steps; ends the run with the reasons (exit 5).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable

from ground.errors import DivergedError
from rl.buffer import Plan

Check = Callable[[float | None], None]
"""Takes a gradient's norm, None for one that is not known yet, and raises where that, or the loss
it knows of, is not finite."""

_FIXES = {
    "all-0": "easier prompts: every answer was wrong; mine again with this model",
    "all-1": "harder prompts: every answer was right",
    "flat": "a reward that tells good from bad: all answers earned the same",
    "broken": "workers that finish their groups: look at the run's log folder",
    "refused": "prompts that fit the engine: raise rl.engine.max_length",
    "late": "more time: all groups were late; set rl.late to wait, or raise rl.late_floor",
    "untaught": "teachers that live: look at the run's log folder, and at rl.distill.pass_tokens",
    "misversioned": "workers with the right weights: look at the run's log folder",
}


def check_finite(loss: float, grad_norm: float | None, *, step: int, num_rows: int) -> None:
    """Refuse a step whose loss or gradient is NaN or infinite; call it before the update.

    Both are global numbers, equal on every rank, so that all ranks stop together.
    """
    if not math.isfinite(loss + (grad_norm or 0.0)):
        norm = "" if grad_norm is None else f" and a gradient norm {grad_norm:g}"
        raise DivergedError(
            f"loss and gradient must be finite, got {loss:g}{norm}",
            where=f"rl, step {step}",
            why=f"{num_rows} rollouts were kept in the stage's diverged/ folder",
            fix="look at the saved rollouts, or lower rl.optimizer.learning_rate and make the "
            "stage again (--from rl)",
        )


class EssBrake:
    """Shrinks the update of a step whose tokens weigh like few, and stops after many such steps.

    An importance-weighted mean of N tokens with effective share e is as noisy as a plain mean of
    e·N tokens. Above the floor nothing happens; below it the learning rate is multiplied with
    e / floor, the linear rule for a smaller batch. The rate and not the gradient, since Adam
    divides the gradient's size out. Nothing is skipped, so every sample is trained once, and a
    small step lets the samplers come nearer. A share of 0, where a mask dropped all, moves nothing.

    The share is that of the weights which the loss applies, truncated and masked: one token with
    rho = 1000 makes the raw share tiny and the truncated update no worse.

    Example:
        floor 0.5: share 0.8 → 1.0; share 0.2 → 0.4; with max_steps 3 the third in a row raises
    """

    def __init__(self, floor: float, max_steps: int) -> None:
        self._floor, self._max_steps = floor, max_steps
        self.steps = 0
        """Braked steps in a row, which a cut keeps."""

    def factor(self, share: float, step: int) -> float:
        """What to multiply the step's learning rate with; call it before the update.

        Raises:
            DivergedError: this is the last of `max_steps` braked steps in a row.
        """
        if share >= self._floor:
            self.steps = 0
            return 1.0
        self.steps += 1
        if self.steps >= self._max_steps:
            raise DivergedError(
                f"the effective share of a step's tokens must not be below {self._floor:g} "
                f"{self._max_steps} times in a row, got {share:.3f}",
                where=f"rl, step {step}",
                why="learner and samplers are too far apart: old samples, too large steps, or an "
                "engine that computes other log-probs than the learner",
                fix="look at fresh_gap_mean, which is a rounding when engine and learner agree; "
                "then lower rl.max_staleness or rl.optimizer.learning_rate, or set rl.ess_floor=0, "
                "and make the stage again (--from rl)",
            )
        return share / self._floor


class NoSignalGuard:
    """Stops a run that has nothing to learn from, and says why.

    It is patient until the curriculum was widened (rl/books.py) and that was in vain too:
    `RlSection.max_starved_steps`.

    Example:
        max_empty_steps 7: seven steps in a row without a group that teaches → DivergedError with
        "why: 192 groups were filtered: all-1 180, all-0 12"
    """

    def __init__(self, max_empty_steps: int) -> None:
        self._max_empty_steps, self._empty_steps = max_empty_steps, 0
        self._reasons: Counter[str] = Counter()

    def state_dict(self) -> dict[str, object]:
        """Steps and reasons so far, as JSON types."""
        return {"empty_steps": self._empty_steps, "reasons": dict(self._reasons)}

    def load_state_dict(self, empty_steps: int, reasons: dict[str, int]) -> None:
        """Go back to a saved state."""
        self._empty_steps, self._reasons = empty_steps, Counter(reasons)

    def check(self, plan: Plan) -> None:
        """Count a step; a group that teaches begins the count anew."""
        if plan.groups:
            self._empty_steps, self._reasons = 0, Counter()
            return
        self._empty_steps += 1
        self._reasons.update(plan.filtered)
        if self._empty_steps < self._max_empty_steps:
            return
        ranked = self._reasons.most_common() or [("broken", 0)]
        histogram = ", ".join(f"{reason} {count}" for reason, count in ranked)
        total = sum(self._reasons.values())
        raise DivergedError(
            f"at least one group in {self._max_empty_steps} steps must teach something, none did",
            where=f"rl, step {plan.step}",
            why=f"{total} groups were filtered: {histogram}",
            fix=f"give it {_FIXES[ranked[0][0]]}",
        )
