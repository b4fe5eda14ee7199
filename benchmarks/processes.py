"""Benchmarks run stages as users do: as processes, into directories of their own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.harness import ROOT

RECIPE = ROOT / "recipes" / "tiny" / "recipe.yaml"
DEADLINE_SECONDS = 1800
EARLY = '''
from rollout.rewards import Score, reward

@reward("early")
def early(prompts, completions, **columns):
    """Share of letters in the first half of the alphabet; more than half passes."""
    texts = [completion[-1]["content"] for completion in completions]
    shares = [sum(c < "n" for c in text) / max(len(text), 1) for text in texts]
    return [Score(share, share > 0.5, {}) for share in shares]
'''
"""A file of the user's own rewards, for prompts that any model answers now well, now badly."""


def stage(module: str, recipe: Path, run: Path, *arguments: str) -> None:
    """`python -m MODULE RECIPE --run RUN …`; its output is kept in RUN.log."""
    _call([sys.executable, "-m", module, str(recipe), "--run", str(run), *arguments], run)


def trail(recipe: Path, run: Path, *arguments: str) -> None:
    """`packtrain run RECIPE --run RUN …`; its output is kept in RUN.log."""
    command = [sys.executable, "-m", "packtrain", "run", str(recipe), "--run", str(run)]
    _call([*command, *arguments], run)


def _call(command: list[str], run: Path) -> None:
    log = run.with_suffix(".log")
    run.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        done = subprocess.run(
            command, cwd=ROOT, stdout=output, stderr=output, timeout=DEADLINE_SECONDS
        )
    if done.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-20:])
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}:\n{tail}")
