"""The learner's process, told by lines on stdin, telling by lines on stdout.

in:  Job (at once: imports and loading go on while Ray starts) → Ray's address → end of file: leave
out: Report, one per step and validation, and one at the end

With several ranks there is one such process per rank; rank 0's leads, and it alone is told Ray's
address, speaks to the controller and writes files.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import TextIO

import ray
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from ground import faults
from ground.adapter import Adapter, base_identity
from ground.chat import ChatTemplate
from ground.checkpoints import Checkpoints, step_of
from ground.errors import InfraError, PacktrainError
from ground.launch import launch_of
from ground.logs import setup_logging
from ground.model import (
    export_model,
    live_tensors,
    load_model,
    load_tokenizer,
    random_model,
)
from ground.ranks import join_ranks
from ground.records import Group
from ground.roles import enter_role
from ground.signals import Interrupted, held_signals
from ground.storage import commit_directory
from rl.batch import collate, rows_of
from rl.buffer import Plan
from rl.config import RlSection
from rl.consumed import Consumed
from rl.ensemble import Ensemble
from rl.job import Job, Report, Voice, learner_name, phase
from rl.learner import Learner
from rl.loop import LearnerLoop, Loop
from rl.prober import Prober
from rl.publisher import Publisher
from rl.remote import RemoteLoop
from rl.snapshot import Cut, read_books, read_snapshot, restore
from rl.speaker import Speaker
from rl.versions import Versions
from rollout.failures import sort_failure

_RANK_SLACK_SECONDS = 120.0
"""Rank 0's own deadlines say more, so those of the ranks that follow it come later."""

logger = logging.getLogger("packtrain")


def main() -> int:
    """Live one life of the learner and return its exit code."""
    speaker, launch = Speaker(), launch_of(os.environ)
    job = Job.model_validate_json(sys.stdin.readline())
    setup_logging(job.log_directory / f"{learner_name(launch.rank)}.log")
    enter_role("learner" if launch.is_main else f"learner/{launch.rank}")
    if not launch.is_main:
        _leave_with_owner(sys.stdin)
    try:
        speaker.say(Report(kind="done", facts=learn(job, speaker, join_ray)))
    except Interrupted as interruption:
        speaker.say(Report(kind="done"))
        return interruption.exit_code
    except PacktrainError as error:
        return speaker.fail(error)
    except Exception as error:
        logger.exception("training failed")
        lower = "lower rl.micro_batch_tokens"
        return speaker.fail(sort_failure(error, "training", memory_fix=lower))
    return 0


def learn(job: Job, speaker: Voice, join: Callable[[Job], Loop]) -> dict[str, object]:
    """Load, join, train, export; returns the facts for the manifest, on rank 0.

    Args:
        join: finds the controller of this life; only rank 0 asks for it.

    Raises:
        Interrupted: by a signal; the last version is saved and the ledger is closed.
    """
    torch.set_num_threads(job.section.threads)
    torch.manual_seed(job.seed)
    ranks = join_ranks(f"rl/{job.incarnation}", seconds=rank_patience(job.section))
    read = random_model if job.receives_weights else load_model
    model, tokenizer = read(job.model), load_tokenizer(job.model)
    if ranks.any(job.receives_weights):
        ranks.give(live_tensors(model).values())
    pad_id = ChatTemplate(tokenizer).pad_id
    lora = job.section.lora
    adapter = Adapter(model, lora, seed=job.seed, stage="rl") if lora else None
    learner = Learner(model, ranks.accelerator(), job.section, pad_id, adapter, job.teaching)
    ranks.check(ranks.num_ranks, learner.update.module)
    prober = Prober(
        model,
        max_length=job.section.engine.max_length,
        seed=job.seed,
        floor=job.section.engine.parity_nats,
        through=learner.update.module if learner.update.splits_weights else None,
        shared=ranks.shared if learner.update.splits_weights else lambda experts: experts,
        otherwise=adapter.folded if adapter else None,
    )
    ensemble = Ensemble(learner, prober, ranks)
    if not ranks.is_main:
        ensemble.follow()
        return {}
    try:
        facts, weights = _lead(job, speaker, join, ensemble, adapter)
    except (PacktrainError, Interrupted) as error:
        if not isinstance(error, InfraError):
            ensemble.end()
        raise
    if adapter:
        adapter.restore(weights)
        model = adapter.merged()
        with commit_directory(job.directory / "adapter", facts) as staging:
            adapter.save(staging, job.model)
    else:
        if learner.update.splits_weights:
            unset_hf_deepspeed_config()  # or the one to export would be split among the ranks too
            model = load_model(job.model)
        restore(model, weights)
    with commit_directory(job.directory / "model", facts) as staging:
        export_model(model, tokenizer, staging, facts)
        faults.point("export")
    return facts


def rank_patience(section: RlSection) -> float:
    """How long a rank waits for the others: rank 0 may publish, and then wait for a plan."""
    return section.publication_seconds + section.step_deadline_seconds + _RANK_SLACK_SECONDS


def _lead(
    job: Job,
    speaker: Voice,
    join: Callable[[Job], Loop],
    ensemble: Ensemble,
    adapter: Adapter | None,
) -> tuple[dict[str, object], Mapping[str, Tensor]]:
    """Rank 0's part: the loop from the newest cut to its end; returns facts and best weights."""
    identity = base_identity(job.section.lora, job.model) if job.section.lora else {}
    checkpoints = Checkpoints(job.checkpoints_directory, job.section.checkpoints_kept, identity)
    cut = _newest_cut(checkpoints, ensemble)
    logger.info("loaded %s at version %d", job.model, cut.version)
    speaker.say(phase("find the controller"))
    loop = join(job)
    if adapter:
        loop.found(adapter.base(), adapter.scale)
    logger.info("joined; the workers are coming up")
    speaker.say(Report(kind="begun", step=cut.version))
    publisher = Publisher(
        loop,
        checkpoints,
        Checkpoints(job.best_directory, 1, identity),
        Versions(job.directory / "digests.jsonl", "digest"),
        Versions(job.directory / "validation.jsonl", "pass_rate"),
        speaker.score,
    )

    def pack(version: int, trained: Sequence[Group] = ()) -> dict[str, Tensor]:
        probes = ensemble.probes_of(trained)
        with ensemble.live() as tensors:
            return loop.pack(version, tensors, probes)

    steps = LearnerLoop(
        ensemble,
        loop,
        publisher,
        Consumed(job.directory / "groups", job.section.advantages),
        job.section,
        tell=speaker.say,
        keep_batch=lambda plan: keep_batch(job, plan),
        pack=pack,
    )
    version = _train(steps, loop, cut, pack, speaker)
    speaker.say(phase("close the loop and export", version))
    ledger = loop.close("run ended")
    best = publisher.best_weights()
    weights = ensemble.model_tensors() if best is None else best
    ensemble.end()
    facts: dict[str, object] = {"stage": "rl", "run": job.run_name, "base": str(job.model)}
    facts |= {"version": publisher.best.version if publisher.best else version}
    facts |= {"adapter": adapter.facts()} if adapter else {}
    score = publisher.best.score if publisher.best else None
    return {**facts, "validation_pass_rate": score, "ledger": ledger}, weights


def _newest_cut(checkpoints: Checkpoints, learners: Ensemble) -> Cut:
    """Bring the learners to the newest whole cut, if there is one."""
    folder = checkpoints.latest()
    if folder is None:
        return Cut()
    version = step_of(folder)
    snapshot = read_snapshot(folder, version)
    learners.load(snapshot.model, snapshot.optimizer)
    logger.info("going on from %s", folder)
    return Cut(version, read_books(folder), snapshot.guards)


def _train(
    steps: LearnerLoop,
    loop: Loop,
    cut: Cut,
    pack: Callable[[int], dict[str, Tensor]],
    speaker: Voice,
) -> int:
    """Repeat what the journal has, begin, train; returns the last version.

    An error closes the loop, so that its ledger is whole.
    """
    if cut.guards is not None:
        steps.load_guards(cut.guards)
    try:
        # Signals are held from here on, since joining Ray replaces their handlers.
        with held_signals() as pending:
            version, replayed = steps.repeat(cut.version)
            speaker.say(phase("give the workers their first weights", version))
            loop.begin(version, pack(version), cut.books, replayed)
            logger.info("the workers have version %d", version)
            steps.catch_up(cut.version, version)
            return steps.run(version, pending)
    except (PacktrainError, Interrupted) as error:
        with suppress(PacktrainError):
            loop.close("interrupted" if isinstance(error, Interrupted) else "failed")
        raise


def join_ray(job: Job) -> RemoteLoop:
    """Wait for Ray's address, join, and leave with the supervisor from now on."""
    lines: TextIO = sys.stdin
    address = lines.readline().strip()
    if not address:
        sys.exit(0)
    _leave_with_owner(lines)
    ray.init(
        address=address,
        namespace=job.namespace,
        log_to_driver=False,
        logging_level=logging.WARNING,
        configure_logging=False,
    )
    return RemoteLoop(job)


def _leave_with_owner(lines: TextIO) -> None:
    threading.Thread(target=_leave_at_end, args=(lines,), name="lifeline", daemon=True).start()


def _leave_at_end(lines: TextIO) -> None:
    """The supervisor holds the other end of the pipe: when it is gone, so are we."""
    lines.read()
    os._exit(1)


def keep_batch(job: Job, plan: Plan) -> None:
    """Save the rollouts that a step diverged on."""
    rows = rows_of(plan.groups, job.section.advantages, plan.step)
    batch = collate([[row] for row in rows], pad_id=0)
    tensors = {name.removesuffix("_BT"): tensor for name, tensor in batch.tensors().items()}
    with commit_directory(job.directory / "diverged", {"step": plan.step}) as staging:
        save_file(tensors, staging / "batch.safetensors")
