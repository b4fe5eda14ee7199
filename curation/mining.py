"""What pass@k says about a prompt: solved, workable or hopeless for now.

With n samples a prompt of true pass rate p shows no success with chance (1-p)^n; at n = 16 and
p = 0.05 that is 44 %. So hopeless prompts are deferred by whoever draws, and never deleted here.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import pyarrow as pa

from ground.records import Difficulty, Prompt
from ground.rows import row_of
from ground.tables import ROW_SCHEMA
from rollout.evaluation import Measured
from rollout.passk import Stands, pass_at_k, passes, wilson

Status = Literal["solved", "workable", "hopeless", "skipped"]


@dataclass(frozen=True, slots=True)
class Mined:
    """A prompt with what was seen of it.

    Example:
        Mined(prompt, successes=2, trials=16) → pass@4 0.45, workable
    """

    prompt: Prompt
    successes: int
    trials: int
    skipped: str = ""
    """Why it was not asked; it has no trials then."""
    weight: float = 1.0
    """For how many prompts it stands in pass@k: 0 after a pilot alone (curation/waves.py)."""
    stratum: str = ""
    """For whom: prompts of its capability of which the pilot said the same."""

    @staticmethod
    def of(measured: Measured) -> Mined:
        """From a measurement, its texts left behind."""
        return Mined(measured.prompt, measured.successes, measured.trials, measured.skipped)

    def with_more(self, measured: Measured, weight: float, stratum: str) -> Mined:
        """With a further wave of samples."""
        successes, trials = self.successes + measured.successes, self.trials + measured.trials
        return replace(self, successes=successes, trials=trials, weight=weight, stratum=stratum)

    def as_json(self) -> list[Any]:
        """Plain values; with the prompt before them they make an equal one."""
        return [self.successes, self.trials, self.skipped, self.weight, self.stratum]

    def status(self, solved_at: float) -> Status:
        """What it is good for: workable prompts have a gradient."""
        if not self.trials:
            return "skipped"
        if self.successes == 0:
            return "hopeless"
        return "solved" if self.successes >= solved_at * self.trials else "workable"


def mined_schema(ks: Sequence[int]) -> pa.Schema:
    """prompts.parquet of the mine stage: rows as RL reads them, and the figures beside them."""
    figures = ("meta_pass_low", "meta_pass_high", *(f"meta_pass_at_{k}" for k in sorted(set(ks))))
    return pa.schema(
        [
            *ROW_SCHEMA,
            pa.field("meta_status", pa.string(), nullable=False),
            *(pa.field(name, pa.float64()) for name in figures),
            pa.field("meta_reason", pa.string(), nullable=False),
        ]
    )


def mined_row(
    mined: Mined, *, ks: Sequence[int], solved_at: float, judged_by: str
) -> dict[str, object]:
    """A row of `mined_schema`; its difficulty is the measured one, under the label it came with."""
    given = mined.prompt.difficulty
    share = wilson(mined.successes, mined.trials)
    difficulty = given
    if mined.trials:
        difficulty = Difficulty(
            label=given.label if given else None,
            score=1.0 - share.mean,
            judged_by=judged_by,
            successes=mined.successes,
            trials=mined.trials,
        )
    passes = {
        f"meta_pass_at_{k}": pass_at_k(mined.trials, mined.successes, k)
        if k <= mined.trials
        else None
        for k in sorted(set(ks))
    }
    return {
        **row_of(replace(mined.prompt, difficulty=difficulty)),
        "meta_status": mined.status(solved_at),
        "meta_pass_low": share.low,
        "meta_pass_high": share.high,
        **passes,
        "meta_reason": mined.skipped,
    }


def summarise(
    mined: Iterable[Mined], *, ks: Sequence[int], solved_at: float, seed: int
) -> dict[str, object]:
    """Counts by status and pass@k with intervals, over all prompts and per capability."""
    everything = list(mined)
    parts: defaultdict[str, list[Mined]] = defaultdict(list)
    for each in everything:
        parts[each.prompt.capability].append(each)
    return {
        **_figures(everything, ks, solved_at, seed),
        "by_capability": {
            name: _figures(part, ks, solved_at, seed) for name, part in sorted(parts.items())
        },
    }


def _figures(
    mined: Sequence[Mined], ks: Sequence[int], solved_at: float, seed: int
) -> Mapping[str, object]:
    asked = [each for each in mined if each.trials]
    outcomes = [(each.trials, each.successes) for each in asked]
    stands = [Stands(each.weight, (each.prompt.capability, each.stratum)) for each in asked]
    statuses = Counter(each.status(solved_at) for each in mined)
    counts = dict(sorted(statuses.items()))
    return {"prompts": len(mined), **counts, **passes(outcomes, ks, seed, stands)}
