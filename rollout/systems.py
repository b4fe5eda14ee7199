"""Which system instruction is put in front of a prompt: drawn from its capability's pool."""

from __future__ import annotations

from ground.config import Systems
from rollout.seeds import sample_seed

ANY = "any"
"""Pool of capabilities that have none of their own."""


def draw_system(
    systems: Systems, capability: str, *, run_seed: int, prompt_id: str, pass_: int | str
) -> str:
    """One instruction for a whole group, seeded by who asks; "" where there is no pool.

    Example:
        pools {"math": ["Be brief.", "Show your work."]} → every math group gets one of the two
    """
    pool = systems.pools.get(capability) or systems.pools.get(ANY)
    if not pool:
        return ""
    return pool[sample_seed(run_seed, prompt_id, f"system {pass_}", 0) % len(pool)]
