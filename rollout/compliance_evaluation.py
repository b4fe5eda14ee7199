"""How well a model keeps system instructions: with values it was trained on, and with others.

prompts and pools → instruction in front, drawn by seed → sampled, scored → kept? by constraint
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from ground.config import Systems
from ground.records import Message, Prompt
from rollout.config import EvaluateSection
from rollout.engine import Inference
from rollout.evaluation import Measured, measure
from rollout.passk import wilson
from rollout.reward_pool import Verifier
from rollout.systems import Among, SystemInstruction, draw_system

if TYPE_CHECKING:
    from ground.chat import ChatTemplate

_SETS: tuple[Among, ...] = ("trained", "untrained")


def measure_compliance(
    engine: Inference,
    chat: ChatTemplate,
    prompts: Sequence[Prompt],
    pool: Verifier,
    section: EvaluateSection,
    systems: Systems,
    seed: int,
) -> dict[str, object]:
    """Compliance per set of values, as `evaluation.json` holds it under `systems`.

    Prompts that bring a system instruction of their own are left out, and so is a set that no pool
    has values for.
    """
    found: dict[str, object] = {}
    for among in _SETS:
        asked = _asked(prompts, systems, seed, among)
        if asked:
            measured = measure(
                engine,
                chat,
                [_instructed(prompt, system) for prompt, system in asked],
                pool,
                section.sampling,
                samples=section.systems,
                seed=seed,
                occasion=f"evaluate {among} systems",
                stall_seconds=section.stall_seconds,
            )
            found[among] = compliance_of(measured, [system for _, system in asked])
    return found


def compliance_of(
    measured: Sequence[Measured], systems: Sequence[SystemInstruction]
) -> dict[str, object]:
    """Shares with Wilson's intervals: kept in all, by constraint, and solved under instructions.

    Example:
        {"n": 40, "compliance": {"mean": 0.8, …}, "solved": {…}, "by": {"bullets": {…}, …}}
    """
    kept: defaultdict[str, list[bool]] = defaultdict(list)
    solved: list[bool] = []
    for each, system in zip(measured, systems, strict=True):
        assert system.demand is not None
        constraint = system.demand.constraint
        kept[constraint.name] += [constraint.holds(rollout.text) for rollout in each.rollouts]
        solved += [rollout.passed for rollout in each.rollouts]
    every = [value for values in kept.values() for value in values]
    return {
        "n": len(every),
        "compliance": _share(every),
        "solved": _share(solved),
        "by": {name: {"n": len(v), **_share(v)} for name, v in sorted(kept.items()) if v},
    }


def _share(values: Sequence[bool]) -> dict[str, float]:
    return asdict(wilson(sum(values), len(values))) if values else {}


def _asked(
    prompts: Sequence[Prompt], systems: Systems, seed: int, among: Among
) -> list[tuple[Prompt, SystemInstruction]]:
    drawn = [
        (
            prompt,
            draw_system(
                systems,
                prompt.capability,
                run_seed=seed,
                prompt_id=prompt.id,
                pass_=f"evaluate {among}",
                among=among,
            ),
        )
        for prompt in prompts
        if prompt.messages[0].role != "system"
    ]
    return [(prompt, system) for prompt, system in drawn if system.demand]


def _instructed(prompt: Prompt, system: SystemInstruction) -> Prompt:
    """The prompt under its own id, so that seeds follow from it, with the instruction in front."""
    return replace(prompt, messages=(Message("system", system.text), *prompt.messages))
