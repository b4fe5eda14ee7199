"""What fleet and worker cost: tokens per second through them over those of the bare engine.

    python -m benchmarks.fleet_overhead [--quick]

The same groups, with the same prompts, seeds and lengths, are sampled by turns: by an engine in
this process, and by a fleet of one worker (a Ray actor with the same engine), which takes groups,
encodes their prompts, has each answer scored and sends them back. Both are up all the time, one of
them idle; a pair is the two of them, one after the other, and which comes first alternates. With hf
and with vLLM, the tiny herd's student, one thread of computing.

The prompts are the herd's held-out ones with their own verifiers, as RL has them: with answers of
four tokens a pass takes a second, and shows how a queue fills rather than what a fleet costs.
"""

from __future__ import annotations

import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from itertools import count, cycle, islice

import ray

from benchmarks.flat_pools import heldout
from benchmarks.harness import ROOT, Figure, Report, run_benchmark
from ground.chat import ChatTemplate
from ground.model import load_model, tensors_of
from ground.records import Prompt
from rollout.cluster import system_config
from rollout.config import EngineSection, FleetSection, SamplingSection
from rollout.engine import Engine, Request, generate
from rollout.engines import open_engine
from rollout.fleet import Fleet
from rollout.handover import Outbox
from rollout.ray_worker import RayWorker
from rollout.seeds import sample_seed
from rollout.task import GroupTask, WorkerConfig
from rollout.weights import WeightKeeper, this_node

_MODEL = ROOT / "recipes" / "tiny" / "herd" / "student"
_SLOTS, _GROUP, _TOKENS = 64, 8, 64
_GROUPS, _QUICK_GROUPS = 252, 126
_PAIRS, _QUICK_PAIRS = 7, 3
_SECONDS = 600.0
_GOAL = 0.95
_NUMBERS = count()


def measure(quick: bool) -> Report:
    """Pairs for each engine; the figure is the median of their ratios."""
    figures, details = [], {}
    for kind in ("hf", "vllm"):
        section = EngineSection.model_validate(
            {"kind": kind, "num_slots": _SLOTS, "max_length": 256}
        )
        pairs = _pairs(section, *((_QUICK_GROUPS, _QUICK_PAIRS) if quick else (_GROUPS, _PAIRS)))
        ratios = [fleet / bare for bare, fleet in pairs]
        figures += [
            Figure(f"{kind}: fleet / engine", statistics.median(ratios), "x", _GOAL, "higher", 0.1),
            Figure(f"{kind}: engine", statistics.median(bare for bare, _ in pairs), "tokens/s"),
        ]
        details[kind] = {"tokens_per_second": pairs, "ratios": ratios}
    return Report(figures, details)


def _pairs(section: EngineSection, groups: int, pairs: int) -> list[tuple[float, float]]:
    """Tokens per second of engine and fleet, by turns; a first pair is not counted."""
    tasks = [_task(prompt) for prompt in islice(cycle(heldout()), groups)]
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, _system_config=system_config()
    )
    try:
        engine, template = open_engine(_MODEL, section)
        with closing(engine):
            return asyncio.run(_measured(engine, template, section, tasks, pairs))
    finally:
        ray.shutdown()


async def _measured(
    engine: Engine,
    template: ChatTemplate,
    section: EngineSection,
    tasks: Sequence[GroupTask],
    pairs: int,
) -> list[tuple[float, float]]:
    fleet_section = FleetSection(cpus_per_worker=0.5, spare=False, start_deadline_seconds=_SECONDS)
    config, keeper = WorkerConfig(_MODEL, section, fleet_section), WeightKeeper()
    fleet = Fleet(fleet_section, lambda: RayWorker(config))
    outbox = Outbox(keeper, this_node())
    outbox.send(outbox.pack(0, tensors_of(load_model(_MODEL))))
    requests = _requests(tasks, template)
    try:
        await fleet.start()
        await fleet.publish(0, keeper.current()[1])
        found = []
        for number in range(pairs + 1):
            if number % 2:
                through = await _through_fleet(fleet, tasks)
                bare = await asyncio.to_thread(_by_engine, engine, requests)
            else:
                bare = await asyncio.to_thread(_by_engine, engine, requests)
                through = await _through_fleet(fleet, tasks)
            _tell(f"{section.kind}: engine {bare:.0f}, fleet {through:.0f} tokens/s")
            found.append((bare, through))
        return found[1:]
    finally:
        await fleet.close()


def _by_engine(engine: Engine, requests: Sequence[Request]) -> float:
    started = time.perf_counter()
    completions = generate(engine, requests, timeout_seconds=_SECONDS)
    seconds = time.perf_counter() - started
    return sum(len(each.segment.token_ids) for each in completions) / seconds


async def _through_fleet(fleet: Fleet, tasks: Sequence[GroupTask]) -> float:
    started = time.perf_counter()
    groups = await asyncio.gather(*map(fleet.rollout, tasks))
    seconds = time.perf_counter() - started
    return sum(each.num_tokens for group in groups for each in group.rollouts) / seconds


def _task(prompt: Prompt) -> GroupTask:
    """A group of its own, also where a prompt comes twice."""
    number = next(_NUMBERS)
    seeds = tuple(sample_seed(0, prompt.id, number, sample) for sample in range(_GROUP))
    sampling = SamplingSection(max_new_tokens=_TOKENS)
    return GroupTask(f"{prompt.id}.{number}", prompt, "", sampling, seeds)


def _requests(tasks: Sequence[GroupTask], template: ChatTemplate) -> list[Request]:
    """What a worker would ask its engine for."""
    return [
        Request(
            id=f"{task.id}/{index}",
            prompt_ids=tuple(template.encode_prompt(task.messages)),
            max_new_tokens=task.sampling.max_new_tokens,
            temperature=task.sampling.temperature,
            seed=seed,
            stop_ids=template.stop_ids,
        )
        for task in tasks
        for index, seed in enumerate(task.seeds)
    ]


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    sys.exit(run_benchmark("fleet_overhead", measure, seeds=(0,)))
