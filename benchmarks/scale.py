"""What the controller costs as things grow: prompts in the pool, groups in the buffer, workers.

    python -m benchmarks.scale            1k to 1M prompts, 1 to 32 workers       --quick: a part

How the cost grows is seen on a virtual clock: the real controller, books, ledger, journals and
fleet without Ray, processor time alone. What it is in all is seen with real Ray workers that answer
without a model (benchmarks/canned.py), beside what Ray takes for the same calls by themselves.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from dataclasses import asdict

from benchmarks.canned import controller_share
from benchmarks.harness import Figure, Report, run_benchmark
from curation.config import CurriculumSection
from curation.curriculum import Curriculum, Observation
from ground.records import Segment, Span
from rl.simulate import Durations, make_pool, make_section, run_steps
from rollout.simulation import SimulatedWorker, group_of
from rollout.task import GroupResult, GroupTask, Loaded

SEED = 0
_RATE = 1000
"""Rollouts a second at which the controller's share of a core is stated."""
_STEP_SECONDS = 10.0
"""A step of a pool of a million prompts takes at least that long."""


class LightWorker(SimulatedWorker):
    """Costs next to nothing itself: one pause per group, one token per rollout."""

    async def load(self, version: int, weights: object) -> Loaded:
        """Remember the version."""
        self._version = version
        return await super().load(version, weights)

    async def rollout(self, task: GroupTask, attempt: int) -> GroupResult:
        """Wait for the longest rollout."""
        began = self._clock.now
        await asyncio.sleep(max(self._tokens(task)))
        token = Segment("policy", (7,), (-0.5,), (Span(self._version, 1),))
        group = group_of(task, [token] * len(task.seeds), self._rewards(task))
        return GroupResult(group, began, began, self._clock.now, len(task.seeds), attempt)


def per_rollout(*, workers: int, groups_per_step: int, steps: int = 6) -> float:
    """Processor seconds of a rollout in groups of eight."""
    section = make_section(
        steps=steps,
        groups_per_step=groups_per_step,
        group_size=8,
        workers=workers,
        slots=64,
        staleness=1,
    )
    played = run_steps(
        section,
        make_pool(5000),
        Durations(lambda sample: 1 + sample % 7, lambda plan: 1.0),
        worker=LightWorker,
    )
    return played.cpu_seconds / played.rollouts


def per_step(prompts: int, draws: int = 128, steps: int = 5) -> float:
    """Processor seconds of the curriculum at one publication: shares, draws, observations."""
    curriculum = Curriculum(
        make_pool(prompts), CurriculumSection(), seed=SEED, group_size=8, steps=steps
    )
    costs = []
    for version in range(steps):
        start = time.process_time()
        curriculum.shares()
        asked = [(name, n) for name in ("math", "code") for n in range(draws)]
        drawn = [curriculum.draw(version, name, n) for name, n in asked]
        curriculum.counts()
        curriculum.observe(version + 1, [Observation(prompt.id, 3, 8) for prompt in drawn])
        costs.append(time.process_time() - start)
    return statistics.median(costs)


def measure(quick: bool) -> Report:
    """All three."""
    sizes = (1000, 10_000, 100_000) if quick else (1000, 10_000, 100_000, 1_000_000)
    pool = {size: per_step(size) for size in sizes}
    fills = (32, 128, 512) if quick else (32, 128, 512, 2048)
    by_fill = {fill: per_rollout(workers=8, groups_per_step=fill) for fill in fills}
    fleet = (1, 8, 32) if quick else (1, 2, 4, 8, 16, 32)
    by_workers = {n: per_rollout(workers=n, groups_per_step=256) for n in fleet}
    largest = max(pool.values())
    real = {n: controller_share(n) for n in ((8,) if quick else (1, 8, 32))}
    figures = [
        Figure("controller at 1,000 rollouts/s, without Ray", by_workers[32] * _RATE, "of a core",
               goal=0.05, better="lower", tolerance=0.02),
        Figure("controller at 1,000 rollouts/s, with Ray", real[8].controller, "of a core",
               goal=0.05, better="lower", tolerance=0.1),
        Figure("bare Ray calls at 1,000 rollouts/s", real[8].bare, "of a core", better="lower",
               tolerance=0.1),
        Figure("32 workers over 1", by_workers[32] / by_workers[1], "x", goal=1.5, better="lower"),
        Figure("most groups over fewest", by_fill[fills[-1]] / by_fill[32], "x", goal=1.5,
               better="lower"),
        Figure("largest pool, of a step", largest / _STEP_SECONDS, "of a core", goal=0.01,
               better="lower"),
        Figure("largest pool over smallest", largest / pool[1000], "x", goal=1.5, better="lower"),
    ]  # fmt: skip
    details = {"step_seconds_by_prompts": pool, "rollout_seconds_by_groups": by_fill}
    details |= {"rollout_seconds_by_workers": by_workers}
    shares = {str(n): asdict(share) for n, share in real.items()}
    return Report(figures, {**details, "core_share_with_ray_by_workers": shares})


if __name__ == "__main__":
    sys.exit(run_benchmark("scale", measure, seeds=[SEED]))
