"""`python -m curation.prune RECIPE`: the teacher judges the SFT data, what is worth least goes.

    rows + canaries → judged in shards ─▶ marked (misaligned, near-duplicates) ─▶ order of going
    some rows → judged by other kinds ─▶ calibration       ─▶ kept, dropped.parquet, summary.json

A shard that an interrupted run committed for the same rows and teacher is not judged again.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import compress

from curation.calibration import SCHEMA as CALIBRATION
from curation.calibration import agreements, calibration_rows, chosen
from curation.config import PruneSection, SolveRateJudgeSection
from curation.duplicates import clusters, sides
from curation.judge import Judge, Judgement
from curation.judges import open_judges
from curation.judging import judge_rows
from curation.models import model_name
from curation.pruning import (
    SCHEMA,
    Decision,
    decision_row,
    group_counts,
    prune,
    quotas,
    rule_of,
    stand_ins,
    summarise,
)
from curation.solve_rate_judge import checkable
from ground.entry import Stage, stage_entry
from ground.leaving import leave
from ground.records import Demonstration
from ground.storage import write_file
from ground.tables import read_demonstrations, write_rows
from rollout.sandbox_probe import sandbox_facts

logger = logging.getLogger("packtrain")

_MANY_DUPLICATES = 0.2
"""Share of near-duplicates from which on a person should look at some of them."""


def train(stage: Stage[PruneSection]) -> dict[str, object]:
    """Write kept.parquet, dropped.parquet, summary.json, and calibration.parquet if asked for."""
    section = stage.section
    path = stage.trail.demonstrations_before("prune")
    rows = read_demonstrations(path, stage.head.data, quarantine=stage.directory)
    quotas(group_counts(rows, section.per), section.share)  # refuse before a model is loaded
    facts = _sandbox(stage, rows)
    teacher = stage.trail.teacher()
    judged_by = f"{section.judge.kind}:{model_name(teacher)}"
    with open_judges(stage, teacher, section.judges) as (judge, *others):
        judged = judge_rows(stage, judge, rows, judged_by)
        calibration = _calibrate(stage, others, rows, judged.judgements)
    decisions = decide(section, rows, judged.judgements)
    rule = rule_of(section.fraction, section.per)
    kept = [decision.kept for decision in decisions]
    for name, those in (("kept", kept), ("dropped", [not each for each in kept])):
        part = (decision_row(d, judged_by, rule) for d in compress(decisions, those))
        write_rows(stage.directory / f"{name}.parquet", part, SCHEMA)
    known = {
        "pairs": judged.canaries.pairs,
        "too_long": judged.canaries.num_too_long,
        "share": judged.canaries.share,
    }
    summary = {
        "judged_by": judged_by,
        "rule": rule,
        "canaries": {**known, "failures": judged.canaries.failures[:3]},
        **facts,
        **summarise(decisions),
        **calibration,
    }
    write_file(stage.directory / "summary.json", json.dumps(summary, indent=2) + "\n")
    shutil.rmtree(stage.directory / "shards", ignore_errors=True)
    return summary


def decide(
    section: PruneSection, rows: Sequence[Demonstration], judgements: Sequence[Judgement]
) -> list[Decision]:
    """Mark near-duplicates, then find the order in which rows go."""
    twins: dict[int, int] = {}
    if section.duplicates is not None:
        alike = section.duplicates
        compared = [sides(row) for row in rows]
        found = clusters(compared, similarity=alike.similarity, words=alike.words)
        twins = stand_ins(found, rows, judgements)
        _warn_of_many(twins, rows)
    decisions = prune(
        rows, judgements, section.share, section.per, unjudged=section.unjudged, twins=twins
    )
    left = sum(bool(decision.mark) and decision.kept for decision in decisions)
    if left:
        logger.warning("%d misaligned or doubled rows stay: more are marked than are to go", left)
    return decisions


def _warn_of_many(twins: Mapping[int, int], rows: Sequence[Demonstration]) -> None:
    if len(twins) > _MANY_DUPLICATES * len(rows):
        one, other = next(iter(twins.items()))
        logger.warning(
            "%d of %d rows are marked near-duplicates, such as %s of %s: if they are none, raise "
            "prune.duplicates.similarity, or set prune.duplicates=null",
            *(len(twins), len(rows), rows[one].id, rows[other].id),
        )


def _sandbox(stage: Stage[PruneSection], rows: Sequence[Demonstration]) -> dict[str, object]:
    """Where programs of the judge model will run, if it is to write any."""
    if not any(isinstance(judge, SolveRateJudgeSection) for judge in stage.section.judges):
        return {}
    prompts = (prompt for row in rows if (prompt := checkable(row)))
    return sandbox_facts(prompts, stage.head.sandbox)


def _calibrate(
    stage: Stage[PruneSection],
    others: Sequence[Judge],
    rows: Sequence[Demonstration],
    judgements: Sequence[Judgement],
) -> dict[str, object]:
    """Judge some rows by other kinds too, and compare; nothing where no others are asked."""
    section = stage.section
    if section.calibration is None:
        return {}
    own = chosen(rows, section.calibration.rows)
    sample = [rows[index] for index in own]
    kinds = [judge.kind for judge in section.judges]
    said = [[judgements[index] for index in own], *(judge.judge(sample) for judge in others)]
    by_kind = dict(zip(kinds, said, strict=True))
    path = stage.directory / "calibration.parquet"
    write_rows(path, calibration_rows(sample, by_kind), CALIBRATION)
    scores = {kind: [each.score for each in part] for kind, part in by_kind.items()}
    found = agreements([row.capability for row in sample], scores)
    return {"calibration": [asdict(agreement) for agreement in found]}


if __name__ == "__main__":
    leave(stage_entry("prune", PruneSection, train))
