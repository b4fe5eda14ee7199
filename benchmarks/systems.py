"""Whether system instructions are kept with values that were never trained, with pools and without.

    python -m benchmarks.systems [--quick]

RL on the herd's sums and words twice per seed, from the same base on the same prompts: once with
pools of system instructions that ask for a form and name a number, once without any. Then both, and
the base, answer held-out prompts under such instructions, once with the numbers that training draws
and once with others that it never draws (docs/rewards.md). Who keeps a constraint by accident keeps
it without pools too: what was learnt is the difference.

The constraints are those that the student can stumble upon, for RL finds nothing that is never
sampled: `max_words` is kept by answering at once, `min_words` by thinking aloud first. They pull in
opposite ways, so that no one way of answering keeps both. What the task itself is solved in stands
beside compliance, which might have been bought with that: sums at once are often wrong.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean

from benchmarks.flat_pools import STUDENT, write_prompts
from benchmarks.harness import Figure, Report, run_benchmark
from benchmarks.processes import stage, trail
from ground.herd.families import FAMILIES
from ground.herd.tasks import draw
from ground.records import Label, Prompt

SEEDS = (0, 1, 2)
_FAMILIES = ("chain_sum", "basic_arithmetic", "spell_backward", "letter_counting")
_LABELS: tuple[Label, ...] = ("easy", "medium")
_PROMPTS, _HELDOUT = 80, 30
"""Of each family and level."""
_STEPS, _QUICK_STEPS = 60, 40
_POOLS = {
    "compliance_share": 0.5,
    "pools": {
        "any": [
            {"constraint": "max_words", "values": [1, 3, 5], "heldout": [2, 4]},
            {"constraint": "min_words", "values": [3, 5, 8], "heldout": [4, 6]},
        ]
    },
}
_ENGINE = {"num_slots": 64, "max_length": 256}
_SETS = ("trained", "untrained")

Shares = Mapping[str, Mapping[str, float]]
"""Set of values → `compliance` and `solved`, and each constraint's own compliance."""


def measure(quick: bool) -> Report:
    """Three seeds; with --quick one, and fewer steps."""
    seeds, steps = (SEEDS[:1], _QUICK_STEPS) if quick else (SEEDS, _STEPS)
    found: dict[str, list[Shares]] = {"base": [], "without": [], "with": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_prompts(folder / "prompts.jsonl", _prompts("prompts", _PROMPTS))
        write_prompts(folder / "heldout.jsonl", _prompts("heldout", _HELDOUT))
        for seed in seeds:
            found["base"].append(_examined(folder, f"base-{seed}", STUDENT, seed))
            for arm, systems in (("without", {}), ("with", _POOLS)):
                model = _trained(folder, f"{arm}-{seed}", systems, seed, steps)
                found[arm].append(_examined(folder, f"{arm}-{seed}-exam", model, seed))
    return Report(_figures(found), {"shares by arm and seed": found, "pools": _POOLS})


def _figures(found: Mapping[str, Sequence[Shares]]) -> list[Figure]:
    figures: list[Figure] = []
    for values in _SETS:
        for arm, shares in found.items():
            for what in ("compliance", "solved"):
                mean = 100 * fmean(each[values][what] for each in shares)
                figures.append(Figure(f"{values} values, {arm}: {what}", mean, "%"))
    pairs = list(zip(found["with"], found["without"], strict=True))
    gains = [
        100 * (own["untrained"]["compliance"] - other["untrained"]["compliance"])
        for own, other in pairs
    ]
    paid = [
        100 * (other["untrained"]["solved"] - own["untrained"]["solved"]) for own, other in pairs
    ]
    return [
        *figures,
        Figure("untrained values: gain by pools", fmean(gains), "points", goal=10, tolerance=10),
        Figure("untrained values: least gain by pools", min(gains), "points"),
        Figure("untrained values: solved less", fmean(paid), "points", better="lower"),
    ]


def _trained(folder: Path, name: str, systems: Mapping[str, object], seed: int, steps: int) -> Path:
    """One run of RL; returns its model."""
    recipe = {
        "name": name,
        "seed": seed,
        "model": {"path": str(STUDENT)},
        "data": {"prompts": "prompts.jsonl"},
        "systems": systems,
        "rl": {
            "steps": steps,
            "groups_per_step": 16,
            "group_size": 8,
            "sampling": {"max_new_tokens": 64},
            "engine": _ENGINE,
            "optimizer": {"learning_rate": 4e-4, "warmup_steps": 3},
            "micro_batch_tokens": 2048,
            "validation": {"prompts": 0},
            "checkpoint_every": 1000,
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(recipe))
    trail(path, folder / name)
    return folder / name / "rl" / "model"


def _examined(folder: Path, name: str, model: Path, seed: int) -> Shares:
    """What a model makes of held-out prompts under instructions from the pools."""
    recipe = {
        "name": name,
        "seed": seed,
        "model": {"path": str(model)},
        "data": {"heldout": "heldout.jsonl"},
        "systems": _POOLS,
        "evaluate": {
            "samples": 1,
            "k": [1],
            "systems": 4,
            "max_new_tokens": 64,
            "engine": {**_ENGINE, "num_slots": 256, "threads": 2},
        },
    }
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(recipe))
    stage("rollout.evaluate", path, folder / name, "--of", "base")
    found = json.loads((folder / name / "base" / "evaluation" / "evaluation.json").read_text())
    return {values: _shares(found["systems"][values]) for values in _SETS}


def _shares(found: Mapping[str, Mapping]) -> dict[str, float]:
    by = {name: each["mean"] for name, each in found["by"].items()}
    return {"compliance": found["compliance"]["mean"], "solved": found["solved"]["mean"], **by}


def _prompts(purpose: str, number: int) -> list[Prompt]:
    """Questions; no two alike, also between purposes."""
    count = {"prompts": (0, _PROMPTS), "heldout": (_PROMPTS, _PROMPTS + number)}[purpose]
    found: list[Prompt] = []
    for name in _FAMILIES:
        for label in _LABELS:
            stream = draw(FAMILIES[name], label, "systems")
            fresh = dict.fromkeys(task.prompt for task in islice(stream, 4 * (_PROMPTS + number)))
            found += islice(fresh, *count)
    return found


if __name__ == "__main__":
    sys.exit(run_benchmark("systems", measure, seeds=SEEDS))
