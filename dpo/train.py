"""The `dpo` stage: `python -m dpo.train RECIPE` or `accelerate launch … -m dpo.train RECIPE`.

groups of the RL stage → pairs → trained → gate → model/ (or the RL model, with the reason why)
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from dpo.config import DpoSection
from dpo.data import EncodedPair, PairLogprobs, encode_pairs, fingerprint, pair_logprobs
from dpo.gate import gate_figures, objection
from dpo.pairs import Mined, mine_pairs
from dpo.tables import PAIR_SCHEMA, pair_row, read_groups
from dpo.trainer import run_dpo
from ground.adapter import Adapter, base_identity
from ground.chat import ChatTemplate
from ground.checkpoints import Checkpoints
from ground.entry import Stage, stage_entry
from ground.launch import launch_of
from ground.leaving import leave
from ground.model import freeze_unreached, load_model, load_tokenizer
from ground.ranks import Ranks, join_ranks
from ground.stage_export import export_stage, stage_card
from ground.tables import write_rows
from ground.training import Fit

logger = logging.getLogger(__name__)


def train(stage: Stage[DpoSection]) -> dict[str, object]:
    """Prefer RL's best answers to its worst; leaves `pairs.parquet` and `model/`."""
    if stage.section.lora:
        stage.section.lora.require_launch(launch_of(os.environ), "dpo")
    ranks, base = join_ranks("dpo"), stage.trail.model_before("dpo")
    tokenizer = load_tokenizer(base)
    chat = ChatTemplate(tokenizer)
    files, version = stage.trail.groups()
    mined = mine_pairs(read_groups(files), version, stage.section.pairs)
    if ranks.is_main:
        rows = [pair_row(pair) for pair in mined.pairs]
        write_rows(stage.directory / "pairs.parquet", rows, PAIR_SCHEMA)
    pairs, num_skipped = encode_pairs(
        [pair.pair for pair in mined.pairs], chat, stage.section.max_length
    )

    model, lora = load_model(base), stage.section.lora
    adapter = Adapter(model, lora, seed=stage.head.seed, stage="dpo") if lora else None
    facts: dict[str, object] = {}
    kept_because = _too_few(len(pairs), mined, stage.section)
    if not kept_because:
        model, kept_because, facts = _prefer(stage, model, adapter, tokenizer, chat, pairs, ranks)
    if kept_because:
        model, adapter = load_model(base), None
        facts.pop("adapter", None)  # what it was goes with it: model/ has none added in
        logger.warning("the RL model goes on unchanged: %s", kept_because)
    summary: dict[str, object] = {
        "pairs": len(pairs),
        "pairs_too_long": num_skipped,
        "mining": mined.counts,
        "trained": not kept_because,
        "kept_because": kept_because,
        **facts,
    }
    if ranks.is_main:
        provenance = {**stage_card(stage, base), "data": "pairs.parquet", **summary}
        export_stage(stage.directory, model, tokenizer, provenance, adapter, base)
    return summary


def _prefer(
    stage: Stage[DpoSection],
    model: PreTrainedModel,
    adapter: Adapter | None,
    tokenizer: PreTrainedTokenizerFast,
    chat: ChatTemplate,
    pairs: Sequence[EncodedPair],
    ranks: Ranks,
) -> tuple[PreTrainedModel, str, dict[str, object]]:
    """Train the model, or its adapter; returns it, the gate's objection, if any, and the figures.

    Rank 0 alone asks the gate: what other ranks return goes no further.
    """
    trainer, lora = stage.section.trainer, stage.section.lora
    base = stage.trail.model_before("dpo")

    def score(scored: PreTrainedModel) -> list[PairLogprobs]:
        return pair_logprobs(
            scored, pairs, pad_id=chat.pad_id, rows_per_pass=2 * trainer.rows_per_pass
        )

    reference = score(model)  # the RL model itself: a new adapter adds nothing, its B is zero
    identity = {"pairs": fingerprint(pairs), "template": chat.fingerprint}
    identity |= {"layout": ranks.launch.layout} | freeze_unreached(model)
    identity |= base_identity(lora, base) if lora else {}
    checkpoints = Checkpoints(stage.directory / "checkpoints", trainer.keep_checkpoints, identity)
    fitted = run_dpo(
        model,
        tokenizer,
        pairs,
        reference,
        trainer,
        Fit(stage.directory, stage.metrics, checkpoints, trainer.max_seconds, ranks, adapter),
        seed=stage.head.seed,
        resume=stage.resume,
    )
    facts: dict[str, object] = {"steps": fitted.steps}
    facts |= {"adapter": adapter.facts()} if adapter else {}
    if not ranks.is_main:
        return model, "", facts
    trained = fitted.whole(model, base)
    figures = gate_figures(reference, score(trained))
    stage.metrics.log(fitted.steps, figures.numbers(), phase="gate")
    facts |= {"gate": figures.numbers()}
    return trained, objection(figures, stage.section.gate), facts


def _too_few(num_pairs: int, mined: Mined, section: DpoSection) -> str:
    """Why there is nothing to learn from; empty when there is."""
    if num_pairs >= section.pairs.min_pairs:
        return ""
    causes = ", ".join(f"{name} {count}" for name, count in mined.counts.items())
    return (
        f"{num_pairs} pairs were found, dpo.pairs.min_pairs asks for {section.pairs.min_pairs} "
        f"({causes or 'the rl stage left no groups'})"
    )


if __name__ == "__main__":
    leave(stage_entry("dpo", DpoSection, train))
