"""`python -m curation.prune RECIPE`: the teacher judges the SFT data, the easy part goes aside."""

from __future__ import annotations

import json
import logging
import sys

from curation.config import PruneSection
from curation.judge import Judgement, LabelJudge
from curation.models import model_name
from curation.pruning import (
    SCHEMA,
    decision_row,
    group_counts,
    prune,
    quotas,
    rule_of,
    summarise,
)
from ground.console import reporter
from ground.entry import Stage, stage_entry
from ground.errors import DataError
from ground.records import Demonstration
from ground.storage import write_file
from ground.tables import read_demonstrations, write_rows
from rollout.engines import open_engine

logger = logging.getLogger("packtrain")


def train(stage: Stage[PruneSection]) -> dict[str, object]:
    """Write kept.parquet, dropped.parquet and summary.json."""
    section = stage.section
    path = stage.trail.demonstrations_before("prune")
    rows = read_demonstrations(path, stage.head.data, quarantine=stage.directory)
    quotas(group_counts(rows, section.per), section.share)  # refuse before a model is loaded
    teacher = stage.trail.teacher()
    judgements = _judge(stage, rows)
    decisions = prune(rows, judgements, section.share, section.per)
    judged_by = f"label:{model_name(teacher)}"
    rule = rule_of(section.fraction, section.per)
    for name, kept in (("kept", True), ("dropped", False)):
        part = [decision_row(d, judged_by, rule) for d in decisions if d.kept == kept]
        write_rows(stage.directory / f"{name}.parquet", part, SCHEMA)
    summary = {"judged_by": judged_by, "rule": rule, **summarise(decisions)}
    write_file(stage.directory / "summary.json", json.dumps(summary, indent=2) + "\n")
    return summary


def _judge(stage: Stage[PruneSection], rows: list[Demonstration]) -> list[Judgement]:
    """Ask the teacher; stop when it leaves too much unjudged."""
    section = stage.section
    engine, chat = open_engine(stage.trail.teacher(), section.engine)
    try:
        judge = LabelJudge(
            engine,
            chat,
            min_mass=section.judge.min_label_mass,
            max_length=section.engine.max_length,
        )
        tasks = [row.question for row in rows]
        judgements = judge.judge(tasks, progress=reporter(stage.directory))
    finally:
        engine.close()
    unjudged = [each for each in judgements if not each.is_judged]
    if len(unjudged) > section.judge.max_unjudged * len(rows):
        raise DataError(
            f"at most {section.judge.max_unjudged:.0%} of the rows may stay unjudged, "
            f"got {len(unjudged)} of {len(rows)}",
            where="prune.judge",
            why=unjudged[0].reason,
            fix="use a teacher that answers easy, medium or hard; raise prune.engine.max_length",
        )
    if unjudged:
        logger.warning(
            "%d of %d rows stay unjudged: %s", len(unjudged), len(rows), unjudged[0].reason
        )
    return judgements


if __name__ == "__main__":
    sys.exit(stage_entry("prune", PruneSection, train))
