"""`python -m distill.fill RECIPE`: the teacher speaks to the rows of SFT, once and for all."""

from __future__ import annotations

import logging
from dataclasses import asdict

import torch

from distill.config import TargetsSection
from distill.filling import estimate, fill, in_bytes, require_room
from distill.plan import NOTE, TargetsPlan, note_of, plan_targets
from distill.teacher import Teacher
from ground.console import reporter
from ground.entry import Stage, stage_entry
from ground.leaving import leave
from ground.model import load_model
from ground.storage import write_file

logger = logging.getLogger("packtrain")


def train(stage: Stage[TargetsSection]) -> dict[str, object]:
    """Fill the store and leave `targets.json`, which says where it is and whose."""
    section = stage.section
    torch.set_num_threads(section.threads)
    plan = plan_targets(section, stage.trail, stage.head.data, quarantine=stage.directory)
    store = plan.open_store()
    wanted = estimate(store, plan.rows, plan.format, plan.identity.vocabulary)
    logger.info(
        "%d rows, %d of them new: %s", wanted.rows, wanted.missing, in_bytes(wanted.num_bytes)
    )
    require_room(store, wanted)
    filled = fill(store, plan.rows, lambda: load_teacher(plan, section), reporter(stage.directory))
    write_file(stage.directory / NOTE, note_of(plan, stage.directory))
    return {
        "teacher": plan.identity.teacher,
        "format": plan.identity.format,
        **asdict(filled),
        "bytes_per_token": wanted.bytes_per_token,
        "store_bytes": store.num_bytes,
    }


def load_teacher(plan: TargetsPlan, section: TargetsSection) -> Teacher:
    """The teacher's weights, on the GPU where there is one."""
    model = load_model(plan.teacher)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)  # pyright: ignore[reportArgumentType]
    vocabulary = plan.identity.vocabulary
    return Teacher(model, plan.format, vocabulary=vocabulary, pass_tokens=section.pass_tokens)


if __name__ == "__main__":
    leave(stage_entry("targets", TargetsSection, train))
