"""The groups of a step as a parquet file: what was asked, answered, scored and trained on."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa

from ground.records import Group
from ground.tables import write_rows
from rl.advantages import centered
from rl.buffer import Outcome

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
    ]
)
"""One row per group that the step consumed; lists run over its rollouts."""


def groups_path(directory: Path, step: int) -> Path:
    """File of a step: step n makes version n."""
    return directory / f"step_{step:06d}.parquet"


def write_groups(path: Path, outcomes: Iterable[Outcome]) -> None:
    """Write the groups that are at hand, trained and filtered, in slot order."""
    rows = [_row(outcome.group, outcome.reason) for outcome in outcomes if outcome.group]
    write_rows(path, rows, SCHEMA)


def _row(group: Group, reason: str) -> dict[str, object]:
    prompt, rollouts = group.prompt, group.rollouts
    return {
        "id": group.id,
        "prompt_id": prompt.id,
        "messages": [{"role": m.role, "content": m.content} for m in prompt.messages],
        "capability": prompt.capability,
        "reward": prompt.reward,
        "answer": prompt.answer,
        "system": group.system,
        "version": group.oldest_version,
        "state": "filtered" if reason else "trained",
        "reason": reason,
        "texts": [rollout.text for rollout in rollouts],
        "rewards": [rollout.reward for rollout in rollouts],
        "passed": [rollout.passed for rollout in rollouts],
        "finish": [rollout.finish for rollout in rollouts],
        "num_tokens": [rollout.num_tokens for rollout in rollouts],
        "errors": [rollout.error for rollout in rollouts],
        "advantages": list(centered(group.rewards)),
    }
