"""Kills at random, covering every named phase: is anything lost, is anything trained on twice?

    python -m benchmarks.chaos            50 kills       --quick: 12

One run of the `rl` stage (asynchronous, two workers, the tiny herd's student). Every kill is a
SIGKILL that a process gives itself at a named point (ground/faults.py); a learner or controller
that goes takes its life with it and the supervisor begins the next one, a supervisor that goes is
started again with --resume. At the end an independent checker reads what the learner consumed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.harness import ROOT, Figure, Report, run_benchmark
from benchmarks.processes import EARLY
from ground.errors import InfraError
from ground.faults import POINTS, Faults
from ground.manifest import read_manifest
from ground.strikes import kill9

KILLS, QUICK_KILLS, SEED = 50, 12, 0
_SUPERVISOR_GONE = -9
_RUN_SECONDS = 1200.0
_FREQUENT = ("rollout", "learner", "controller", "supervisor")


@dataclass(frozen=True, slots=True)
class Soak:
    """What became of a run under kills."""

    kills: Mapping[str, int]
    """By role and point, in the order of the points."""
    commands: int
    """Times that the command was started."""
    seconds: float
    consumed: Mapping[str, int]
    """What the checker counted (rl/audit.py)."""
    ledger: Mapping[str, int]
    digests: Mapping[str, str]
    """sha256 of weights, moments and RNG of the last cut, and of the exported model."""
    differing: int
    """Versions that a new life made again from the journal with other bytes than before."""


def soak(
    folder: Path,
    model: Path,
    *,
    kills: int,
    steps: int,
    seed: int = SEED,
    staleness: int = 1,
    points: Sequence[tuple[str, str]] = (),
) -> Soak:
    """Run the stage to its end under so many kills.

    Args:
        points: (kind of role, name), killed at once each, instead of those that `seed` chooses.

    Raises:
        InfraError: it ended otherwise than done or killed; the message has its last words.
    """
    recipe = _write_recipe(folder, model, steps, staleness)
    (folder / "faults").mkdir()
    plan = _plan(folder / "faults", kills, seed, points)
    environment = os.environ | plan.environment() | {"OMP_NUM_THREADS": "1"}
    line = [sys.executable, "-m", "rl.train", str(recipe), "--run", str(folder / "run")]
    start, commands, code = time.monotonic(), 0, _SUPERVISOR_GONE
    while code == _SUPERVISOR_GONE:
        left = _RUN_SECONDS - (time.monotonic() - start)
        flags = ["--resume"] if commands else []
        done = subprocess.run(
            [*line, *flags], env=environment, cwd=ROOT, capture_output=True, text=True, timeout=left
        )
        commands, code = commands + 1, done.returncode
    if code:
        raise InfraError(f"the run must end well, got exit code {code}", why=done.stderr[-2000:])
    summary = read_manifest(folder / "run" / "rl").facts["summary"]
    assert isinstance(summary, dict)
    struck = Counter(f"{firing.role} {firing.point}" for firing in plan.fired())
    stage = folder / "run" / "rl"
    files = [*sorted((stage / "checkpoints").glob("step_*/*.safetensors")), stage / "model"]
    newest = [*files[-3:-1], *sorted(files[-1].glob("*.safetensors"))]
    return Soak(
        dict(struck),
        commands,
        time.monotonic() - start,
        summary["consumed"],
        summary["audited"],
        {str(path.relative_to(stage)): _sha256(path) for path in newest},
        (folder / "run" / "log" / "rl.learner.log").read_text().count("is not bit for bit"),
    )


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _plan(folder: Path, kills: int, seed: int, given: Sequence[tuple[str, str]]) -> Faults:
    """Each point once as far as they go round, then points at random, at one of two passages."""
    chance = random.Random(seed)
    if given:
        return _at_each(folder, given)
    points = [(kind, name) for kind, name in POINTS if kind in (*_FREQUENT, "keeper")]
    chance.shuffle(points)
    chosen = points[:kills]
    often = [(kind, name) for kind, name in points if name not in ("export", "best.kept")]
    chosen += chance.choices(often, k=kills - len(chosen))
    plan = Faults(folder)
    for kind, name in chosen:
        role = f"rollout/{chance.randrange(2)}" if kind == "rollout" else kind
        plan = plan.at(role, name, chance.choice((1, 2))).do(kill9)
    return plan


def _at_each(folder: Path, points: Sequence[tuple[str, str]]) -> Faults:
    """The first passage of each point, whichever worker it is that comes by."""
    plan = Faults(folder)
    for kind, name in points:
        plan = plan.at("rollout/*" if kind == "rollout" else kind, name).do(kill9)
    return plan


def _write_recipe(folder: Path, model: Path, steps: int, staleness: int) -> Path:
    rows = [
        {
            "messages": [{"role": "user", "content": f"letters {number}"}],
            "capability": ("one", "two")[number % 2],
            "reward": "early",
            "answer": "",
        }
        for number in range(64)
    ]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "rewards.py").write_text(EARLY)
    recipe = {
        "name": "chaos",
        "model": {"path": str(model)},
        "data": {"prompts": "prompts.jsonl"},
        "rewards": ["rewards.py"],
        "rl": {
            "steps": steps,
            "max_empty_steps": steps,  # by the end its letters are all early ones
            "groups_per_step": 4,
            "group_size": 4,
            "max_staleness": staleness,
            "sampling": {"max_new_tokens": 24},
            "engine": {"num_slots": 8, "max_length": 128},
            "optimizer": {"learning_rate": 1e-4},
            "validation": {"prompts": 4, "samples": 1, "evaluate_every": 6},
            "checkpoint_every": 3,
            "max_restarts": 100,
            "fleet": {"num_workers": 2, "cpus_per_worker": 0.5, "backoff_seconds": 0.1,
                      "max_restarts": 20},
        },
    }  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    return path


def measure(quick: bool) -> Report:
    """Soak the tiny herd's student."""
    kills = QUICK_KILLS if quick else KILLS
    with tempfile.TemporaryDirectory() as folder:
        model = ROOT / "recipes" / "tiny" / "herd" / "student"
        found = soak(Path(folder), model, kills=kills, steps=12 if quick else 40)
    points = {name.split()[1] for name in found.kills}
    figures = [
        Figure("kills", sum(found.kills.values()), goal=kills * 0.9),
        Figure("points covered", len(points), goal=min(kills * 0.9, 30)),
        Figure("prompts lost", found.consumed["lost"], goal=0, better="lower"),
        Figure("samples trained twice", found.consumed["trained_twice"], goal=0, better="lower"),
        Figure("versions not replayed bit for bit", found.differing, goal=0, better="lower"),
        Figure("oldest token", found.consumed["oldest_token"], "versions", goal=1, better="lower"),
        Figure("seconds per kill", found.seconds / max(sum(found.kills.values()), 1), "s"),
    ]
    details = {"kills": found.kills, "commands": found.commands}
    return Report(figures, {**details, "consumed": found.consumed, "ledger": found.ledger})


if __name__ == "__main__":
    sys.exit(run_benchmark("chaos", measure, seeds=[SEED]))
