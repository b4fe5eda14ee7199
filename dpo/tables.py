"""The tables of the `dpo` stage: RL's groups, read strictly, and the pairs, written out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, ValidationError

from dpo.pairs import Answer, GroupRow, MinedPair
from ground.errors import DataError
from ground.records import Finish, Message, Prompt, Role
from ground.tables import read_rows

PAIR_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("group", pa.string(), nullable=False),
        pa.field("version", pa.int64(), nullable=False),
        pa.field("capability", pa.string(), nullable=False),
        pa.field(
            "messages", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
        ),
        pa.field("system", pa.string(), nullable=False),
        pa.field("chosen", pa.string(), nullable=False),
        pa.field("rejected", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("chosen_reward", pa.float64(), nullable=False),
        pa.field("rejected_reward", pa.float64(), nullable=False),
    ]
)
"""Columns of `dpo/pairs.parquet`."""


def read_groups(files: Sequence[Path]) -> list[GroupRow]:
    """All groups that RL left, in the order of its files."""
    return [
        group_row(row, f"{file}:row {number}")
        for file in files
        for number, row in enumerate(read_rows(file), start=1)
    ]


def pair_row(mined: MinedPair) -> dict[str, object]:
    """A row of PAIR_SCHEMA."""
    pair = mined.pair
    return {
        "id": pair.prompt.id,
        "group": mined.group,
        "version": mined.version,
        "capability": pair.prompt.capability,
        "messages": [{"role": m.role, "content": m.content} for m in pair.prompt.messages],
        "system": pair.system,
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        "reason": pair.reason,
        "chosen_reward": mined.chosen_reward,
        "rejected_reward": mined.rejected_reward,
    }


def group_row(row: Mapping[str, object], where: str) -> GroupRow:
    """Read a row of the groups file.

    Raises:
        DataError: columns are missing or of other types, or the lists differ in length.
    """
    try:
        fields = _Fields.model_validate(row)
        rollouts = zip(
            fields.texts,
            fields.rewards,
            fields.passed,
            fields.finish,
            fields.num_tokens,
            fields.errors,
            strict=True,
        )
        answers = tuple(Answer(index, *rollout) for index, rollout in enumerate(rollouts))
    except (ValidationError, ValueError) as error:
        raise DataError(
            "a row of RL's groups cannot be read",
            where=where,
            why=" ".join(str(error).split())[:300],
            fix="run the rl stage again with this version of packtrain",
        ) from error
    messages = tuple(Message(message.role, message.content) for message in fields.messages)
    prompt = Prompt(fields.prompt_id, messages, fields.capability, fields.reward, fields.answer)
    return GroupRow(fields.id, fields.version, prompt, fields.system, answers)


class _Turn(BaseModel):
    role: Role
    content: str


class _Fields(BaseModel):
    """The columns of rl/groups that pairs need."""

    model_config = ConfigDict(extra="ignore")

    id: str
    prompt_id: str
    version: int
    messages: list[_Turn]
    capability: str
    reward: str
    answer: str
    system: str
    texts: list[str]
    rewards: list[float]
    passed: list[bool]
    finish: list[Finish]
    num_tokens: list[int]
    errors: list[str]
