"""`python -m curation.mine RECIPE`: measure how often the model solves each RL prompt.

    prompts → shards of n → sampled in waves, scored, committed → prompts.parquet, skipped.parquet

A shard that an interrupted run committed for the same prompts and weights is not done again.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from curation.config import MineSection
from curation.mining import Mined, mined_row, mined_schema, summarise
from curation.models import model_name
from curation.shards import Shards
from curation.waves import stratum_of, topped_up
from ground.chat import ChatTemplate
from ground.console import reporter
from ground.entry import Stage, stage_entry
from ground.errors import DataError
from ground.leaving import leave
from ground.records import Prompt
from ground.storage import write_file
from ground.tables import read_prompts, write_rows
from rollout.engine import Inference
from rollout.evaluation import measure
from rollout.inference import inference
from rollout.judge_pool import beside_judge
from rollout.judge_source import judge_of
from rollout.reward_pool import RewardPool, Verifier
from rollout.sandbox_probe import sandbox_facts

logger = logging.getLogger("packtrain")


def train(stage: Stage[MineSection]) -> dict[str, object]:
    """Write prompts.parquet, sorted by id, and summary.json; return the summary."""
    section = stage.section
    model = stage.trail.model_before("mine")
    prompts = read_prompts(
        stage.trail.prompts_before("mine"), stage.head.data, quarantine=stage.directory
    )
    prompts.sort(key=lambda prompt: prompt.id)
    sandbox = sandbox_facts(prompts, stage.head.sandbox)
    judged_by = f"mine:{model_name(model)}"
    mined = _mine(stage, model, prompts, judged_by)
    asked = [each for each in mined if each.trials]
    skipped = [each for each in mined if not each.trials]
    if not asked:
        raise DataError("no prompt could be asked", where="mine", why=skipped[0].skipped)
    for name, part in (("prompts", asked), ("skipped", skipped)):
        rows = [
            mined_row(each, ks=section.k, solved_at=section.solved_at, judged_by=judged_by)
            for each in part
        ]
        write_rows(stage.directory / f"{name}.parquet", rows, mined_schema(section.k))
    if skipped:
        logger.warning("%d prompts were set aside: %s", len(skipped), skipped[0].skipped)
    summary = {
        "judged_by": judged_by,
        **sandbox,
        **summarise(mined, ks=section.k, solved_at=section.solved_at, seed=stage.head.seed),
    }
    write_file(stage.directory / "summary.json", json.dumps(summary, indent=2) + "\n")
    shutil.rmtree(stage.directory / "shards", ignore_errors=True)
    return summary


def _mine(
    stage: Stage[MineSection], model: Path, prompts: list[Prompt], judged_by: str
) -> list[Mined]:
    """All shards, those found on disk among them."""
    section = stage.section
    shards: Shards[Prompt, Mined] = Shards(
        stage.directory / "shards",
        judged_by,
        key=lambda prompt: prompt.id,
        freeze=Mined.as_json,
        thaw=lambda prompt, frozen: Mined(prompt, *frozen),
    )
    cut = [
        prompts[start : start + section.shard_size]
        for start in range(0, len(prompts), section.shard_size)
    ]
    report = reporter(stage.directory)
    mined: list[Mined] = []
    with (
        inference(model, section, stage.record, "mine") as (engine, chat),
        RewardPool(
            section.reward_processes,
            section.reward_deadline_seconds,
            stage.head.rewards,
            sandbox=stage.head.sandbox,
        ) as rules,
        beside_judge(rules, judge_of(prompts, stage.trail)) as pool,
    ):
        for done in shards.each(cut, partial(_measure_shard, stage, engine, chat, pool)):
            mined += done.results
            report(len(mined), len(prompts))
    return mined


def _measure_shard(
    stage: Stage[MineSection],
    engine: Inference,
    chat: ChatTemplate,
    pool: Verifier,
    prompts: Sequence[Prompt],
) -> list[Mined]:
    """All samples of all prompts, or a pilot and then more of some."""
    section, seed = stage.section, stage.head.seed
    wave = partial(
        measure,
        engine,
        chat,
        reward_pool=pool,
        sampling=section.sampling,
        seed=seed,
        occasion="mine",
        stall_seconds=section.stall_seconds,
    )
    if section.pilot is None or section.pilot >= section.samples:
        return [Mined.of(each) for each in wave(prompts, samples=section.samples)]
    pilots = [Mined.of(each) for each in wave(prompts, samples=section.pilot)]
    weights = topped_up(pilots, section.audit_share, seed)
    chosen = [index for index, weight in enumerate(weights) if weight]
    rest = section.samples - section.pilot
    more = wave([prompts[index] for index in chosen], samples=rest, first=section.pilot)
    mined = [replace(each, weight=0.0) for each in pilots]
    for index, each in zip(chosen, more, strict=True):
        pilot = pilots[index]
        mined[index] = pilot.with_more(each, weights[index], stratum_of(pilot))
    return mined


if __name__ == "__main__":
    leave(stage_entry("mine", MineSection, train))
