"""Tidy frames of what the stages did in a run: one row is one observation.

    judged ──▶ fates ──▶ shares         mined, groups, rounds ──▶ history of a prompt
    groups, rollouts                    rounds ──▶ curriculum         ledger ──▶ funnel
    teacher                             evaluated

They are read from files (curation/artefacts.py), also while the run goes on; what is missing is an
empty frame with all its columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path

import pandas as pd

from curation.artefacts import (
    ROUND,
    Row,
    calibration_rows,
    draw_rows,
    evaluated_rows,
    group_rows,
    judged_rows,
    ledger_ends,
    mined_rows,
    rollouts_of,
    round_rows,
    teacher_rows,
)
from curation.calibration import agreements
from curation.config import PruneSection
from curation.judge import PARTS
from curation.tallies import CURRICULUM, group_of, quotas_at, round_sums
from ground.records import Message, Prompt
from rollout.passk import wilson
from rollout.rewards import Refusal, RewardFunction, Score, call_reward

JUDGED = (
    *("id", "capability", "question", "answer", "label", "score", *PARTS),
    *("given_label", "judged_by", "mark", "duplicate_of", "rank", "kept", "rule", "reason"),
)
MINED = (
    *("prompt_id", "capability", "question", "answer", "label", "successes", "trials"),
    *("pass_rate", "low", "high", "status"),
)
GROUPS = (
    *("step", "group", "prompt_id", "capability", "question", "answer", "system", "state"),
    *("reason", "opened_at", "version", "successes", "trials", "pass_rate", "reward", "tokens"),
)
ROLLOUTS = (
    *("step", "group", "prompt_id", "capability", "index", "text", "reward", "passed"),
    *("advantage", "tokens", "finish", "error"),
)
ROUNDS = ("version", *ROUND)
FUNNEL = ("version", "capability", "state", "reason", "draws")
HISTORY = (
    *("version", "source", "successes", "trials", "pass_rate", "low", "high", "group", "outcome"),
)
TEACHER = ("stage", "step", "capability", "share", "distance")
EVALUATED = (
    *("model", "prompt_id", "capability", "label", "question", "successes", "trials"),
    "pass_rate",
)
OWN = ("own_reward", "own_passed", "own_error")


def judged(run: Path | str) -> pd.DataFrame:
    """Every SFT row that pruning decided on: what the judge said, its rank, and whether it stayed.

    Rank 0 is the first to go of its capability (or of all, as `rule` says). Columns of other kinds
    of judges than the run's are empty; unjudged rows have no score. `mark` is misaligned, duplicate
    (of `duplicate_of`), or empty.
    """
    return _frame(judged_rows(Path(run)), JUDGED)


def fates(
    judged: pd.DataFrame, fractions: Sequence[float | str] = ("small", "behemoth")
) -> pd.DataFrame:
    """What each of some fractions would have kept of the same judgements: the rows once for each.

    `fraction` and `kept` are replaced by those of the fraction; nothing is judged again.

    Example:
        fates(judged, [0.5, 0.95]).groupby("fraction").kept.mean() → 0.5 and 0.05
    """
    values = zip(judged["capability"], judged["rule"], judged["rank"], strict=True)
    rows: list[Row] = [{"capability": c, "rule": rule, "rank": rank} for c, rule, rank in values]
    parts = []
    for each in fractions:
        share = PruneSection.model_validate({"fraction": each}).share
        quota = quotas_at(rows, share)
        kept = [row["rank"] >= quota[group_of(row)] for row in rows]
        parts.append(judged.assign(fraction=float(share), kept=pd.Series(kept, judged.index, bool)))
    return pd.concat(parts, ignore_index=True)


def shares(fates: pd.DataFrame, by: str = "capability") -> pd.DataFrame:
    """Rows, share kept and mean score of what is kept, per fraction and per value of a column."""
    parts = fates.groupby(["fraction", by], sort=True, dropna=False)
    kept = fates[fates["kept"]].groupby(["fraction", by], dropna=False)
    table = parts["kept"].agg(rows="size", kept="sum").astype(int)
    table["kept_share"] = table["kept"] / table["rows"]
    table["mean_score_kept"] = kept["score"].mean()
    return table.reset_index()


def calibration(run: Path | str) -> pd.DataFrame:
    """Rows that several kinds of judges have scored: a row is what one kind said of one SFT row."""
    return _frame(calibration_rows(Path(run)), ("id", "capability", "kind", "score"))


def agreement(calibration: pd.DataFrame) -> pd.DataFrame:
    """How alike each two kinds order the rows, per capability and over `all`: rank correlations.

    Example:
        agreement(calibration(run)).query("capability == 'all'").correlation
    """
    wide = calibration.pivot(index=["id", "capability"], columns="kind", values="score")
    scores = {
        str(kind): [None if pd.isna(score) else score for score in column]
        for kind, column in wide.items()
    }
    found = agreements([str(name) for name in wide.index.get_level_values("capability")], scores)
    columns = ["capability", "one", "other", "rows", "correlation", "low", "high"]
    return pd.DataFrame([asdict(each) for each in found], columns=columns)


def mined(run: Path | str) -> pd.DataFrame:
    """Every RL prompt as pass@k found it, with Wilson's 95 % interval."""
    return _frame(mined_rows(Path(run)), MINED)


def groups(run: Path | str) -> pd.DataFrame:
    """Every draw that a step consumed: what was asked and what came of it.

    `opened_at` is the version at which it was drawn, `version` that of its oldest token; `state` is
    trained, filtered or re-admitted, and `reason` says why it was not trained on.
    """
    return _frame(group_rows(Path(run)), GROUPS)


def rollouts(run: Path | str, *, step: int | None = None, group: str | None = None) -> pd.DataFrame:
    """Every answer of the groups, or of those of one step, or of one group.

    Parts of a composed reward have columns of their own, `part_<name>`.
    """
    prompt = None if group is None else group.rpartition(".")[0]
    rows = (
        answer
        for row in group_rows(Path(run), step, prompt=prompt, answers=True)
        if group in (None, row["group"])
        for answer in rollouts_of(row)
    )
    return _frame(rows, ROLLOUTS)


def rescored(run: Path | str, function: RewardFunction, *, step: int | None = None) -> pd.DataFrame:
    """The rollouts of a run, or of one step, with what another reward would have given them.

    `own_reward` and `own_passed` are empty where the function returned something that is no score;
    `own_error` says why. It is called in this process, with the run's own answers: fit for code of
    one's own, never for code that a model wrote.

    Example:
        rescored(run, brief).groupby("group").own_reward.nunique() → 1 where a group would be flat

    Raises:
        RewardError: it did not return one value per completion.
    """
    rows = (
        {**answer, **_own(result)}
        for row in group_rows(Path(run), step, answers=True)
        if row["texts"]
        for answer, result in zip(
            rollouts_of(row), call_reward(function, _prompt_of(row), row["texts"]), strict=True
        )
    )
    return _frame(rows, (*ROLLOUTS, *OWN))


def rounds(run: Path | str) -> pd.DataFrame:
    """What the curriculum knew, a row per version and per prompt that was observed.

    Prompts that were not observed share a row with those of equal evidence: `prompts` counts them,
    and `prompt_id` is empty. `share` is of the version's draws.
    """
    return _frame(round_rows(Path(run)), ROUNDS)


def curriculum(run: Path | str) -> pd.DataFrame:
    """A row per round: prompts by status, posterior means, and what came of its draws.

    `mean` is that of the posterior over the pool, `target` that over what the round was to draw,
    by weight; `aim` is what `order: target` aimed at, and empty without it. `drawn`, `trained` and
    `pass_rate` are of the draws from this round up to the next.
    """
    return _frame(round_sums(round_rows(Path(run)), draw_rows(Path(run))), CURRICULUM)


def history(run: Path | str, prompt_id: str) -> pd.DataFrame:
    """The pass rate of one prompt over versions: as mined, as groups showed it, as it was believed.

    `source` is mined, group or posterior. Intervals are Wilson's at 95 %, and of a posterior one
    standard deviation to each side.
    """
    found = _frame(mined_rows(Path(run), prompt_id), MINED).assign(version=0, source="mined")
    drawn = _frame(group_rows(Path(run), prompt=prompt_id), GROUPS)
    shown = drawn.query("trials > 0").assign(source="group")
    shown["outcome"] = shown["reason"].where(shown["reason"] != "", shown["state"])
    bounds = [wilson(s, int(n)) for s, n in zip(shown["successes"], shown["trials"], strict=True)]
    shown["low"], shown["high"] = [b.low for b in bounds], [b.high for b in bounds]
    known = rounds(run).query("prompt_id == @prompt_id").assign(source="posterior")
    known["pass_rate"] = known["mean"]
    known["low"] = (known["mean"] - known["deviation"]).clip(lower=0)
    known["high"] = (known["mean"] + known["deviation"]).clip(upper=1)
    parts = [part.reindex(columns=HISTORY) for part in (found, shown, known) if len(part)]
    table = pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=HISTORY)
    return table.sort_values("version", kind="stable", ignore_index=True)


def funnel(run: Path | str) -> pd.DataFrame:
    """Where every drawn prompt ended, counted: per version at which it was drawn and capability.

    `state` is trained, filtered or withdrawn at the end of a run, and an open one before; `reason`
    says why a draw was not trained on. The draws sum to all that were made.
    """
    table = pd.DataFrame(ledger_ends(Path(run)), columns=list(FUNNEL[:-1]))
    return table.value_counts(sort=False).rename("draws").reset_index()


def teacher(run: Path | str) -> pd.DataFrame:
    """What share the teacher's word had, per step of sft, its arm or rl and per capability.

    `share` is that of the soft target in sft and the weight of the soft loss in rl; `distance` is
    the student's KL from the teacher on its own answers, in nats a token, and empty in sft.
    """
    return _frame(teacher_rows(Path(run)), TEACHER)


def evaluated(run: Path | str) -> pd.DataFrame:
    """What each model made of each held-out prompt; one that could not be asked has 0 trials.

    Example:
        rates = evaluated(run).pivot(index="prompt_id", columns="model", values="pass_rate")
        (rates["taught"] - rates["sft"]).mean() → what the teacher's word added
    """
    return _frame(evaluated_rows(Path(run)), EVALUATED)


def _own(result: Score | Refusal) -> Row:
    if isinstance(result, Refusal):
        return {"own_error": result.reason}
    return {"own_reward": result.reward, "own_passed": result.passed, "own_error": ""}


def _prompt_of(row: Row) -> Prompt:
    messages = tuple(Message(m["role"], m["content"]) for m in row["messages"] or [])
    return Prompt(row["prompt_id"], messages, row["capability"], "own", row["solution"])


def _frame(rows: Iterable[Row], columns: Sequence[str]) -> pd.DataFrame:
    """A frame with at least these columns, first and in this order."""
    listed = list(rows)
    extra = dict.fromkeys(name for row in listed for name in row if name.startswith("part_"))
    return pd.DataFrame.from_records(listed, columns=[*columns, *extra])
