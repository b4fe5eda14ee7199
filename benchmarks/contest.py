"""The two sides of benchmarks/time_to_target.py: one run each on the same work, and their marks.

    ours   packtrain run: mine → rl, processes and all; weights are kept every few steps and sit
           their exams when the run is over
    TRL    benchmarks/plain_grpo.py, one process; exams while its clock stands still

Either side's clock begins when its first process is asked for: imports, Ray and mining are in it.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.exam import MAX_LENGTH, MAX_NEW_TOKENS, Exam, Mark, reached
from benchmarks.flat_pools import GROUP, STUDENT
from benchmarks.harness import ROOT
from ground.checkpoints import step_of
from ground.errors import DivergedError
from ground.metrics import read_metrics
from rl.snapshot import read_weights

GROUPS, EXAM_EVERY, WARM_UP, BETAS = 8, 5, 3, (0.9, 0.95)
THREADS = 2
MINED = 4
"""Answers to each prompt by which ours learns what a prompt is good for."""
OUR_STEPS, TRL_STEPS = 35, 200
"""At most."""
_TRL_ROWS_PER_PASS = 64
"""All of a step."""
_FIRST = 10
"""Steps of TRL whose share of flat groups is that of the pool, more or less."""
_DEADLINE_SECONDS = 1500


@dataclass(frozen=True, slots=True)
class Work:
    """What both sides are given.

    Example:
        Work(Path("/tmp/x"), "pool-80.jsonl", "heldout.jsonl", target=0.75, seed=1)
    """

    folder: Path
    prompts: str
    heldout: str
    target: float
    seed: int


@dataclass(frozen=True, slots=True, order=True)
class Score:
    """How good a run was, to choose by: those that arrive before those that do not.

    Example:
        Score(0.0, 48.1) < Score(0.0, 60.0) < Score(0.12, 400.0)
    """

    missed_by: float
    """What the last exam fell short of the target; 0 where the run arrived."""
    seconds: float

    def __str__(self) -> str:
        return f"missed by {self.missed_by:.3f}" if self.missed_by else f"{self.seconds:.1f} s"


@dataclass(frozen=True, slots=True)
class Outcome:
    """How far a side got.

    Example:
        Outcome(True, steps=31.5, seconds=48.0, rollouts=5120, marks=[…], facts={"ready": 14.2})
    """

    arrived: bool
    steps: float
    """To the target, as are seconds and rollouts; all that were taken where it was not reached."""
    seconds: float
    rollouts: float
    marks: Sequence[Mark]
    target: float
    facts: Mapping[str, object] = field(default_factory=dict)
    """Whatever explains it; plain JSON."""

    @property
    def score(self) -> Score:
        """To choose by."""
        missed = 0.0 if self.arrived else self.target - self.marks[-1].rate
        return Score(missed, self.seconds)

    @property
    def story(self) -> dict[str, object]:
        """All of it as JSON."""
        marks = [[mark.step, round(mark.seconds, 2), round(mark.rate, 4)] for mark in self.marks]
        numbers = {"steps": self.steps, "seconds": self.seconds, "rollouts": self.rollouts}
        return {"arrived": self.arrived, **numbers, **self.facts, "marks": marks}


def run_trl(
    work: Work, learning_rate: float, settings: Mapping[str, object], *, steps: int = TRL_STEPS
) -> Outcome:
    """One run of GRPOTrainer to the target, or to its last step.

    Args:
        settings: of GRPOConfig, beyond what both sides share.
    """
    name = f"trl-{work.prompts}-{work.seed}-{time.time_ns()}"
    path, out = work.folder / f"{name}.work", work.folder / f"{name}.json"
    given = {**_shared(work, learning_rate), "steps": steps, "settings": settings}
    path.write_text(json.dumps({**given, "began": time.time()}))
    _call([sys.executable, "-m", "benchmarks.plain_grpo", str(path), str(out)], path)
    found = json.loads(out.read_text())
    marks = [Mark(*mark) for mark in found["marks"]]
    there = reached(marks, work.target)
    needed, at = there or (marks[-1].step, marks[-1].seconds)
    ends, flat = found["ends"], found["flat"][:_FIRST]
    facts = {
        "ready": ends[0],
        "seconds of a step": (ends[-1] - ends[0]) / (len(ends) - 1),
        "flat at first": sum(flat) / len(flat),
    }
    rollouts = needed * GROUPS * GROUP / int(str(settings.get("num_iterations", 1)))
    return Outcome(there is not None, needed, at, rollouts, marks, work.target, facts)


def _shared(work: Work, learning_rate: float) -> dict[str, object]:
    """What TRL's process is told, and our recipe says in its own words."""
    return {
        "model": str(STUDENT),
        "prompts": work.prompts,
        "heldout": work.heldout,
        "target": work.target,
        "seed": work.seed,
        "threads": THREADS,
        "evaluate_every": EXAM_EVERY,
        "rollouts_per_step": GROUPS * GROUP,
        "rows_per_pass": _TRL_ROWS_PER_PASS,
        "group_size": GROUP,
        "max_new_tokens": MAX_NEW_TOKENS,
        "learning_rate": learning_rate,
        "warmup_steps": WARM_UP,
        "betas": BETAS,
    }


def run_ours(
    work: Work,
    learning_rate: float,
    *,
    mined: int = MINED,
    steps: int = OUR_STEPS,
    changes: Mapping[str, object] | None = None,
) -> Outcome:
    """One run of packtrain, long enough to come by the target.

    It may end before, when nothing is left that teaches (exit 5): that is no fault of the run.

    Args:
        mined: answers to each prompt before RL; 0 leaves that out.
        changes: of keys of the `rl` section.
    """
    name = f"ours-{work.prompts}-{work.seed}-{time.time_ns()}"
    recipe, run = work.folder / f"{name}.yaml", work.folder / name
    changes = {"steps": steps, **(changes or {})}
    recipe.write_text(json.dumps(_recipe(work, learning_rate, mined, changes)))
    began = time.time()
    line = [sys.executable, "-m", "packtrain", "run", str(recipe), "--run", str(run)]
    _call(line, recipe, fine=(0, DivergedError.exit_code))
    taken = [r for r in read_metrics(run / "rl" / "metrics.jsonl") if "rollouts" in r]
    ends = {int(str(r["step"])): float(str(r["time"])) - began for r in taken}
    asked = mined * sum(1 for _ in (work.folder / work.prompts).open())
    cost = _rollouts(asked, [float(str(r["rollouts"])) for r in taken])
    marks = _examined(work, run / "rl" / "checkpoints", ends)
    there = reached(marks, work.target)
    needed, at = there or (marks[-1].step, marks[-1].seconds)
    facts = {
        "ready": ends[1],
        "seconds of a step": _mean(taken[1:], "seconds"),
        "learner idle": _mean(taken, "learner_idle_share"),
        "fleet idle": _mean(taken, "rollout_idle_share"),
        "flat": _mean(taken, "flat_share"),
    }
    rollouts = cost[math.ceil(needed)]
    return Outcome(there is not None, needed, at, rollouts, marks, work.target, facts)


def _recipe(
    work: Work, learning_rate: float, mined: int, changes: Mapping[str, object]
) -> dict[str, object]:
    engine = {"num_slots": 64, "max_length": MAX_LENGTH}
    mine = {
        "samples": mined,
        "k": [1],
        "max_new_tokens": MAX_NEW_TOKENS,
        "engine": {**engine, "num_slots": 256, "threads": THREADS},
    }
    rl = {
        "groups_per_step": GROUPS,
        "group_size": GROUP,
        "sampling": {"max_new_tokens": MAX_NEW_TOKENS},
        "engine": engine,
        "fleet": {"spare": False},
        "optimizer": {"learning_rate": learning_rate, "warmup_steps": WARM_UP, "betas": BETAS},
        "micro_batch_tokens": 2048,
        "validation": {"prompts": 0},
        "checkpoint_every": EXAM_EVERY,
        "checkpoints_kept": 1000,
    }
    return {
        "name": "contest",
        "seed": work.seed,
        "model": {"path": str(STUDENT)},
        "data": {"prompts": work.prompts},
        **({"mine": mine} if mined else {}),
        "rl": {**rl, **changes},
    }


def _examined(work: Work, checkpoints: Path, ends: Mapping[int, float]) -> list[Mark]:
    """Exams of the weights that were kept, in order, until one reaches the target."""
    exam = Exam(STUDENT, work.folder / work.heldout, seed=work.seed)
    marks: list[Mark] = []
    for folder in sorted(checkpoints.glob(f"step_{'[0-9]' * 6}")):
        step = step_of(folder)
        marks.append(Mark(step, ends[step], exam.rate(read_weights(folder))))
        if marks[-1].rate >= work.target:
            break
    exam.close()
    return marks


def _rollouts(mined: int, consumed: Sequence[float]) -> list[float]:
    """Answers sampled by the end of each number of steps: mined, consumed, and in flight.

    In flight are those of the steps ahead, as many as the fleet may have begun at most.
    """
    sums = [float(mined)]
    for each in consumed:
        sums.append(sums[-1] + each)
    return [each + GROUPS * GROUP for each in sums]


def _mean(records: Sequence[Mapping[str, object]], name: str) -> float:
    values = [float(str(record[name])) for record in records if name in record]
    return sum(values) / max(len(values), 1)


def _call(command: Sequence[str], near: Path, fine: Sequence[int] = (0,)) -> None:
    """Run a process to its end, which has to be with one of these exit codes."""
    log = near.with_suffix(".log")
    with log.open("ab") as output:
        done = subprocess.run(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=output,
            timeout=_DEADLINE_SECONDS,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
    if done.returncode not in fine:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{tail}")
