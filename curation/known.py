"""What the curriculum knows at a version, as rows that a person can look at."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of one prompt, or of those of a capability that share their mined evidence.

    Example:
        Known("math", None, prompts=40, successes=4.0, trials=8.0, mean=0.5, deviation=0.15,
        status="active", share=0.2)       # a fifth of the draws goes to these forty
    """

    capability: str
    prompt_id: str | None
    """None where several prompts, or mined ones that were never observed, are meant."""
    prompts: int
    successes: float
    trials: float
    """Evidence as it has decayed."""
    mean: float
    deviation: float
    """Of the pass rate's posterior: Beta(1 + successes, 1 + failures), moved by as much as the
    capability has come since."""
    status: str
    """active, retired, deferred or refused."""
    share: float
    """Of this version's draws in all, by weight and before quotas; the sum over a pool is 1."""
