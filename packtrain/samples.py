"""Texts worth reading: a held-out prompt before and after, and what RL is trying now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ground.config import ARMS
from ground.logs import redact
from packtrain.observe import number, read_rows, text
from packtrain.verdict import NAMES, evaluated

MAX_CHARACTERS = 1500
"""Of a text that is shown; the rest is cut with a note."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What one model said to a prompt: one of its samples, and how many were right.

    Example:
        Answer("RL", "57+68=?7+8+0=15… => 125", is_right=True, successes=7, trials=8)
    """

    model: str
    completion: str
    is_right: bool
    successes: int
    trials: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """One held-out prompt through the models of the trail."""

    prompt: str
    capability: str
    label: str
    answers: tuple[Answer, ...]

    @property
    def change(self) -> float:
        """Pass rate of the trail's last model minus that of its first."""
        arms = {NAMES[arm] for arm in ARMS}
        models = [answer for answer in self.answers if answer.model not in arms]
        rates = [answer.successes / max(answer.trials, 1) for answer in models]
        return rates[-1] - rates[0] if rates else 0.0


def comparisons(run: Path, limit: int = 8) -> list[Comparison]:
    """Prompts that every evaluation asked: the largest gains, one per capability first, and the
    largest loss, so that a report never shows only what went well.
    """
    places = evaluated(run)
    tables = {
        NAMES[where]: {
            text(row.get("id")): row
            for row in read_rows(run / where / "evaluation" / "prompts.parquet")
        }
        for where in places
    }
    if not tables:
        return []
    common = sorted(set.intersection(*(set(rows) for rows in tables.values())))
    found = [_comparison([(name, rows[key]) for name, rows in tables.items()]) for key in common]
    ranked = sorted((c for c in found if c.prompt), key=lambda comparison: -comparison.change)
    if not ranked:
        return []
    chosen = _spread(ranked, limit - 1)
    worst = ranked[-1]
    chosen += [worst] if worst.change < 0 and worst not in chosen else []
    return [_printable(each) for each in chosen]


def newest_sample(stage: Path) -> str:
    """The first rollout of the newest groups file of RL; empty elsewhere."""
    files = sorted((stage / "groups").glob("step_*.parquet"))
    rows = read_rows(files[-1], ["texts"]) if files else []
    texts = rows[0].get("texts") if rows else None
    return shorten(text(texts[0])) if isinstance(texts, list) and texts else ""


def shorten(content: str) -> str:
    """The text without secrets, cut at MAX_CHARACTERS with a note of how much is missing."""
    content = redact(content)
    if len(content) <= MAX_CHARACTERS:
        return content
    return f"{content[:MAX_CHARACTERS]} … ({len(content) - MAX_CHARACTERS} characters more)"


def conversation(messages: object) -> str:
    """Messages as text; roles are named when there are several."""
    listed = messages if isinstance(messages, list) else []
    turns = [turn for turn in listed if isinstance(turn, Mapping)]
    if len(turns) == 1:
        return text(turns[0].get("content"))
    return "\n".join(f"{text(t.get('role'))}: {text(t.get('content'))}" for t in turns)


def _comparison(rows: Sequence[tuple[str, Mapping[str, object]]]) -> Comparison:
    _, first = rows[0]
    prompt = conversation(first.get("messages"))
    answers = tuple(_answer(name, row) for name, row in rows)
    return Comparison(prompt, text(first.get("capability")), text(first.get("label")), answers)


def _answer(model: str, row: Mapping[str, object]) -> Answer:
    texts, passed = row.get("texts"), row.get("passed")
    completion = text(texts[0]) if isinstance(texts, list) and texts else ""
    is_right = isinstance(passed, list) and bool(passed) and passed[0] is True
    successes, trials = number(row.get("successes")) or 0, number(row.get("trials")) or 0
    return Answer(model, completion, is_right, int(successes), int(trials))


def _printable(comparison: Comparison) -> Comparison:
    answers = tuple(
        replace(answer, completion=shorten(answer.completion)) for answer in comparison.answers
    )
    return replace(comparison, prompt=shorten(comparison.prompt), answers=answers)


def _spread(ranked: Sequence[Comparison], limit: int) -> list[Comparison]:
    """The best of each capability, then the best of the rest."""
    firsts = list({c.capability: c for c in reversed(ranked)}.values())
    rest = [c for c in ranked if c not in firsts]
    return sorted([*firsts, *rest][:limit], key=lambda comparison: -comparison.change)
