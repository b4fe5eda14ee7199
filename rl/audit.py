"""An independent look at a finished run: what the learner consumed, from the files alone.

    groups/step_*.parquet ──▶ who was trained on, in which order, how old ──┐
    ledger.jsonl ──▶ what became of every draw ─────────────────────────────┴──▶ do they agree?

Nothing here asks the loop's own books: it reads columns of files, so that an error of the books
cannot hide behind itself. The stage runs it at its end and keeps what it counts in the manifest.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq

from ground.errors import DataError
from rl.config import RlSection
from rl.journal import read_journal
from rl.ledger import audit_ledger
from rollout.judge_reward import JUDGE

_COLUMNS = "id", "prompt_id", "reward", "state", "draw", "slot", "attempt", "opened_at", "is_again"
_FINAL = ("trained", "filtered", "withdrawn")


@dataclass(slots=True)
class _Seen:
    """What the steps read so far have consumed."""

    samples: dict[tuple[str, int, int], str] = field(default_factory=dict)
    """Step file of each (prompt, pass, sample) that was trained on."""
    ends: dict[int, str] = field(default_factory=dict)
    """State of each draw that was trained on or filtered."""
    trained: int = 0
    """Samples that were trained on, each as often as it was."""
    late: int = 0
    tokens: int = 0
    oldest: int = 0


def audit_run(directory: Path, section: RlSection) -> dict[str, int]:
    """Check the journal and the ledger of a stage's folder; returns what was counted.

    Raises:
        DataError: names the file and the first thing that is wrong: a step is missing, a slot was
            left out or taken twice, a (prompt, pass, sample) was trained on twice, a token was
            older than the bound or younger than the learner, or the ledger says something else.
    """
    seen = _Seen()
    paths = sorted((directory / "groups").glob("step_*.parquet"))
    for number, path in enumerate(paths, start=1):
        if path.name != f"step_{number:06d}.parquet":
            raise DataError(f"the file of step {number} must come here", where=str(path))
        for fault in _faults_of_step(path, number - 1, section, seen):
            raise DataError(fault, where=str(path))
    closed = audit_ledger(read_journal(directory / "ledger.jsonl"))
    _compare(directory / "ledger.jsonl", seen.ends)
    return {
        "steps": len(paths),
        "trained_groups": sum(state == "trained" for state in seen.ends.values()),
        "trained_samples": len(seen.samples),
        "trained_tokens": seen.tokens,
        "filtered": sum(state == "filtered" for state in seen.ends.values()),
        "late": seen.late,
        "oldest_token": seen.oldest,
        "trained_twice": seen.trained - len(seen.samples),
        "lost": _drawn(directory / "ledger.jsonl") - sum(closed.get(name, 0) for name in _FINAL),
    }


def _faults_of_step(path: Path, step: int, section: RlSection, seen: _Seen) -> Iterator[str]:
    """What is wrong with a step's rows; adds them to what was seen."""
    rows = pq.read_table(path, columns=[*_COLUMNS, "segments"]).to_pylist()
    slots: dict[int, list[Mapping]] = defaultdict(list)
    for row in rows:
        slots[row["slot"]].append(row)
    first = step * section.groups_per_step
    if list(slots) != list(range(first, first + section.groups_per_step)):
        yield f"step {step} must consume slots {first} to {first + section.groups_per_step - 1}"
    for slot, draws in slots.items():
        yield from _faults_of_slot(slot, draws, section)
    for row in rows:
        if row["state"] == "re-admitted":
            seen.late += 1
            continue
        if row["draw"] in seen.ends:
            yield f"draw {row['draw']} was consumed before, as {seen.ends[row['draw']]}"
        seen.ends[row["draw"]] = row["state"]
        if row["state"] == "trained":
            yield from _faults_of_group(path, row, step, section, seen)


def _faults_of_slot(slot: int, draws: Sequence[Mapping], section: RlSection) -> Iterator[str]:
    """Attempts follow one another, and only the last one ends the slot."""
    for attempt, row in enumerate(draws):
        number = slot * (section.max_refills + 1) + attempt
        if row["attempt"] != attempt or (row["draw"] != number and not row["is_again"]):
            yield f"slot {slot} must have draw {number} as attempt {attempt}, got {row['draw']}"
        if row["id"] != f"{row['prompt_id']}.{row['draw']}":
            yield f"draw {row['draw']} of prompt {row['prompt_id']} has id {row['id']}"
    states = [row["state"] for row in draws]
    if states[:-1] != ["filtered"] * (len(states) - 1):
        yield f"slot {slot} must end with its first draw that is kept, got {states}"
    if states[-1] == "filtered" and len(states) != section.max_refills + 1:
        yield f"slot {slot} must be refilled {section.max_refills} times, got {len(states) - 1}"


def _faults_of_group(
    path: Path, row: Mapping, step: int, section: RlSection, seen: _Seen
) -> Iterator[str]:
    """Each sample is new, whole, and of an age that the bound allows."""
    least = 2 if row["reward"] == JUDGE else section.group_size  # unjudged answers leave a group
    if not least <= len(row["segments"]) <= section.group_size:
        yield f"group {row['id']} must have {section.group_size} rollouts"
    oldest_allowed = max(row["opened_at"], step - section.max_staleness)
    for index, segments in enumerate(row["segments"]):
        key = (row["prompt_id"], row["draw"], index)
        if key in seen.samples:
            yield f"prompt, pass and sample {key} were trained on in {seen.samples[key]} too"
        seen.samples[key] = path.name
        seen.trained += 1
        for segment in segments:
            if segment["source"] != "policy":
                continue
            spans = segment["versions"]
            count = len(segment["token_ids"])
            if len(segment["logprobs"]) != count or sum(s["length"] for s in spans) != count:
                yield f"rollout {index} of {row['id']} must have a version for each token"
            versions = [span["version"] for span in spans]
            if versions and not oldest_allowed <= min(versions) <= max(versions) <= step:
                yield (
                    f"tokens of {row['id']} must be of versions {oldest_allowed} to {step}, "
                    f"got {versions}"
                )
            seen.tokens += count
            seen.oldest = max([seen.oldest, *(step - version for version in versions)])


def _compare(ledger: Path, consumed: Mapping[int, str]) -> None:
    """What the ledger calls trained is exactly what was journaled as trained."""
    last = {int(str(record["draw"])): str(record["state"]) for record in read_journal(ledger)}
    trained = {draw for draw, state in last.items() if state == "trained"}
    journaled = {draw for draw, state in consumed.items() if state == "trained"}
    if trained != journaled:
        odd = sorted(trained ^ journaled)
        raise DataError(
            f"ledger and journal must agree on what was trained, draws {odd[:5]} differ",
            where=str(ledger),
        )
    unfiltered = [d for d, s in consumed.items() if s == "filtered" and last.get(d) != "filtered"]
    if unfiltered:
        raise DataError(
            f"the ledger must call draws {unfiltered[:5]} filtered as the journal does",
            where=str(ledger),
        )


def _drawn(ledger: Path) -> int:
    return len({int(str(record["draw"])) for record in read_journal(ledger)})
