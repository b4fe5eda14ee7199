"""Which system instruction is put in front of a prompt: drawn from its capability's pool."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ground.config import Instruction, Systems
from ground.constraints import RULES, Constraint, Value
from rollout.compliance import Demand
from rollout.seeds import sample_seed

ANY = "any"
"""Pool of capabilities that have none of their own."""
_STEPS = 1 << 53
Among = Literal["all", "trained", "untrained"]
"""Which entries and values of a pool are drawn from."""
Lot = Callable[[str, int], int]
"""A number below the second argument, drawn for the purpose that the first one names."""


@dataclass(frozen=True, slots=True)
class SystemInstruction:
    """What is said to a whole group, and what of it can be checked.

    Example:
        SystemInstruction("Use at most 50 words.", Demand(Constraint("max_words", 50), 0.2))
    """

    text: str = ""
    demand: Demand | None = None


def draw_system(
    systems: Systems,
    capability: str,
    *,
    run_seed: int,
    prompt_id: str,
    pass_: int | str,
    among: Among = "all",
) -> SystemInstruction:
    """One instruction for a whole group, seeded by who asks; none where there is no pool.

    Args:
        among: `all` is what training draws from; `trained` its constraints alone; `untrained` those
            constraints with the values that training never draws.

    Example:
        pools {"math": ["Be brief.", "Show your work."]} → every math group gets one of the two
    """
    pool = systems.pools.get(capability) or systems.pools.get(ANY) or []
    entries = [Instruction(text=each) if isinstance(each, str) else each for each in pool]
    if among != "all":
        entries = [each for each in entries if _values(each, among)]
    if not entries:
        return SystemInstruction()

    def lot(what: str, size: int) -> int:
        return sample_seed(run_seed, prompt_id, f"{what} {pass_}", 0) % size

    entry = _weighted(entries, lot)
    values = _values(entry, among)
    if entry.constraint is None:
        return SystemInstruction(entry.text)
    constraint = Constraint(entry.constraint, values[lot("value", len(values))])
    wordings = RULES[entry.constraint].wordings
    words = wordings[lot("wording", len(wordings))].format(value=constraint.value)
    return SystemInstruction(
        " ".join(filter(None, (entry.text, words))), Demand(constraint, systems.compliance_share)
    )


def _values(entry: Instruction, among: Among) -> tuple[Value, ...]:
    return entry.untrained_values if among == "untrained" else entry.trained_values


def _weighted(entries: list[Instruction], lot: Lot) -> Instruction:
    """An entry, as often as its weight says."""
    if len({each.weight for each in entries}) == 1:
        return entries[lot("system", len(entries))]
    left = lot("system", _STEPS) / _STEPS * sum(each.weight for each in entries)
    for entry in entries:
        left -= entry.weight
        if left < 0:
            return entry
    return entries[-1]
