"""What a light stage leaves: the model as it came but for its weights, and its adapter, if any."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ground.adapter import Adapter
from ground.entry import S, Stage
from ground.manifest import digest
from ground.model import export_model
from ground.storage import commit_directory


def stage_card(stage: Stage[S], base: Path) -> dict[str, object]:
    """What the model card of every stage tells first: where the model comes from."""
    return {
        "stage": stage.arm or stage.name,
        "run": stage.head.name,
        "base": f"{base.parent.name}/{base.name}",
        "recipe_sha256": digest(stage.run.path / "recipe.resolved.yaml").sha256,
        "seed": stage.head.seed,
    }


def export_stage(
    directory: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    provenance: Mapping[str, object],
    adapter: Adapter | None = None,
    base: Path | None = None,
) -> None:
    """Commit `model/`, and the adapter that was added into it as `adapter/` before that.

    Args:
        base: what the adapter was trained on.
    """
    if adapter is not None and base is not None:
        with commit_directory(directory / "adapter", provenance) as folder:
            adapter.save(folder, base)
    with commit_directory(directory / "model", provenance) as folder:
        export_model(model, tokenizer, folder, provenance)


@contextmanager
def config_kept(model: PreTrainedModel) -> Iterator[None]:
    """Undo what a trainer writes into the model's config, which would be exported with it."""
    text_config = model.config.get_text_config()
    before = dict(text_config.to_dict())
    try:
        yield
    finally:
        for key in ("output_router_logits", "router_aux_loss_coef", "use_cache", "pad_token_id"):
            if key in before:
                setattr(text_config, key, before[key])
