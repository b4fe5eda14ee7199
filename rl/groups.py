"""What became of a draw, as a row of a parquet file and back.

One row per draw that a step consumed: what was asked, answered and scored, and whether it was
trained on, down to tokens, log-probs and versions. DPO, the report and notebooks read the plain
columns; lists run over the rollouts of a group and are empty where there is none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa

from curation.curriculum import Observation
from distill.word import SaidRow, Word
from ground.records import Difficulty, Group, Message, Prompt, Rollout, Segment, Span
from rl.buffer import LATE, Outcome
from rl.source import Draw

_SPAN = pa.struct([("version", pa.int64()), ("length", pa.int64())])
_SEGMENT = pa.struct(
    [
        ("source", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("logprobs", pa.list_(pa.float64())),
        ("versions", pa.list_(_SPAN)),
    ]
)
_PART = pa.struct([("name", pa.string()), ("value", pa.float64())])
_DIFFICULTY = pa.struct(
    [
        ("label", pa.string()),
        ("score", pa.float64()),
        ("judged_by", pa.string()),
        ("successes", pa.int64()),
        ("trials", pa.int64()),
        ("version", pa.int64()),
    ]
)
_SAID = pa.struct([("key", pa.binary()), ("num_tokens", pa.int64()), ("content", pa.binary())])
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field(
            "messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
        ),
        pa.field("capability", pa.string()),
        pa.field("reward", pa.string()),
        pa.field("answer", pa.string()),
        pa.field("difficulty", _DIFFICULTY),
        pa.field("system", pa.string()),
        pa.field("version", pa.int64()),
        pa.field("state", pa.string()),
        pa.field("reason", pa.string()),
        pa.field("texts", pa.list_(pa.string())),
        pa.field("rewards", pa.list_(pa.float64())),
        pa.field("passed", pa.list_(pa.bool_())),
        pa.field("finish", pa.list_(pa.string())),
        pa.field("num_tokens", pa.list_(pa.int64())),
        pa.field("errors", pa.list_(pa.string())),
        pa.field("advantages", pa.list_(pa.float64())),
        pa.field("draw", pa.int64()),
        pa.field("slot", pa.int64()),
        pa.field("attempt", pa.int64()),
        pa.field("opened_at", pa.int64()),
        pa.field("is_again", pa.bool_()),
        pa.field("successes", pa.int64()),
        pa.field("trials", pa.int64()),
        pa.field("prompt_ids", pa.list_(pa.int32())),
        pa.field("segments", pa.list_(pa.list_(_SEGMENT))),
        pa.field("reward_parts", pa.list_(pa.list_(_PART))),
        pa.field("taught_by", pa.string()),
        pa.field("said", pa.list_(_SAID)),
    ]
)
"""`version` is that of the oldest token; `opened_at` the version at which the slot was opened;
`taught_by` the identity of the teacher whose word `said` is."""

_STATES = {"": "trained", LATE: "re-admitted"}


def groups_path(directory: Path, step: int) -> Path:
    """File of a step: step n makes version n."""
    return directory / f"step_{step:06d}.parquet"


def row_of(outcome: Outcome, advantages: Sequence[float]) -> dict[str, object]:
    """A draw as a row of `SCHEMA`.

    Args:
        advantages: [G] that its group is trained with; empty when it is not.
    """
    draw, group, seen = outcome.draw, outcome.group, outcome.observation
    prompt, rollouts = draw.prompt, group.rollouts if group else ()
    difficulty = prompt.difficulty
    return {
        "id": draw.group_id,
        "prompt_id": prompt.id,
        "messages": [{"role": m.role, "content": m.content} for m in prompt.messages],
        "capability": prompt.capability,
        "reward": prompt.reward,
        "answer": prompt.answer,
        "difficulty": asdict(difficulty) if difficulty else None,
        "system": group.system if group else "",
        "version": group.oldest_version if group else draw.version,
        "state": _STATES.get(outcome.reason, "filtered"),
        "reason": outcome.reason,
        "texts": [rollout.text for rollout in rollouts],
        "rewards": [rollout.reward for rollout in rollouts],
        "passed": [rollout.passed for rollout in rollouts],
        "finish": [rollout.finish for rollout in rollouts],
        "num_tokens": [rollout.num_tokens for rollout in rollouts],
        "errors": [rollout.error for rollout in rollouts],
        "advantages": list(advantages or [0.0] * len(rollouts)),
        "draw": draw.number,
        "slot": draw.slot,
        "attempt": draw.attempt,
        "opened_at": draw.version,
        "is_again": draw.is_again,
        "successes": seen.successes if seen else None,
        "trials": seen.trials if seen else None,
        "prompt_ids": list(group.prompt_ids) if group else None,
        "segments": [[_segment_row(s) for s in rollout.segments] for rollout in rollouts],
        "reward_parts": [
            [{"name": name, "value": value} for name, value in rollout.reward_parts.items()]
            for rollout in rollouts
        ],
        "taught_by": outcome.word.identity if outcome.word else None,
        "said": [asdict(said) for said in outcome.word.rows] if outcome.word else [],
    }


def _segment_row(segment: Segment) -> dict[str, object]:
    return {
        "source": segment.source,
        "token_ids": segment.token_ids,
        "logprobs": segment.logprobs,
        "versions": [{"version": s.version, "length": s.length} for s in segment.versions],
    }


def outcome_of(row: Mapping) -> Outcome:
    """The draw that became this row."""
    hardness = row["difficulty"]
    prompt = Prompt(
        row["prompt_id"],
        tuple(Message(m["role"], m["content"]) for m in row["messages"]),
        row["capability"],
        row["reward"],
        row["answer"],
        Difficulty(**hardness) if hardness else None,
    )
    draw = Draw(row["draw"], row["slot"], row["attempt"], row["opened_at"], prompt, row["is_again"])
    seen = row["trials"] is not None
    observation = Observation(prompt.id, row["successes"], row["trials"]) if seen else None
    group = None
    if row["prompt_ids"] is not None:
        rollouts = tuple(_rollout(row, index) for index in range(len(row["texts"])))
        group = Group(row["id"], prompt, tuple(row["prompt_ids"]), rollouts, row["system"])
    word = None
    if row["said"] and (identity := row["taught_by"]) is not None:
        word = Word(identity, tuple(SaidRow(**each) for each in row["said"]))
    return Outcome(draw, row["reason"], observation, group, word)


def _rollout(row: Mapping, index: int) -> Rollout:
    return Rollout(
        index=index,
        segments=tuple(
            Segment(
                each["source"],
                tuple(each["token_ids"]),
                tuple(each["logprobs"]),
                tuple(Span(span["version"], span["length"]) for span in each["versions"]),
            )
            for each in row["segments"][index]
        ),
        text=row["texts"][index],
        finish=row["finish"][index],
        reward=row["rewards"][index],
        reward_parts={part["name"]: part["value"] for part in row["reward_parts"][index]},
        passed=row["passed"][index],
        error=row["errors"][index],
    )
