"""`python -m rollout.evaluate RECIPE --of base|sft|…`: measure a model on held-out prompts."""

from __future__ import annotations

import json
import logging
import time

from ground.console import reporter
from ground.entry import Stage, stage_entry
from ground.leaving import leave
from ground.storage import write_file
from ground.tables import write_rows
from rollout.compliance_evaluation import measure_compliance
from rollout.config import EvaluateSection
from rollout.evaluation import (
    PROMPT_SCHEMA,
    choose_prompts,
    greedy_accuracy,
    measure,
    prompt_rows,
    summarise,
)
from rollout.heldout import read_heldout
from rollout.inference import inference
from rollout.judge_pool import beside_judge
from rollout.judge_source import judge_of
from rollout.reward_pool import RewardPool
from rollout.sandbox_probe import sandbox_facts

logger = logging.getLogger("packtrain")


def evaluate(stage: Stage[EvaluateSection]) -> dict[str, object]:
    """Write `evaluation.json` and `prompts.parquet`; the summary is the former's headline."""
    section, seed = stage.section, stage.head.seed
    model = stage.trail.model_of(stage.of)
    prompts = read_heldout(stage.trail, stage.head.data, quarantine=stage.directory)
    prompts = choose_prompts(prompts, section.max_prompts, seed)
    sandbox = sandbox_facts(prompts, stage.head.sandbox)
    judge = judge_of(prompts, stage.trail)
    start = time.monotonic()
    with (
        inference(model, section, stage.record, "evaluate") as (engine, chat),
        RewardPool(
            section.reward_processes,
            section.reward_deadline_seconds,
            stage.head.rewards,
            sandbox=stage.head.sandbox,
        ) as rules,
        beside_judge(rules, judge) as pool,
    ):
        measured = measure(
            engine,
            chat,
            prompts,
            pool,
            section.sampling,
            samples=section.samples,
            seed=seed,
            greedy=section.greedy,
            progress=reporter(stage.directory),
            stall_seconds=section.stall_seconds,
        )
        result = {"model": str(model), **sandbox, **summarise(measured, section.k, seed)}
        if section.greedy:
            result["greedy"] = greedy_accuracy(measured)
        systems = stage.head.systems
        if systems.is_checked and section.systems:
            result["systems"] = measure_compliance(
                engine, chat, prompts, pool, section, systems, seed
            )
    result["seconds"] = round(time.monotonic() - start, 1)
    write_file(stage.directory / "evaluation.json", json.dumps(result, indent=2) + "\n")
    rows = prompt_rows(measured, section.examples)
    write_rows(stage.directory / "prompts.parquet", rows, PROMPT_SCHEMA)
    if result["num_skipped"]:
        logger.warning(
            "%s prompts could not be asked: %s", result["num_skipped"], result["skipped"]
        )
    headline = (
        "num_prompts",
        "num_skipped",
        "samples",
        "entropy",
        "mean_tokens",
        "greedy",
        "sandbox",
    )
    passes = [f"pass@{k}" for k in section.k]
    return {key: result[key] for key in (*headline, *passes) if key in result}


if __name__ == "__main__":
    leave(stage_entry("evaluate", EvaluateSection, evaluate))
