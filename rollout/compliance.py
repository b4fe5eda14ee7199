"""Whether answers keep what a system instruction demands, and what that adds to their reward.

verdict on the task ─┬─ passed ──────────────────────────────▶ passed, untouched
                     └─ reward ─▶ (1 - share) · reward + share · kept ─▶ reward
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ground.constraints import Constraint
from rollout.reward_pool import ScoredText

PART = "compliance:"
"""Begins the name of a reward part that tells of a constraint; the constraint's name follows."""


@dataclass(frozen=True, slots=True)
class Demand:
    """A constraint that the system instruction of a group states.

    Example:
        Demand(Constraint("max_words", 50), share=0.2)
    """

    constraint: Constraint
    share: float
    """Part of the reward that keeping it is worth."""


def with_compliance(
    scored: Sequence[ScoredText], texts: Sequence[str], demand: Demand | None
) -> list[ScoredText]:
    """Verdicts with compliance blended into the reward, never into what counts as solved.

    An answer that got no verdict earned nothing, and nothing is added.

    Example:
        reward 1, "max_words 2" kept, share 0.2 → 1.0; broken → 0.8; reward 0, kept → 0.2
    """
    if demand is None:
        return list(scored)
    return [_blended(each, text, demand) for each, text in zip(scored, texts, strict=True)]


def compliance_rates(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Share of answers that kept their constraint, by its name, and of all that had one.

    Example:
        parts [{"compliance:bullets": 1}, {"compliance:bullets": 0}, {}]
        → {"compliance": 0.5, "compliance/bullets": 0.5}
    """
    kept: defaultdict[str, list[float]] = defaultdict(list)
    for each in parts:
        for name, value in each.items():
            if name.startswith(PART):
                kept[name.removeprefix(PART)].append(value)
    every = [value for values in kept.values() for value in values]
    named = {f"compliance/{name}": sum(v) / len(v) for name, v in sorted(kept.items())}
    return {"compliance": sum(every) / len(every), **named} if every else {}


def _blended(scored: ScoredText, text: str, demand: Demand) -> ScoredText:
    if scored.error:
        return scored
    kept = float(demand.constraint.holds(text))
    reward = (1 - demand.share) * scored.reward + demand.share * kept
    parts = {**scored.parts, "task": scored.reward, PART + demand.constraint.name: kept}
    return replace(scored, reward=reward, parts=parts)
