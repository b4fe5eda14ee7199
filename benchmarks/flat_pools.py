"""Pools of prompts of which a given share is flat, and the held-out prompts of the rest.

    python -m benchmarks.flat_pools      ask the student what base_rates.json does not tell yet

Three kinds of the herd's tasks, told apart by what the student makes of them before any training:
`learnable` (hard questions it solves now and then), `solved` (easy ones it always solves) and
`hopeless` (families it has never seen). Kinds are told by 24 answers, solved ones by 48; the share
of groups of eight that are flat is estimated from 24 fresh ones, so that choosing does not flatter
it. None of this is told to either side: both have to find out for themselves.
"""

from __future__ import annotations

import functools
import hashlib
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from math import comb
from pathlib import Path
from random import Random

from benchmarks.harness import ROOT
from ground.errors import DataError
from ground.herd.families import FAMILIES, JUDGED_ONLY, SOLVED
from ground.herd.tasks import draw
from ground.records import LABELS, Label, Prompt
from ground.rows import row_of
from rollout.config import EngineSection, SamplingSection
from rollout.engines import open_engine
from rollout.evaluation import measure
from rollout.reward_pool import RewardPool

STUDENT = ROOT / "recipes" / "tiny" / "herd" / "student"
RATES = ROOT / "benchmarks" / "base_rates.json"
GROUP = 8
_FRESH, _PART = 24, 40
_CHOICE: Mapping[str, tuple[int, int, int]] = {
    "learnable": (24, 2, 16),
    "solved": (48, 48, 48),
    "hopeless": (24, 0, 0),
}
"""Answers by which a prompt is chosen, and how many of them must be right, at least and at most."""
_EASY = (
    ("spell_backward", 400),
    ("leg_counting", 170),
    ("word_sequence_reversal", 170),
    ("chain_sum", 100),
)
_NEVER_SEEN = tuple(family.name for family in JUDGED_ONLY if family.name != "decimal_chain_sum")
_SOURCES: Mapping[str, Sequence[tuple[str, Label, int]]] = {
    "learnable": [(family.name, "hard", 52) for family in SOLVED],
    "solved": [(name, "easy", number) for name, number in _EASY],
    "hopeless": [(name, label, 25) for name in _NEVER_SEEN for label in LABELS],
}
_HELDOUT_PER_FAMILY = 18


@dataclass(frozen=True, slots=True)
class Kind:
    """Prompts of one kind, and the share of their groups that are flat for the student.

    Example:
        Kind(prompts=[…], flat=0.07)
    """

    prompts: Sequence[Prompt]
    flat: float


def assemble(kinds: Mapping[str, Kind], flat: float, num_learnable: int, seed: int) -> list[Prompt]:
    """A pool of which uniformly drawn groups are flat with this chance; solved : hopeless = 2 : 1.

    However flat it is, the seed's learnable prompts are the same: what changes is how many others
    they are hidden among.

    Example:
        learnable groups flat in 10 %, the others in 100 %: flat 0.8 puts 7 beside each 2 learnable
    """
    solved, hopeless, learnable = (kinds[name] for name in ("solved", "hopeless", "learnable"))
    others = (2 * solved.flat + hopeless.flat) / 3
    num_others = round(num_learnable * (flat - learnable.flat) / (others - flat))
    num_hopeless = round(num_others / 3)
    wanted = {
        "learnable": num_learnable,
        "hopeless": num_hopeless,
        "solved": num_others - num_hopeless,
    }
    pool: list[Prompt] = []
    for name, number in wanted.items():
        if number > len(kinds[name].prompts):
            raise DataError(
                f"a pool of {num_learnable} learnable prompts that is flat in {flat:.0%} needs "
                f"{number} {name} ones, there are {len(kinds[name].prompts)}",
                where="benchmarks.flat_pools",
                fix="draw more candidates of that kind",
            )
        pool += Random(f"flat_pools/{seed}/{name}").sample(kinds[name].prompts, number)
    Random(f"flat_pools/{seed}").shuffle(pool)
    return pool


@functools.cache
def read_kinds() -> dict[str, Kind]:
    """The three kinds by the committed rates.

    Raises:
        DataError: they are another student's.
    """
    rates = _read_rates()
    if not all(rates.values()):
        raise DataError(
            "the student is not the one whose rates were measured",
            where=str(RATES),
            fix="python -m benchmarks.flat_pools",
        )
    return {name: _kind(name, each) for name, each in rates.items()}


@functools.cache
def heldout() -> list[Prompt]:
    """Questions of the learnable kind that are in no pool."""
    taken = {prompt.id for prompt in _candidates("learnable")}
    return [
        prompt
        for family in SOLVED
        for prompt in islice(
            (p for p in _asked(family.name, "hard", "heldout") if p.id not in taken),
            _HELDOUT_PER_FAMILY,
        )
    ]


def write_prompts(path: Path, prompts: Sequence[Prompt]) -> None:
    """As a data file, without any word on how hard they are."""
    rows = [{**row_of(prompt), "difficulty": None} for prompt in prompts]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def flat_chance(successes: int, trials: int, group: int = GROUP) -> float:
    """Unbiased chance that a group drawn from these answers is all right or all wrong.

    Example:
        flat_chance(2, 4, group=2) == 1/3       # of the 6 pairs, one is right and one wrong
    """
    wrong = trials - successes
    return (comb(successes, group) + comb(wrong, group)) / comb(trials, group)


def _kind(name: str, rates: Mapping[str, Sequence[int]]) -> Kind:
    """Those of the candidates asked so far that are of the kind by their first answers."""
    _, low, high = _CHOICE[name]
    prompts = [p for p in _candidates(name) if p.id in rates and low <= rates[p.id][0] <= high]
    chances = [flat_chance(rates[prompt.id][1], _FRESH) for prompt in prompts]
    return Kind(prompts, sum(chances) / len(chances))


def _candidates(name: str) -> list[Prompt]:
    each = (islice(_asked(f, label, name), number) for f, label, number in _SOURCES[name])
    return list({prompt.id: prompt for prompt in chain.from_iterable(each)}.values())


def _asked(family: str, label: Label, purpose: str) -> Iterator[Prompt]:
    return (task.prompt for task in draw(FAMILIES[family], label, "flat_pools", purpose))


def _digest() -> str:
    return hashlib.sha256((STUDENT / "model.safetensors").read_bytes()).hexdigest()[:16]


def _read_rates() -> dict[str, dict[str, list[int]]]:
    """Kind → prompt id → right answers of those chosen by and of the fresh ones."""
    document = json.loads(RATES.read_text()) if RATES.is_file() else {}
    known = document.get("student") == _digest()
    return document["rates"] if known else {name: {} for name in _CHOICE}


def main() -> None:
    """Ask the candidates that were not asked yet; what was found is kept part by part."""
    section = EngineSection(num_slots=256, max_length=256, threads=2)
    engine, chat = open_engine(STUDENT, section)
    sampling, rates = SamplingSection(max_new_tokens=64), _read_rates()
    with RewardPool(1, 10.0) as rewards:
        for name, (chosen_by, _, _) in _CHOICE.items():
            left = [prompt for prompt in _candidates(name) if prompt.id not in rates[name]]
            samples = chosen_by + _FRESH
            for start in range(0, len(left), _PART):
                part = left[start : start + _PART]
                asked = measure(engine, chat, part, rewards, sampling, samples=samples, seed=0)
                for each in asked:
                    halves = each.rollouts[:chosen_by], each.rollouts[chosen_by:]
                    passed = [sum(rollout.passed for rollout in half) for half in halves]
                    rates[name][each.prompt.id] = passed
                RATES.write_text(json.dumps({"student": _digest(), "rates": rates}) + "\n")
    engine.close()
    for name, kind in read_kinds().items():
        sys.stdout.write(f"{name:<10} {len(kind.prompts):4d} prompts, flat {kind.flat:.3f}\n")


if __name__ == "__main__":
    main()
