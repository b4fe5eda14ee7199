"""`python -m curation.mine RECIPE`: measure how often the model solves each RL prompt.

    prompts → shards of n → sampled, scored, committed → prompts.parquet (and skipped.parquet)

A shard that an interrupted run committed for the same prompts and weights is not done again.
"""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from curation.config import MineSection
from curation.mining import Mined, mined_row, mined_schema, summarise
from curation.models import model_name
from ground.chat import ChatTemplate
from ground.console import reporter
from ground.entry import Stage, stage_entry
from ground.errors import DataError
from ground.records import Prompt
from ground.storage import commit_directory, verify_directory, write_file
from ground.tables import read_prompts, write_rows
from rollout.engine import Engine
from rollout.engines import open_engine
from rollout.evaluation import measure
from rollout.reward_pool import RewardPool
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
    engine, chat = open_engine(model, section.engine)
    report = reporter(stage.directory)
    mined: list[Mined] = []
    try:
        with RewardPool(
            section.reward_processes,
            section.reward_deadline_seconds,
            stage.head.rewards,
            sandbox=stage.head.sandbox,
        ) as pool:
            for start in range(0, len(prompts), section.shard_size):
                shard = prompts[start : start + section.shard_size]
                place = stage.directory / "shards" / f"{start:08d}"
                done = _read_shard(place, shard, judged_by)
                if done is None:
                    done = _measure_shard(stage, engine, chat, pool, shard)
                    _write_shard(place, done, judged_by)
                mined += done
                report(len(mined), len(prompts))
    finally:
        engine.close()
    return mined


def _measure_shard(
    stage: Stage[MineSection],
    engine: Engine,
    chat: ChatTemplate,
    pool: RewardPool,
    prompts: Sequence[Prompt],
) -> list[Mined]:
    section = stage.section
    measured = measure(
        engine,
        chat,
        prompts,
        pool,
        section.sampling,
        samples=section.samples,
        seed=stage.head.seed,
        occasion="mine",
    )
    return [Mined.of(each) for each in measured]


def _write_shard(place: Path, mined: Sequence[Mined], judged_by: str) -> None:
    outcomes = [[each.prompt.id, each.successes, each.trials, each.skipped] for each in mined]
    with commit_directory(place, {"judged_by": judged_by}) as staging:
        (staging / "outcomes.json").write_text(json.dumps(outcomes))


def _read_shard(place: Path, prompts: Sequence[Prompt], judged_by: str) -> list[Mined] | None:
    """What an earlier run found for exactly these prompts; None when it has to be measured."""
    if not place.is_dir():
        return None
    try:
        facts = verify_directory(place).facts
    except DataError as error:
        logger.warning("a shard is measured again: %s", error)
        return None
    outcomes = json.loads((place / "outcomes.json").read_text())
    same = [outcome[0] for outcome in outcomes] == [prompt.id for prompt in prompts]
    if facts.get("judged_by") != judged_by or not same:
        return None
    return [
        Mined(prompt, int(successes), int(trials), str(skipped))
        for prompt, (_, successes, trials, skipped) in zip(prompts, outcomes, strict=True)
    ]


if __name__ == "__main__":
    sys.exit(stage_entry("mine", MineSection, train))
