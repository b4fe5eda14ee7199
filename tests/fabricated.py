"""A finished run as the stages would leave it, made in a moment: what status and report read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from curation.config import CurriculumSection
from curation.curriculum import Curriculum, Observation
from curation.judge import Judgement
from curation.label_judge import labelled
from curation.pruning import SCHEMA as PRUNED
from curation.pruning import decision_row, prune, rule_of
from ground.provenance import stage_settings
from ground.recipe import load_recipe
from ground.records import Demonstration, Message, Prompt
from ground.run import RunDir
from ground.tables import write_rows
from rl.groups import SCHEMA as GROUPS
from rl.rounds import Rounds
from rollout.passk import mean_pass_at_k

CAPABILITIES = ("arithmetic", "counting", "logic", "strings")
LABELS = ("easy", "medium", "hard")
SAMPLES = 16
RECIPE = """\
name: made
herd: {}
prune: {fraction: 0.5}
sft: {}
mine: {}
rl: {steps: 30}
dpo: {}
evaluate: {}
"""


def fabricate_run(
    directory: Path, *, text: str = "57+68=?7+8=15,5+6+1=12 => 125", num_prompts: int = 120
) -> Path:
    """Write a whole run; `text` stands wherever a model or a data set would have written."""
    recipe = directory.parent / "made.yaml"
    recipe.parent.mkdir(parents=True, exist_ok=True)
    recipe.write_text(RECIPE)
    document, run = load_recipe(recipe), RunDir(directory)
    with run.open():
        run.describe(document)
        for index, stage in enumerate(("herd", "prune", "sft", "mine", "rl", "dpo")):
            settings = stage_settings(document, run, stage)
            assert run.begin(stage, settings, resume=False, overwrite=False)
            _WRITERS.get(stage, _nothing)(directory / stage, text)
            run.finish(stage, settings, {"seconds": 10.0 * index})
        for index, place in enumerate(("base", "sft", "rl", "dpo")):
            where = f"{place}/evaluation"
            settings = stage_settings(document, run, where)
            run.begin(where, settings, resume=False, overwrite=False)
            solved = _solved(num_prompts, (0.15, 0.35, 0.8, 0.79)[index])
            _evaluation(directory / where, solved, text, 1.2 - 0.2 * index)
            run.finish(where, settings, {})
    (directory / "lock.json").unlink()  # its note names this very process, which lives on
    return directory


def _solved(num_prompts: int, level: float) -> list[int]:
    """Successes of each prompt; prompts keep their rank from model to model."""
    generator = np.random.default_rng(1)
    skill_P = generator.beta(2, 2, size=num_prompts)
    rates_P = np.clip(skill_P + level - 0.5, 0, 1)
    return [int(x) for x in generator.binomial(SAMPLES, rates_P)]


def _evaluation(folder: Path, solved: Sequence[int], text: str, entropy: float) -> None:
    capabilities = [CAPABILITIES[i % 4] for i in range(len(solved))]
    labels = [LABELS[i % 3] for i in range(len(solved))]
    content: dict[str, object] = {
        "model": "somewhere",
        "num_prompts": len(solved),
        "samples": SAMPLES,
        **{f"pass@{k}": _estimate(solved, k) for k in (1, 4, 16)},
        "greedy": _estimate(solved, 1),
        "entropy": entropy,
        "mean_tokens": 23.5,
        "cut_share": 0.125,
        "corner_case_share": 0.1875,
        "faults": {"truncated": 0.125, "language_mix": 0.0625},
        "by_capability": _by(solved, capabilities),
        "by_difficulty": _by(solved, labels),
    }
    (folder / "evaluation.json").write_text(json.dumps(content))
    rows = [
        {
            "id": f"{i:016x}",
            "messages": [{"role": "user", "content": f"{text} #{i}"}],
            "capability": capabilities[i],
            "label": labels[i],
            "successes": count,
            "trials": SAMPLES,
            "num_faulty": 3,
            "texts": [text],
            "passed": [count >= SAMPLES / 2],
        }
        for i, count in enumerate(solved)
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "prompts.parquet")


def _by(solved: Sequence[int], names: Sequence[str]) -> dict[str, object]:
    parts: dict[str, list[int]] = {}
    for count, name in zip(solved, names, strict=True):
        parts.setdefault(name, []).append(count)
    return {
        name: {"pass@1": _estimate(part, 1), "pass@16": _estimate(part, 16), "n": len(part)}
        for name, part in parts.items()
    }


def _estimate(solved: Sequence[int], k: int) -> Mapping[str, float]:
    found = mean_pass_at_k([(SAMPLES, count) for count in solved], k)
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _prune(folder: Path, text: str) -> None:
    """400 rows in turn of four capabilities, harder the later; the easier half of each went."""
    messages = (Message("user", text), Message("assistant", text))
    rows = [Demonstration(f"row{n}", messages, CAPABILITIES[n % 4]) for n in range(400)]
    judgements = [
        labelled({"easy": (1 - n / 400) / 2, "medium": 0.5, "hard": n / 800}, 0.9)
        if n % 100
        else Judgement(reason=text)
        for n in range(400)
    ]
    decisions = prune(rows, judgements, Fraction(1, 2), "capability")
    for name, kept in (("kept", True), ("dropped", False)):
        part = [d for d in decisions if d.kept == kept]
        written = [decision_row(d, "label:teacher", rule_of(0.5, "capability")) for d in part]
        write_rows(folder / f"{name}.parquet", written, PRUNED)


def _sft(folder: Path, text: str) -> None:
    del text
    _lines(
        folder / "metrics.jsonl", [{"step": i, "loss": 2.0 / (1 + i / 10)} for i in range(1, 60)]
    )


def _rl(folder: Path, text: str) -> None:
    generator = np.random.default_rng(3)
    _lines(
        folder / "metrics.jsonl",
        [
            {
                "step": i,
                "reward": 0.3 + 0.5 * i / 30 + float(generator.normal(0, 0.03)),
                "pass_rate": 0.28 + 0.5 * i / 30 + float(generator.normal(0, 0.03)),
                "entropy": 0.8 - 0.01 * i,
                "mismatch_kl": 0.001 + 0.0001 * i,
                "ess": 0.95 - 0.002 * i,
                "error_share": 0.02,
                "learner_idle_share": 0.3,
                "rollout_idle_share": 0.1,
            }
            for i in range(1, 31)
        ],
    )
    events = []
    for i in range(30):
        start = 1_763_718_000.0 + 4 * i
        events += [
            {"kind": "rollout", "role": f"rollout/{w}", "start": start + w, "end": start + w + 3.4}
            for w in range(2)
        ]
        events.append({"kind": "train", "role": "learner", "start": start + 2, "end": start + 4.2})
        events.append(
            {"kind": "handover", "role": "learner", "start": start + 4.2, "end": start + 4.4}
        )
    _lines(folder / "events.jsonl", events)
    ends = [("trained", "")] * 240 + [("filtered", "all-0")] * 90 + [("filtered", "all-1")] * 60
    ends += [("withdrawn", "end")] * 10
    _lines(folder / "ledger.jsonl", [{"draw": n, "state": "pending"} for n in range(len(ends))])
    with (folder / "ledger.jsonl").open("a") as file:
        for n, (state, reason) in enumerate(ends):
            file.write(json.dumps({"draw": n, "state": state, "reason": reason}) + "\n")
    (folder / "groups").mkdir()
    for step in (1, 2):
        rows = [_group(f"{name[0]}{n}", name, text, step) for n in (0, 1) for name in CAPABILITIES]
        path = folder / "groups" / f"step_{step:06d}.parquet"
        pq.write_table(pa.Table.from_pylist(rows, GROUPS), path)
    pool = [
        Prompt(f"{name[0]}{n}", (), name, "exact", "4") for n in (0, 1) for name in CAPABILITIES
    ]
    curriculum = Curriculum(pool, CurriculumSection(drift=0), seed=0, group_size=4, steps=2)
    rounds = Rounds(folder / "curriculum", every=1)
    rounds.keep(curriculum)
    for version in (1, 2):
        seen = [Observation(prompt.id, version, 4) for prompt in pool if prompt.id.endswith("0")]
        curriculum.observe(version, seen)
        rounds.keep(curriculum)


def _group(prompt: str, capability: str, text: str, step: int) -> dict[str, object]:
    """Four answers to the first prompt of a capability, as many right as the step says."""
    passed = [n < step for n in range(4)] if prompt.endswith("0") else [False] * 4
    return {
        "id": f"{prompt}.{step}",
        "prompt_id": prompt,
        "messages": [{"role": "user", "content": text}],
        "capability": capability,
        "answer": text,
        "system": "",
        "opened_at": step - 1,
        "version": step - 1,
        "state": "trained" if any(passed) else "filtered",
        "reason": "" if any(passed) else "all-0",
        "passed": passed,
        "texts": [text] * 4,
        "rewards": [float(right) for right in passed],
        "advantages": [right - sum(passed) / 4 for right in passed],
        "num_tokens": [7] * 4,
        "finish": ["stop"] * 4,
        "errors": [""] * 4,
        "reward_parts": [[{"name": text, "value": 0.5}]] * 4,
    }


def _lines(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _nothing(folder: Path, text: str) -> None:
    del folder, text


_WRITERS = {"prune": _prune, "sft": _sft, "rl": _rl}
