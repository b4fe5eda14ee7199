"""Our RL against TRL's GRPOTrainer: seconds and rollouts to the same held-out pass rate.

    python -m benchmarks.time_to_target            everything, about an hour and a half; goes on
                                                   where it was broken off (benchmarks/kept.py)
    python -m benchmarks.time_to_target --quick    the pool of 80 %, one seed, rates as committed

Both sides get the same base (the herd's student), prompts, group and batch size, sampling, verifier
function, optimizer (AdamW, the same betas, warm-up and clipping, a constant rate, no KL, no
balancing loss) and two threads in all: one process with two for TRL, two processes with one each
for ours. The learning rate is tuned for each over one grid, on a seed and a pool that are not
measured; TRL may then choose among ways its users set it (`TRL_WAYS`), ours may not.

    pools      38 learnable prompts among so many others that groups of eight, drawn uniformly, are
               flat for the base with a chance of 40, 60, 80 and 90 %; of the others two are solved
               to each hopeless one (flat_pools.py)
    target     pass@1 of 126 held-out prompts of the learnable kind, four answers each
    clock      from the start of a side's first process to the end of the step that makes the
               weights: imports, Ray, mining and what it costs to find out which prompts teach are
               in it, exams are not
    rollouts   every answer that was sampled, mined ones and those still in flight among them

The split takes one part after the other out of ours: overlap (`max_staleness: 0`, two threads for
whoever works), selection (no mining, no refills, and every prompt in so many copies that what is
seen of one says nothing of the others: uniform draws), learner (all rows in one padded pass).
The engine cannot be taken out; it and `generate` answer the same prompts side by side instead.
Where TRL or a part does not arrive within its steps, its ratio is what it is at least; where ours
does not, ours has lost: 0.

Two ways that TRL's users have on GPUs are none here: vLLM on a CPU goes on with the old experts of
a mixture whatever weights it is handed (docs/engines.md), besides taking half a minute to start;
transformers' continuous batching refuses Llama 4's chunked layers. Losses and advantages are each
side's own, as are its ways to deal with prompts that teach nothing: that is what is compared.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.contest import (
    MINED,
    OUR_STEPS,
    THREADS,
    TRL_STEPS,
    Outcome,
    Score,
    Work,
    run_ours,
    run_trl,
)
from benchmarks.flat_pools import assemble, heldout, read_kinds, write_prompts
from benchmarks.generators import speeds
from benchmarks.harness import RESULTS, Figure, Report, run_benchmark
from benchmarks.kept import Kept

Option = TypeVar("Option", float, str)

SEEDS = (0, 1, 2)
POOLS = (0.4, 0.6, 0.8, 0.9)
MAIN, LEARNABLE, TARGET = 0.8, 38, 0.7
GRID = (4e-4, 8e-4, 1.6e-3, 2e-4)
"""Learning rates for either side, the likeliest first."""
TRL_WAYS: Mapping[str, Mapping[str, object]] = {
    "default": {},
    "dr_grpo": {"loss_type": "dr_grpo", "scale_rewards": "none"},
    "two passes": {"num_iterations": 2},
}
_TUNING_SEED = 7
_COPIES = 25
"""Copies of each prompt where nothing is to be learnt of prompts."""
_ALONE = {"max_staleness": 0, "threads": THREADS}
_WITHOUT: Mapping[str, Mapping[str, object]] = {
    "overlap": {**_ALONE, "engine": {"num_slots": 64, "max_length": 256, "threads": THREADS}},
    "learner": {"micro_batch_tokens": 1_000_000},
    "selection": {"max_refills": 0},
}


@dataclass(frozen=True, slots=True)
class Choice:
    """What tuning chose.

    Example:
        Choice(ours=4e-4, trl=4e-4, way="default")
    """

    ours: float = GRID[0]
    """Learning rate, as is the next."""
    trl: float = GRID[0]
    way: str = "default"
    """One of `TRL_WAYS`."""


def measure(quick: bool) -> Report:
    """Tune, run both sides on each pool, take ours apart."""
    details: dict[str, object] = {}
    kept = Kept(None) if quick else Kept.of("time_to_target")
    with tempfile.TemporaryDirectory() as name:
        sides = Sides(Path(name), kept)
        choice = _committed() if quick else _tune(sides, details)
        pools, seeds = ((MAIN,), SEEDS[:1]) if quick else (POOLS, SEEDS)
        figures: list[Figure] = []
        races: dict[float, tuple[list[Outcome], list[Outcome]]] = {}
        for flat in pools:
            races[flat] = _race(sides, flat, seeds, choice)
            figures += _figures(flat, *races[flat])
        if not quick:
            figures += _split(sides, races[MAIN][0], choice, details)
        figures += speeds(write_work(sides.folder, MAIN, SEEDS[0]))
    details |= {"tuned": asdict(choice), "target": TARGET, "commits": sorted(kept.commits)}
    for flat, both in races.items():
        for side, outcomes in zip(("ours", "trl"), both, strict=True):
            details[f"{side}, {flat:.0%} flat"] = [each.story for each in outcomes]
    return Report(figures, details)


@dataclass(frozen=True, slots=True)
class Sides:
    """Who runs, where, and what has been run before.

    Example:
        Sides(Path("/tmp/x"), Kept(None)).ours(work, 4e-4)
    """

    folder: Path
    kept: Kept

    def ours(self, work: Work, rate: float, **settings: Any) -> Outcome:
        """See `run_ours`."""
        name = f"ours {work.prompts} {rate:g} {json.dumps(settings)}"
        return self.kept.take(name, lambda: run_ours(work, rate, **settings))

    def trl(self, work: Work, rate: float, way: str, steps: int = TRL_STEPS) -> Outcome:
        """See `run_trl`; `way` is one of `TRL_WAYS`."""
        name = f"trl {work.prompts} {rate:g} {way} {steps}"
        return self.kept.take(name, lambda: run_trl(work, rate, TRL_WAYS[way], steps=steps))


def write_work(folder: Path, flat: float, seed: int, copies: int = 1) -> Work:
    """The pool and the held-out prompts as files.

    Args:
        copies: of each prompt, every one under an id of its own.
    """
    pool = assemble(read_kinds(), flat, LEARNABLE, seed)
    copied = [
        replace(prompt, id=f"{prompt.id}-{copy}") if copy else prompt
        for copy in range(copies)
        for prompt in pool
    ]
    name = f"pool-{flat:g}-{seed}-{copies}.jsonl"
    write_prompts(folder / name, copied)
    write_prompts(folder / "heldout.jsonl", heldout())
    return Work(folder, name, "heldout.jsonl", TARGET, seed)


def _committed() -> Choice:
    """The choice of the committed full run; the first of the grid where there is none yet."""
    path = RESULTS / "time_to_target.json"
    return (
        Choice(**json.loads(path.read_text())["details"]["tuned"]) if path.is_file() else Choice()
    )


def _tune(sides: Sides, details: dict[str, object]) -> Choice:
    """The rate with which each side is there soonest, and then TRL's best way with its rate."""
    work = write_work(sides.folder, MAIN, _TUNING_SEED)

    def ours(rate: float, steps: int) -> Outcome:
        return sides.ours(work, rate, steps=min(steps, OUR_STEPS))

    def trl(rate: float, steps: int) -> Outcome:
        return sides.trl(work, rate, "default", steps)

    own, scores = _soonest(GRID, ours)
    theirs, their_scores = _soonest(GRID, trl)

    def way(name: str, steps: int) -> Outcome:
        return sides.trl(work, theirs, name, steps)

    best, way_scores = _soonest(tuple(TRL_WAYS), way)
    details["tuning: seconds to the target, or what the last exam fell short by"] = {
        "ours": scores,
        "trl": their_scores,
        "ways of trl": way_scores,
    }
    return Choice(own, theirs, best)


def _soonest(
    options: Sequence[Option], run: Callable[[Option, int], Outcome]
) -> tuple[Option, dict[str, str]]:
    """The option that arrives first; once one has, others get twice its steps and no more."""
    scores: dict[Option, Score] = {}
    steps = TRL_STEPS
    for option in options:
        outcome = run(option, steps)
        scores[option] = outcome.score
        if outcome.arrived:
            steps = min(steps, 2 * math.ceil(outcome.steps))
    return min(options, key=scores.__getitem__), {str(o): str(s) for o, s in scores.items()}


def _race(
    sides: Sides, flat: float, seeds: Sequence[int], choice: Choice
) -> tuple[list[Outcome], list[Outcome]]:
    """Both sides in turns, seed by seed: whatever the machine does meanwhile, it does to both."""
    ours, trl = list[Outcome](), list[Outcome]()
    for seed in seeds:
        work = write_work(sides.folder, flat, seed)
        ours.append(sides.ours(work, choice.ours))
        trl.append(sides.trl(work, choice.trl, choice.way))
    return ours, trl


def _figures(flat: float, ours: Sequence[Outcome], trl: Sequence[Outcome]) -> list[Figure]:
    """Ratios are medians over the seeds, paired; the goals are those of the pool of 80 %."""
    pairs = list(zip(ours, trl, strict=True))
    seconds = [_ratio(theirs, own, "seconds") for own, theirs in pairs]
    rollouts = [_ratio(theirs, own, "rollouts") for own, theirs in pairs]
    is_main, name = flat == MAIN, f"{flat:.0%} flat"
    return [
        Figure(
            f"{name}: seconds, TRL / ours",
            statistics.median(seconds),
            "x",
            goal=3.0 if is_main else None,
            tolerance=0.8 if is_main else None,
        ),
        Figure(f"{name}: seconds, TRL / ours, least", min(seconds), "x"),
        Figure(
            f"{name}: rollouts, TRL / ours",
            statistics.median(rollouts),
            "x",
            goal=2.0 if is_main else None,
            tolerance=0.5 if is_main else None,
        ),
        Figure(f"{name}: runs of ours that arrived", sum(each.arrived for each in ours)),
        Figure(f"{name}: runs of TRL that arrived", sum(each.arrived for each in trl)),
        Figure(f"{name}: seconds of ours", _middle(ours, "seconds"), "s"),
        Figure(f"{name}: seconds of TRL", _middle(trl, "seconds"), "s"),
        Figure(f"{name}: steps of ours", _middle(ours, "steps")),
        Figure(f"{name}: steps of TRL", _middle(trl, "steps"), goal=50.0 if is_main else None),
        Figure(f"{name}: flat groups of TRL, first steps", _middle(trl, "flat at first")),
        Figure(f"{name}: seconds of our step", _middle(ours, "seconds of a step"), "s"),
        Figure(f"{name}: seconds of TRL's step", _middle(trl, "seconds of a step"), "s"),
    ]


def _split(
    sides: Sides, full: Sequence[Outcome], choice: Choice, details: dict[str, object]
) -> list[Figure]:
    """How much longer ours takes when one part is switched off, paired by seed."""
    figures: list[Figure] = []
    for part, changes in _WITHOUT.items():
        selects = part != "selection"
        outcomes = [
            sides.ours(
                write_work(sides.folder, MAIN, seed, copies=1 if selects else _COPIES),
                choice.ours,
                mined=MINED if selects else 0,
                changes=changes,
                steps=OUR_STEPS if selects else 4 * OUR_STEPS,
            )
            for seed in SEEDS
        ]
        ratios = [_ratio(less, all_, "seconds") for less, all_ in zip(outcomes, full, strict=True)]
        figures.append(Figure(f"without {part}: seconds / all", statistics.median(ratios), "x"))
        details[f"ours without {part}"] = [each.story for each in outcomes]
    return figures


def _ratio(theirs: Outcome, own: Outcome, what: str) -> float:
    costs = {"seconds": (theirs.seconds, own.seconds), "rollouts": (theirs.rollouts, own.rollouts)}
    other, mine = costs[what]
    return other / mine if own.arrived else 0.0


def _middle(outcomes: Sequence[Outcome], fact: str) -> float:
    return statistics.median(float(str(each.story[fact])) for each in outcomes)


if __name__ == "__main__":
    code = run_benchmark("time_to_target", measure, seeds=SEEDS)
    if "--quick" not in sys.argv:
        Kept.of("time_to_target").clear()  # the result is written
    sys.exit(code)
