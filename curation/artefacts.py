"""What the stages left in a run, row by row and without a frame library.

    prune/kept, dropped ─▶ judged_rows      prune/calibration ─▶ calibration_rows
    mine/prompts ─▶ mined_rows      rl/ledger ─▶ ledger_ends
    rl/groups/step_* ─▶ group_rows, rollouts_of, draw_rows      rl/curriculum/round_* ─▶ round_rows
    metrics of sft, taught, rl ─▶ teacher_rows     MODEL/evaluation/prompts ─▶ evaluated_rows

Rows are read in batches, so the memory needed does not grow with a run. What is missing or cannot
be read is left out: a run may be at work, or may have been killed. Texts of models and data sets
come without control characters and secrets, so that they can be shown.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from curation.judge import PARTS
from ground.console import plain_text
from ground.logs import redact
from ground.metrics import read_metrics
from ground.trail import PLACES

logger = logging.getLogger("packtrain")

Row = Mapping[str, Any]
"""One row of a file; its values are of the types of the file's columns."""

ROUND = (
    *("capability", "prompt_id", "prompts", "successes", "trials", "mean", "deviation"),
    *("status", "share", "aim"),
)
_JUDGED = (
    *("id", "messages", "capability", "difficulty", *(f"meta_{name}" for name in PARTS)),
    *("meta_given_label", "meta_mark", "meta_duplicate_of", "meta_rank", "meta_rule"),
    "meta_reason",
)
_MINED = (
    *("id", "messages", "capability", "answer", "difficulty", "meta_status"),
    *("meta_pass_low", "meta_pass_high"),
)
_GROUP = (
    *("id", "prompt_id", "messages", "capability", "answer", "system", "state", "reason"),
    *("opened_at", "version", "passed", "rewards", "num_tokens"),
)
_DRAW = ("prompt_id", "capability", "opened_at", "version", "state", "reason", "passed")
_EVALUATED = ("id", "messages", "capability", "label", "successes", "trials")
_SHARES = {"sft": "alpha/", "taught": "alpha/", "rl": "distill_weight/"}
"""Stage or arm → what its metrics call the teacher's share of a capability."""
_ANSWERS = ("texts", "advantages", "finish", "errors", "reward_parts")
_OF_ROLLOUT = {
    **{"rewards": "reward", "passed": "passed", "advantages": "advantage"},
    **{"num_tokens": "tokens", "finish": "finish"},
}


def judged_rows(run: Path, names: Sequence[str] = ("kept", "dropped")) -> Iterator[Row]:
    """SFT rows that pruning kept and dropped, with what the judge said."""
    for name in names:
        for row in read_batches(run / "prune" / f"{name}.parquet", _JUDGED):
            difficulty, messages = row["difficulty"] or {}, row["messages"] or []
            yield {
                **{column.removeprefix("meta_"): value for column, value in row.items()},
                "capability": shown(row["capability"]),
                "question": conversation(messages[:-1]),
                "answer": shown(messages[-1]["content"]) if messages else "",
                "label": difficulty.get("label"),
                "score": difficulty.get("score"),
                "judged_by": difficulty.get("judged_by"),
                "mark": row["meta_mark"] or "",
                "duplicate_of": row["meta_duplicate_of"] or "",
                "rule": row["meta_rule"] or "",
                "reason": shown(row["meta_reason"]),
                "kept": name == "kept",
            }


def calibration_rows(run: Path) -> Iterator[Row]:
    """What each kind of judge said of the rows on which they were compared."""
    columns = ("id", "capability", "kind", "score", *PARTS, "reason")
    for row in read_batches(run / "prune" / "calibration.parquet", columns):
        yield {**row, "capability": shown(row["capability"]), "reason": shown(row["reason"])}


def mined_rows(run: Path, prompt: str | None = None) -> Iterator[Row]:
    """RL prompts, or the one with this id, with what pass@k found."""
    for row in read_batches(run / "mine" / "prompts.parquet", _MINED):
        if prompt not in (None, row["id"]):
            continue
        difficulty = row["difficulty"] or {}
        trials = difficulty.get("trials") or 0
        yield {
            "prompt_id": row["id"],
            "capability": shown(row["capability"]),
            "question": conversation(row["messages"]),
            "answer": shown(row["answer"]),
            "label": difficulty.get("label"),
            "successes": difficulty.get("successes"),
            "trials": trials,
            "pass_rate": difficulty["successes"] / trials if trials else None,
            "low": row["meta_pass_low"],
            "high": row["meta_pass_high"],
            "status": row["meta_status"],
        }


def group_rows(
    run: Path, step: int | None = None, *, prompt: str | None = None, answers: bool = False
) -> Iterator[Row]:
    """Draws that RL's steps consumed, with the lists over their rollouts if `answers`.

    `answer` can be shown, `solution` is the same as the reward compared with it.

    Args:
        step: of this one only; step n made version n.
        prompt: of the prompt with this id only.
    """
    columns = (*_GROUP, *(_ANSWERS if answers else ()))
    for number, path in _numbered(run / "rl" / "groups", "step"):
        for row in read_batches(path, columns) if step in (None, number) else ():
            if prompt not in (None, row["prompt_id"]):
                continue
            passed = row["passed"] or []
            yield {
                **row,
                **{name: shown(row[name]) for name in ("capability", "answer", "system")},
                "step": number,
                "group": row["id"],
                "solution": row["answer"] or "",
                "question": conversation(row["messages"]),
                "state": row["state"] or "",
                "reason": row["reason"] or "",
                "opened_at": row["version"] if row["opened_at"] is None else row["opened_at"],
                "successes": sum(passed),
                "trials": len(passed),
                "pass_rate": _mean(passed),
                "reward": _mean(row["rewards"]),
                "tokens": _mean(row["num_tokens"]),
            }


def draw_rows(run: Path) -> Iterator[Row]:
    """The same draws without any text: what was drawn when, and how it went."""
    for number, path in _numbered(run / "rl" / "groups", "step"):
        for row in read_batches(path, _DRAW):
            passed = row["passed"] or []
            yield {
                **row,
                "capability": shown(row["capability"]),
                "step": number,
                "opened_at": row["version"] if row["opened_at"] is None else row["opened_at"],
                "successes": sum(passed),
                "trials": len(passed),
            }


def rollouts_of(group: Row) -> Iterator[Row]:
    """The answers of a group that was read with `answers`; reward parts are `part_<name>`."""
    for index, text in enumerate(group["texts"] or []):
        parts = group["reward_parts"][index] if group["reward_parts"] else []
        yield {
            **{name: group[name] for name in ("step", "group", "prompt_id", "capability")},
            **{of: _at(group[name], index) for name, of in _OF_ROLLOUT.items()},
            "index": index,
            "text": shown(text),
            "error": shown(_at(group["errors"], index)),
            **{f"part_{shown(part['name'])}": part["value"] for part in parts},
        }


def round_rows(run: Path) -> Iterator[Row]:
    """What the curriculum knew, round by round."""
    for version, path in _numbered(run / "rl" / "curriculum", "round"):
        for row in read_batches(path, ROUND):
            own = {"version": version, "prompt_id": row["prompt_id"] or ""}
            yield {**row, **own, "capability": shown(row["capability"])}


def ledger_ends(run: Path) -> Iterator[tuple[int, str, str, str]]:
    """Version, capability, last state and reason of every draw."""
    drawn: dict[int, tuple[int, str]] = {}
    ends: dict[int, tuple[str, str]] = {}
    for record in _lines(run / "rl" / "ledger.jsonl"):
        number = record.get("draw", -1)
        if record.get("state") == "pending":
            drawn[number] = (record.get("version", 0), shown(record.get("capability")))
        ends[number] = (record.get("state", ""), record.get("reason", ""))
    for number, end in ends.items():
        yield (*drawn.get(number, (0, "")), *end)


def teacher_rows(run: Path) -> Iterator[Row]:
    """What the teacher's word counted for each capability in steps of sft, its arm and rl."""
    for stage, prefix in _SHARES.items():
        for record in read_metrics(run / stage / "metrics.jsonl"):
            for key in record:
                if key.startswith(prefix):
                    name = key.removeprefix(prefix)
                    yield {
                        "stage": stage,
                        "step": record.get("step"),
                        "capability": shown(name),
                        "share": record[key],
                        "distance": record.get(f"teacher_kl/{name}"),
                    }


def evaluated_rows(run: Path) -> Iterator[Row]:
    """What each model that was evaluated made of each held-out prompt."""
    for place in PLACES:
        for row in read_batches(run / place / "evaluation" / "prompts.parquet", _EVALUATED):
            yield {
                "model": place,
                "prompt_id": row["id"],
                "capability": shown(row["capability"]),
                "label": row["label"],
                "question": conversation(row["messages"]),
                "successes": row["successes"],
                "trials": row["trials"],
                "pass_rate": row["successes"] / row["trials"] if row["trials"] else None,
            }


def read_batches(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """Rows of a parquet file; a column that it lacks is None in each."""
    if not path.exists():
        return
    try:
        with pq.ParquetFile(path) as file:
            present = [name for name in columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=1024, columns=present):
                for row in batch.to_pylist():
                    yield {name: row.get(name) for name in columns}
    except (OSError, pa.ArrowException) as error:
        logger.warning("%s is left out, it cannot be read: %s", path, error)


def conversation(messages: Sequence[Row] | None) -> str:
    """Messages as text; roles are named when there are several."""
    turns = list(messages or [])
    if len(turns) == 1:
        return shown(turns[0]["content"])
    return "\n".join(f"{shown(turn['role'])}: {shown(turn['content'])}" for turn in turns)


def shown(text: str | None) -> str:
    """Text of a model or a data set, without control characters and secrets."""
    return plain_text(redact(text or ""))


def _numbered(folder: Path, name: str) -> Iterator[tuple[int, Path]]:
    for path in sorted(folder.glob(f"{name}_*.parquet")):
        yield int(path.stem.removeprefix(f"{name}_")), path


def _lines(path: Path) -> Iterator[Row]:
    """Objects of a JSONL file; a line that is being written is left out."""
    if not path.exists():
        return
    with path.open("rb") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def _at(values: Sequence[Any] | None, index: int) -> Any:
    return values[index] if values else None


def _mean(values: Sequence[float] | None) -> float | None:
    return sum(values) / len(values) if values else None
