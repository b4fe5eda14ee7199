"""The `rl` stage: `python -m rl.train RECIPE [key.path=value …] [--run DIR] [--resume]`."""

from __future__ import annotations

import sys

from ground.console import progress
from ground.entry import Stage, stage_entry
from ground.tables import read_prompts
from rl.audit import audit_run
from rl.config import RlSection
from rl.job import Job, Report
from rl.journal import Journal, read_journal
from rl.ledger import audit_ledger
from rl.pool import split_pool
from rl.processes import Reserved, reserved


def train(stage: Stage[RlSection]) -> dict[str, object]:
    """Run the loop to its end and audit ledger and journal; returns the summary."""
    prompts = read_prompts(stage.trail.prompts_before("rl"), stage.head.data, stage.directory)
    pool = split_pool(prompts, stage.section.validation.prompts, stage.head.seed)
    with reserved(stage.run.path / "log" / "rl.processes.json") as ours:
        # Ray reads its authentication mode from the environment when it is imported.
        from rl.supervisor import supervise

        timeline = Journal(stage.directory / "events.jsonl")
        facts = supervise(
            lambda life: _job(stage, life, ours),
            pool,
            ours,
            on_report=lambda report: _tell(stage, timeline, report),
            note=timeline.append,
        )
        timeline.close()
    audited = audit_ledger(read_journal(stage.directory / "ledger.jsonl"))
    consumed = audit_run(stage.directory, stage.section)
    return {**facts, "audited": audited, "consumed": consumed}


def _job(stage: Stage[RlSection], life: int, ours: Reserved) -> Job:
    return Job(
        section=stage.section,
        seed=stage.head.seed,
        run_name=stage.head.name,
        namespace=f"packtrain-{ours.mark}",
        incarnation=life,
        model=stage.trail.model_before("rl").resolve(),
        directory=stage.directory.resolve(),
        log_directory=(stage.run.path / "log").resolve(),
        systems=stage.head.systems,
        rewards=tuple(path.resolve() for path in stage.head.rewards),
    )


def _tell(stage: Stage[RlSection], timeline: Journal, report: Report) -> None:
    if report.kind == "begun":
        stage.metrics.rewind(report.step)
        return
    numbers = report.numbers
    if report.kind == "validation":
        stage.metrics.log(report.step, numbers, phase="validation")
        return
    stage.metrics.log(report.step, numbers)
    if "replayed" in numbers:
        return
    timeline.append(
        {"time": report.ended, "kind": "train", "role": "learner", "start": report.started}
        | {"end": report.ended, "version": report.step}
    )
    shown = ("reward", "pass_rate", "kept_share", "entropy", "ess", "learner_idle_share")
    progress(
        stage.directory,
        report.step,
        stage.section.steps,
        **{name: numbers[name] for name in shown if name in numbers},
    )


if __name__ == "__main__":
    sys.exit(stage_entry("rl", RlSection, train))
