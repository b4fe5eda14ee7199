"""The `sft` stage: `python -m sft.train RECIPE` or `accelerate launch … -m sft.train RECIPE`."""

from __future__ import annotations

import logging
import os
from dataclasses import asdict
from pathlib import Path

from distill.config import DistillSection
from distill.ranks import require_whole_weights
from ground.adapter import Adapter, base_identity
from ground.chat import ChatTemplate
from ground.checkpoints import Checkpoints
from ground.entry import Stage, stage_entry
from ground.errors import RecipeError
from ground.launch import launch_of
from ground.leaving import leave
from ground.model import freeze_unreached, load_model, load_tokenizer
from ground.model_files import read_config
from ground.ranks import Ranks, join_ranks
from ground.stage_export import export_stage, stage_card
from ground.tables import read_demonstrations, write_jsonl
from ground.training import Fit
from ground.training_rows import TrainingRows, encode_demonstrations
from sft.config import SftSection
from sft.soft import Soft, open_soft, warn_of_unobserved
from sft.trainer import run_sft

logger = logging.getLogger(__name__)


def train(stage: Stage[SftSection]) -> dict[str, object]:
    """Imitate the demonstrations, and the teacher where the recipe says so: in this model, or in
    the arm `taught` beside it.

    Leaves `model/`, and what was skipped in `skipped.jsonl`; with LoRA `adapter/` too, which is
    already added into `model/`.
    """
    section, trail = stage.section, stage.trail
    if section.lora:
        section.lora.require_launch(launch_of(os.environ), "sft")
    ranks, base = join_ranks("sft"), trail.model_before("sft")
    tokenizer = load_tokenizer(base)
    chat = ChatTemplate(tokenizer)
    _check_context(section.max_length, read_config(base))
    rows = _read_rows(stage, chat, is_main=ranks.is_main)
    soft = None
    if section.distill is not None and section.distill.as_arm == bool(stage.arm):
        soft, rows = _open_soft(stage, section.distill, rows, ranks)
    model = load_model(base)
    identity = {"rows": rows.fingerprint, "template": chat.fingerprint}
    identity |= {"layout": ranks.launch.layout} | freeze_unreached(model)
    adapter = None
    if section.lora:
        adapter = Adapter(model, section.lora, seed=stage.head.seed, stage="sft")
        identity |= base_identity(section.lora, base)
    checkpoints = Checkpoints(
        stage.directory / "checkpoints", section.trainer.keep_checkpoints, identity
    )
    fitted = run_sft(
        model,
        tokenizer,
        rows,
        section.trainer,
        Fit(
            stage.directory, stage.metrics, checkpoints, section.trainer.max_seconds, ranks, adapter
        ),
        seed=stage.head.seed,
        resume=stage.resume,
        soft=soft,
    )
    summary = {"steps": fitted.steps, "chat_template": chat.fingerprint, **_summary(rows, soft)}
    summary |= {"adapter": adapter.facts()} if adapter else {}
    if ranks.is_main:
        source = _source(stage)
        data = {"data": f"{source.parent.name}/{source.name}", "rows_sha256": rows.fingerprint}
        provenance = {**stage_card(stage, base), **data, **summary}
        whole = fitted.whole(model, base)
        export_stage(stage.directory, whole, tokenizer, provenance, adapter, base)
    return summary


def _source(stage: Stage[SftSection]) -> Path:
    return stage.trail.demonstrations_before("sft")


def _read_rows(stage: Stage[SftSection], chat: ChatTemplate, *, is_main: bool) -> TrainingRows:
    """Encoded; what is left out is named in the log and in a file."""
    quarantine = stage.directory if is_main else None
    demonstrations = read_demonstrations(_source(stage), stage.head.data, quarantine=quarantine)
    rows = encode_demonstrations(demonstrations, chat, stage.section.max_length)
    if is_main:
        _report(stage, rows)
    return rows


def _open_soft(
    stage: Stage[SftSection], section: DistillSection, rows: TrainingRows, ranks: Ranks
) -> tuple[Soft, TrainingRows]:
    """The teacher's word, and the rows that are left to train on."""
    require_whole_weights(ranks.launch, "sft")
    soft, rows = open_soft(section, stage.section.trainer, stage.trail, rows, stage.head.seed)
    if ranks.is_main:
        warn_of_unobserved(soft, rows)
    return soft, rows


def _summary(rows: TrainingRows, soft: Soft | None) -> dict[str, object]:
    """What was learned from."""
    summary: dict[str, object] = {
        "rows": len(rows.rows),
        "skipped": len(rows.skipped),
        "tokens": rows.num_tokens,
        "trained_tokens": rows.num_trained,
    }
    if soft is not None:
        summary |= {"teacher": soft.store.identity.teacher, "targets": soft.store.identity.format}
        summary |= {"heldout_rows": len(soft.heldout), "alpha": dict(soft.weighting.shares)}
    return summary


def _check_context(max_length: int, config: dict[str, object]) -> None:
    text_config = config.get("text_config", config)
    limit = text_config.get("max_position_embeddings") if isinstance(text_config, dict) else None
    if isinstance(limit, int) and max_length > limit:
        raise RecipeError(
            f"sft.max_length must be at most the model's {limit} positions, got {max_length}",
            fix=f"set sft.max_length to {limit}",
        )


def _report(stage: Stage[SftSection], rows: TrainingRows) -> None:
    """Name what is left out, in the log and in a file."""
    if rows.skipped:
        first = "; ".join(f"{skip.id} ({skip.reason})" for skip in rows.skipped[:3])
        logger.warning("%d rows are left out: %s", len(rows.skipped), first)
        write_jsonl(stage.directory / "skipped.jsonl", [asdict(skip) for skip in rows.skipped])


if __name__ == "__main__":
    leave(stage_entry("sft", SftSection, train))
