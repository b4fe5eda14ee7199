"""What SFT on less data leaves for RL: the hardest rows, random ones or the easiest.

    python -m benchmarks.pruning            7 arms, three seeds, about an hour
    python -m benchmarks.pruning --quick    the hardest half, one seed

The herd's teacher judges its SFT rows once per seed. Then the student is trained on all of them, on
half and on a twentieth: the hardest, the easiest, or random ones, the same share of each capability
(curation/pruning.py), always for two epochs, so that less data is a lighter SFT as well, as it is
with Meta. After that comes the same RL for all: prompts, steps, rollouts, learning rate, seeds.

Meta says that SFT can over-constrain a model and restrict exploration in RL. If that is so here,
more SFT leaves less entropy and a lower pass@16 for RL to work with, and RL ends lower, or gains
less, after it. The figures tell all three; none of them has a goal. The rows of the herd are all
right and not quite half of them are thought out, in every arm alike: what differs is how many there
are and how hard.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random
from statistics import fmean

import pyarrow.parquet as pq

from benchmarks.harness import Figure, Report, run_benchmark
from benchmarks.processes import trail

SEEDS = (0, 1, 2)
WHICH = ("hardest", "random", "easiest")
ARMS = (("all", 1.0), *((which, share) for share in (0.5, 0.05) for which in WHICH))
_QUICK_ARMS = (("hardest", 0.5),)
_EPOCHS, _RL_STEPS, _PROMPTS = 2, 20, 200
_ENGINE = {"num_slots": 256, "max_length": 256, "threads": 2}

_COLUMNS = (
    ("entropy after sft", "nats", None),
    ("pass@1 after sft", "%", None),
    ("pass@16 after sft", "%", None),
    ("pass@1 after rl", "%", 6.0),
    ("rl's gain", "points", None),
)
"""What is told of an arm, its unit, and how far a quick run may fall short of it."""

Row = Mapping[str, object]
Numbers = dict[str, float]


def measure(quick: bool) -> Report:
    """All arms on three seeds; a quick run has one of either."""
    arms, seeds = (_QUICK_ARMS, SEEDS[:1]) if quick else (ARMS, SEEDS)
    found: dict[str, list[Numbers]] = defaultdict(list)
    for seed in seeds:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            rows = _judged(folder, seed)
            for which, share in arms:
                arm = arm_name(which, share)
                found[arm].append(_arm(folder, chosen(rows, which, share, seed), seed))
    figures = [
        Figure(f"{arm}: {what}", fmean(each[what] for each in numbers), unit, tolerance=tolerance)
        for arm, numbers in found.items()
        for what, unit, tolerance in _COLUMNS
    ]
    if not quick:
        figures += _claims(found)
    return Report(figures, {"by arm and seed": found})


def arm_name(which: str, share: float) -> str:
    """The arm in words: "all", "hardest 50%"."""
    return which if share == 1 else f"{which} {share:.0%}"


def chosen(rows: Sequence[Row], which: str, share: float, seed: int) -> list[Row]:
    """That share of each capability's rows, in the order of their ids.

    Example:
        ranks 0 (easiest) to 3 at share 0.5: hardest 2, 3; easiest 0, 1; random any two
    """
    parts: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        parts[str(row["capability"])].append(row)
    kept: list[Row] = []
    for name, part in sorted(parts.items()):
        part.sort(key=lambda row: int(str(row["meta_rank"])), reverse=which == "hardest")
        if which == "random":
            Random(f"pruning/{seed}/{name}").shuffle(part)
        kept += part[: round(share * len(part))]
    return sorted(kept, key=lambda row: str(row["id"]))


def _claims(found: Mapping[str, Sequence[Numbers]]) -> list[Figure]:
    """Differences in points, paired by seed: their mean and the least and greatest of them."""
    pairs = {
        "hardest over random, 50%": ("hardest 50%", "random 50%"),
        "hardest over easiest, 50%": ("hardest 50%", "easiest 50%"),
        "hardest 50% over all": ("hardest 50%", "all"),
        "hardest 5% over all": ("hardest 5%", "all"),
        "random 5% over all": ("random 5%", "all"),
    }
    figures: list[Figure] = []
    for name, (one, other) in pairs.items():
        for what in ("pass@1 after rl", "rl's gain"):
            gaps = [a[what] - b[what] for a, b in zip(found[one], found[other], strict=True)]
            figures.append(Figure(f"{name}: {what}", fmean(gaps), "points"))
            figures.append(Figure(f"{name}: {what}, least", min(gaps), "points"))
            figures.append(Figure(f"{name}: {what}, greatest", max(gaps), "points"))
    return figures


def _judged(folder: Path, seed: int) -> list[Row]:
    """The herd's SFT rows, each with its rank from the easiest; nothing is removed yet."""
    recipe = {
        "name": "judged",
        "seed": seed,
        "herd": {},
        "prune": {
            "fraction": 0,
            "judge": {"wording": "bare"},
            "engine": {**_ENGINE, "num_slots": 64},
        },
    }
    path = folder / "judged.yaml"
    path.write_text(json.dumps(recipe))
    trail(path, folder / "judged")
    return pq.read_table(folder / "judged" / "prune" / "kept.parquet").to_pylist()


def _arm(folder: Path, rows: Sequence[Row], seed: int) -> Numbers:
    """SFT on these rows and then RL; what the model is worth after either."""
    name = f"arm-{len(list(folder.glob('arm-*.yaml')))}"
    columns = ("id", "messages", "capability", "reward", "answer")
    lines = [json.dumps({key: row[key] for key in columns}) + "\n" for row in rows]
    (folder / f"{name}.jsonl").write_text("".join(lines))
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(_recipe(name, folder / "judged" / "herd", seed)))
    trail(path, folder / name)
    sft, rl = (_evaluated(folder / name / stage / "evaluation") for stage in ("sft", "rl"))
    return {
        "rows": float(len(rows)),
        **{f"{what} after sft": value for what, value in sft.items()},
        **{f"{what} after rl": value for what, value in rl.items()},
        "rl's gain": rl["pass@1"] - sft["pass@1"],
    }


def _recipe(name: str, herd: Path, seed: int) -> dict[str, object]:
    """The same for all arms but for the rows of SFT."""
    trainer = {"learning_rate": 2e-4, "rows_per_step": 32, "rows_per_pass": 32, "epochs": _EPOCHS}
    return {
        "name": name,
        "seed": seed,
        "model": {"path": str(herd / "student")},
        "data": {
            "sft": f"{name}.jsonl",
            "prompts": str(herd / "data" / "prompts.jsonl"),
            "heldout": str(herd / "data" / "heldout.jsonl"),
        },
        "sft": {"max_length": 256, "trainer": trainer},
        "rl": {
            "steps": _RL_STEPS,
            "groups_per_step": 32,
            "group_size": 8,
            "sampling": {"max_new_tokens": 64},
            "engine": {"num_slots": 64, "max_length": 256},
            "optimizer": {"learning_rate": 4e-4, "warmup_steps": 3},
            "micro_batch_tokens": 2048,
            "validation": {"prompts": 0},
            "checkpoint_every": 1000,
        },
        "evaluate": {
            "samples": 16,
            "k": [1, 16],
            "max_prompts": _PROMPTS,
            "max_new_tokens": 64,
            "engine": _ENGINE,
        },
    }


def _evaluated(folder: Path) -> Numbers:
    found = json.loads((folder / "evaluation.json").read_text())
    passes = {name: 100 * found[name]["mean"] for name in ("pass@1", "pass@16")}
    return {"entropy": found["entropy"], **passes}


if __name__ == "__main__":
    sys.exit(run_benchmark("pruning", measure, seeds=SEEDS))
