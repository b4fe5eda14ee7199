"""What a run achieved: how far pass@1 moved from model to model, and how sure that is.

DPO is there for corner cases, so it is told as well how far their share moved.

The models of a run answer the same held-out prompts, so differences are taken per prompt and their
interval by resampling prompts: much narrower than the difference of two separate intervals.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from ground.config import ARMS
from ground.trail import PLACES
from packtrain.observe import estimate, evaluation, mapping, number, read_rows, text
from rollout.passk import Estimate

DRAWS = 2000
"""Resamplings of the prompts behind an interval."""
Measure = Literal["pass@1", "corner cases"]
COLUMNS: dict[Measure, str] = {"pass@1": "successes", "corner cases": "num_faulty"}
"""Where prompts.parquet counts it."""
NAMES = {"base": "base", "sft": "SFT", "taught": "taught SFT", "rl": "RL", "dpo": "DPO"}


@dataclass(frozen=True, slots=True)
class Gain:
    """How a share of the answers moved from one model of the trail to the next.

    Example:
        Gain("sft", "rl", Estimate(0.31, 0.28, 0.35), num_prompts=512)
    """

    before: str
    after: str
    change: Estimate
    num_prompts: int
    of: Measure = "pass@1"

    @property
    def is_clear(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.change.low > 0 or self.change.high < 0

    @property
    def is_good(self) -> bool:
        """Whether it moved the way one hopes for."""
        return (self.change.mean > 0) == (self.of == "pass@1")

    @property
    def sentence(self) -> str:
        """One sentence for a person."""
        name = NAMES[self.after][0].upper() + NAMES[self.after][1:]
        mean, low, high = (100 * x for x in (self.change.mean, self.change.low, self.change.high))
        interval = f"95% interval {low:+.1f} to {high:+.1f}, {self.num_prompts} prompts"
        if not self.is_clear:
            return f"{name} made no clear difference to {self.of}: {mean:+.1f} points ({interval})."
        verb = "added" if mean > 0 else "cost" if self.of == "pass@1" else "removed"
        other = NAMES[self.before]
        link = "over" if mean > 0 else "against"
        return f"{name} {verb} {abs(mean):.1f} points of {self.of} {link} {other} ({interval})."


def evaluated(run: Path) -> list[str]:
    """The models of the run that have an evaluation, in the order of the trail."""
    return [where for where in PLACES if evaluation(run, where)]


def gains(run: Path) -> list[Gain]:
    """Each evaluated model against the one before it, and an arm's against that of its stage;
    DPO's by its corner cases too."""
    places = evaluated(run)
    pairs = list(itertools.pairwise(on_the_trail(places)))
    found = [gain_between(run, a, b) for a, b in pairs]
    found += [gain_between(run, a, b, "corner cases") for a, b in pairs if b == "dpo"]
    beside = [(ARMS[place].stage, place) for place in places if place in ARMS]
    found += [gain_between(run, a, b) for a, b in beside]
    return [gain for gain in found if gain is not None]


def on_the_trail(places: Sequence[str]) -> list[str]:
    """Without arms."""
    return [place for place in places if place not in ARMS]


def gain_between(run: Path, before: str, after: str, of: Measure = "pass@1") -> Gain | None:
    """The change of a share on the prompts that both evaluations asked."""
    old, new = rates(run, before, of), rates(run, after, of)
    common = sorted(old.keys() & new.keys())
    if not common:
        return None
    changes = [new[prompt] - old[prompt] for prompt in common]
    return Gain(before, after, paired_change(changes), len(common), of)


def headline(run: Path) -> str:
    """The run in one line: first and last evaluated model."""
    places = on_the_trail(evaluated(run))
    scores = [estimate(evaluation(run, place).get("pass@1")) for place in places]
    if not scores or scores[0] is None or scores[-1] is None:
        return "No evaluation is finished yet."
    if len(scores) == 1:
        return f"pass@1 of the {NAMES[places[0]]} model: {scores[0].mean:.1%}."
    first = f"{scores[0].mean:.1%} ({NAMES[places[0]]})"
    last = f"{scores[-1].mean:.1%} ({NAMES[places[-1]]})"
    gain = gain_between(run, places[0], places[-1])
    if gain is None or not gain.is_clear:
        return f"pass@1 did not change clearly: {first}, then {last}."
    return f"pass@1 {'rose' if gain.change.mean > 0 else 'fell'} from {first} to {last}."


def rates(run: Path, where: str, of: Measure) -> dict[str, float]:
    """Prompt id → share of its samples that passed, or that have a fault of form."""
    column = COLUMNS[of]
    rows = read_rows(run / where / "evaluation" / "prompts.parquet", ["id", column, "trials"])
    counts = (
        (text(row.get("id")), number(row.get(column)), number(row.get("trials"))) for row in rows
    )
    return {key: c / n for key, c, n in counts if c is not None and n}


def paired_change(changes: Sequence[float]) -> Estimate:
    """Mean of per-prompt changes with its 95% interval by resampling prompts (seeded).

    Example:
        paired_change([0.5, 0.5, 0.5]) → 0.5 in [0.5, 0.5]
    """
    changes_P = np.asarray(changes, dtype=np.float64)
    generator = np.random.default_rng(0)
    picks_DP = generator.integers(len(changes_P), size=(DRAWS, len(changes_P)))
    low, high = np.quantile(changes_P[picks_DP].mean(axis=1), [0.025, 0.975])
    return Estimate(float(changes_P.mean()), float(low), float(high))


def exploration(run: Path) -> list[tuple[str, Mapping[str, object]]]:
    """Name and evaluation of each model, for the table of accuracy and exploration."""
    return [(NAMES[where], mapping(evaluation(run, where))) for where in evaluated(run)]
