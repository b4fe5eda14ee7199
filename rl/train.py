"""The `rl` stage: `python -m rl.train RECIPE [key.path=value …] [--run DIR] [--resume]`.

Under `accelerate launch … -m rl.train RECIPE` every rank's process hosts a learner; rank 0's is the
supervisor as well and does all that one process alone does.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from curation.mixture import require_quotas
from distill.ranks import require_whole_weights
from ground.console import progress
from ground.entry import Stage, stage_entry
from ground.errors import SetupError
from ground.launch import Launch, launch_of, of_launcher
from ground.leaving import leave
from ground.tables import read_prompts
from rl.audit import audit_run
from rl.config import LearnerSection, RlSection
from rl.job import Job, Report
from rl.journal import Journal, read_journal
from rl.ledger import audit_ledger
from rl.pool import split_pool
from rollout.judge_source import JudgeSource, judge_of
from rollout.processes import Reserved, reserved
from rollout.sandbox_probe import sandbox_facts

if TYPE_CHECKING:
    from distill.word import Teaching
    from ground.roll import Roll
    from rl.hosts import Hosts
    from rl.ranks import Ranks


def train(stage: Stage[RlSection]) -> dict[str, object]:
    """Run the loop to its end and audit ledger and journal; returns the summary."""
    launch, environment = launch_of(os.environ), of_launcher(os.environ)
    require_known(launch)
    require_one_starter(launch, stage.section.learner)
    if stage.section.lora:
        stage.section.lora.require_launch(launch, "rl")
    if stage.section.distill:
        require_whole_weights(launch, "rl")
    for name in environment:  # our learner is a rank; Ray's processes are none
        os.environ.pop(name, None)
    if not launch.is_main:
        from rl.hosts import host

        host(_roll(environment), environment)
        return {}
    with _hosts(launch, environment) as hosts, reserved(stage.record) as ours:
        prompts = read_prompts(stage.trail.prompts_before("rl"), stage.head.data, stage.directory)
        sandbox = sandbox_facts(prompts, stage.head.sandbox)
        judge = judge_of(prompts, stage.trail)
        pool = split_pool(prompts, stage.section.validation.prompts, stage.head.seed)
        if stage.section.quotas:  # the controller would refuse them too, but life after life
            require_quotas(stage.section.quotas, {prompt.capability for prompt in pool.training})
        # Ray reads its authentication mode from the environment when it is imported.
        from rl.supervisor import supervise

        teaching = _teaching(stage)
        timeline = Journal(stage.directory / "events.jsonl")
        if sandbox:
            timeline.append({"time": time.time(), "kind": "sandbox", **sandbox})
        facts = supervise(
            lambda life: _job(stage, life, ours, teaching, judge),
            pool,
            ours,
            on_report=lambda report: _tell(stage, timeline, report),
            note=timeline.append,
            ranks=_ranks(stage.section.learner, environment, hosts, ours),
        )
        timeline.close()
    audited = audit_ledger(read_journal(stage.directory / "ledger.jsonl"))
    consumed = audit_run(stage.directory, stage.section)
    taught = {"teacher": teaching.identity.teacher} if teaching else {}
    return {**facts, **sandbox, **taught, "audited": audited, "consumed": consumed}


def require_known(launch: Launch) -> None:
    """Refuse what rl does not run on.

    Raises:
        SetupError: FSDP2, or DeepSpeed that offloads.
    """
    if launch.kind == "fsdp2":
        raise SetupError(
            "rl does not run on FSDP2",
            where="accelerate launch",
            why="neither hand-over nor cuts gather weights and moments that FSDP2 has split",
            fix="use recipes/accelerate/ddp.yaml, zero2.yaml or zero3.yaml",
        )
    if launch.offloads:
        raise SetupError(
            "rl does not run with DeepSpeed's offloading",
            where="accelerate launch",
            why="cuts read moments where DeepSpeed keeps them on the device",
            fix="set offload_optimizer_device and offload_param_device to none, as in "
            "recipes/accelerate/zero3.yaml, and use more ranks",
        )


def require_one_starter(launch: Launch, learner: LearnerSection) -> None:
    """Refuse two numbers of ranks.

    Raises:
        SetupError: both a launcher and the recipe start ranks.
    """
    if launch.kind != "single" and learner.is_in_ray:
        raise SetupError(
            f"either accelerate launch or Ray starts the learner's ranks: the launcher has made "
            f"{launch}, rl.learner.num_ranks asks Ray for {learner.num_ranks}",
            where="rl.learner",
            fix="leave --accelerate out, or rl.learner",
        )


def _ranks(
    learner: LearnerSection, environment: Mapping[str, str], hosts: Hosts | None, ours: Reserved
) -> Ranks:
    if not learner.is_in_ray:
        from rl.ranks import LaunchedRanks

        return LaunchedRanks(environment, hosts)
    from rl.train_ranks import TrainRanks

    return TrainRanks(ours.folder)


@contextmanager
def _hosts(launch: Launch, environment: Mapping[str, str]) -> Iterator[Hosts | None]:
    """The other ranks' hosts, where there are any; they leave when this ends."""
    if launch.num_ranks == 1:
        yield None
        return
    from rl.hosts import Hosts

    with Hosts(_roll(environment)) as hosts:
        yield hosts


def _roll(environment: Mapping[str, str]) -> Roll:
    from ground.roll import Roll  # brings torch along, which the supervisor alone does not need

    return Roll(environment)


def _teaching(stage: Stage[RlSection]) -> Teaching | None:
    """Whose word is learned from; tokenizers and templates are compared before anything starts."""
    section = stage.section
    if section.distill is None:
        return None
    from distill.plan import plan_teaching  # it brings transformers along

    teacher, student = stage.trail.teacher(), stage.trail.model_before("rl")
    return plan_teaching(section.distill, teacher, student, section.engine.max_length)


def _job(
    stage: Stage[RlSection],
    life: int,
    ours: Reserved,
    teaching: Teaching | None,
    judge: JudgeSource | None,
) -> Job:
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
        sandbox=stage.head.sandbox,
        teaching=teaching,
        judge=judge,
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
    leave(stage_entry("rl", RlSection, train))
