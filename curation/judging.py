"""All rows past a judge: in shards that are resumed, among canaries that may stop it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from curation.canaries import Verdict, canaries, mixed, rows_of, verdict
from curation.config import PruneSection
from curation.judge import Judge, Judgement, require_judged
from curation.judges import fix_for
from curation.shards import Done, Shards
from ground.console import reporter
from ground.entry import Stage
from ground.records import Demonstration

logger = logging.getLogger("packtrain")


@dataclass(frozen=True, slots=True)
class Judged:
    """What a judge made of a whole set.

    Example:
        Judged([Judgement(0.65, "hard", …), …], Verdict(64, ()))
    """

    judgements: list[Judgement]
    """In the order of the rows."""
    canaries: Verdict
    """Of the shard in which it did worst."""


def judge_rows(
    stage: Stage[PruneSection], judge: Judge, rows: Sequence[Demonstration], judged_by: str
) -> Judged:
    """Ask the judge about every row.

    Raises:
        DataError: it fails its canaries, or leaves too much unjudged.
    """
    section, report = stage.section, reporter(stage.directory)
    pairs = canaries(section.judge, rows)
    cut = [
        mixed(rows[start : start + section.shard_size], rows_of(pairs))
        for start in range(0, len(rows), section.shard_size)
    ]
    shards: Shards[Demonstration, Judgement] = Shards(
        stage.directory / "shards",
        judged_by,
        key=lambda row: row.id,
        freeze=Judgement.as_json,
        thaw=lambda row, frozen: Judgement.of_json(frozen),
    )
    known = {row.id for row in rows_of(pairs)}
    judgements: list[Judgement] = []
    verdicts: list[Verdict] = []
    for done in shards.each(cut, judge.judge):
        both = list(zip(done.items, done.results, strict=True))
        own = [each for row, each in both if row.id not in known]
        seen = verdict(pairs, {row.id: each for row, each in both if row.id in known})
        judgements += own
        if done.seconds:  # not of a shard that lay there: an earlier attempt has logged it
            _log(stage, done, own, len(judgements), seen.share)
        seen.require(section.judge.min_canaries)
        verdicts.append(seen)
        report(len(judgements), len(rows))
    require_judged(judgements, section.judge.max_unjudged, fix_for(section.judge))
    _warn(judgements)
    return Judged(judgements, min(verdicts, key=lambda each: each.share))


def _log(
    stage: Stage[PruneSection],
    done: Done[Demonstration, Judgement],
    own: Sequence[Judgement],
    num_judged: int,
    canaries_right: float,
) -> None:
    """Metrics of a shard that was judged just now."""
    numbers = {
        "canaries": canaries_right,
        "unjudged": sum(not each.is_judged for each in own) / len(own),
        "rows_per_second": len(done.items) / done.seconds,
    }
    stage.metrics.log(num_judged, numbers)


def _warn(judgements: Sequence[Judgement]) -> None:
    unjudged = [each.reason for each in judgements if not each.is_judged]
    if unjudged:
        logger.warning(
            "%d of %d rows stay unjudged: %s", len(unjudged), len(judgements), unjudged[0]
        )
