"""Models and tokenizers in and out of a folder: safetensors and JSON, nothing that can run.

A model folder is hostile until checked: its config is read by us first, its type must be one that
transformers itself implements, shard names may not leave the folder, pickles and remote code are
never touched, and a weight that is missing, damaged or not finite is an error that names its file.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    Llama4Config,
    Llama4ForConditionalGeneration,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.logging import disable_progress_bar

from ground.errors import DataError
from ground.llama4 import apply_shims
from ground.logs import redact_tree
from ground.model_files import check_weight_files, read_config

logger = logging.getLogger(__name__)


def load_model(path: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Load a causal language model from a folder, every weight accounted for.

    Raises:
        DataError: naming the file, when anything in the folder is missing, damaged or not allowed.
    """
    config = read_config(path)
    check_weight_files(path)
    apply_shims()
    disable_progress_bar()
    typed_config = _typed_config(path, config)
    try:
        model, loading = cast(
            tuple[PreTrainedModel, dict[str, object]],
            _architecture(typed_config).from_pretrained(
                path,
                config=typed_config,
                dtype=dtype,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            ),
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise DataError(
            "the weights do not fit config.json",
            where=str(path),
            why=str(error).strip().splitlines()[0],
            fix="copy the folder again, or restore the config.json it was saved with",
        ) from error
    _check_loaded(path, model, loading)
    return model


def random_model(path: Path, *, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of a folder that needs no weight files, with random weights: others come later.

    Raises:
        DataError: config.json is missing, damaged or not allowed.
    """
    config = read_config(path)
    apply_shims()
    typed_config = _typed_config(path, config)
    model = _architecture(typed_config)(typed_config)
    cast(nn.Module, model).to(dtype)
    return model


def blank_model(path: Path) -> PreTrainedModel:
    """The model that `load_model` would give, without its weights: tensors have a shape and a type
    only (they are on the device "meta").

    Raises:
        DataError: config.json is missing, damaged or not allowed.
    """
    apply_shims()
    config = _typed_config(path, read_config(path))
    with torch.device("meta"):
        return _architecture(config)(config).float()


def load_tokenizer(path: Path) -> PreTrainedTokenizerFast:
    """Load tokenizer.json and the chat template beside it; no Python of the folder is run."""
    if not (path / "tokenizer.json").is_file():
        raise DataError(
            "tokenizer.json is missing",
            where=str(path),
            fix="save the model's fast tokenizer into the folder: tokenizer.save_pretrained(...)",
        )
    try:
        return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    except Exception as error:  # the Rust parser raises bare Exception
        raise DataError(
            "the tokenizer cannot be read",
            where=str(path / "tokenizer.json"),
            why=str(error).strip().splitlines()[0],
            fix="copy the folder again",
        ) from error


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    directory: Path,
    provenance: Mapping[str, object],
) -> None:
    """Write weights, tokenizer, chat template and model card into an existing directory.

    Call it inside `ground.storage.commit_directory`, which makes the result appear at once.

    Args:
        provenance: what the card tells: stage, base model, recipe fingerprint, data, evaluation,
            licence; values are written as JSON where they are not text.
    """
    if tokenizer.chat_template is None:
        raise DataError("the tokenizer has no chat template to export", where=str(directory))
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(model_card(model, provenance), encoding="utf-8")


def model_card(model: PreTrainedModel, provenance: Mapping[str, object]) -> str:
    """The README.md of an exported model, secrets removed."""
    facts = cast(dict[str, object], redact_tree(dict(provenance)))
    title = f"{facts.get('run', 'packtrain')} · {facts.get('stage', 'model')}"
    rows = "\n".join(f"| {name} | {_cell(value)} |" for name, value in facts.items())
    licence = facts.get("licence") or (
        "This model is derived from its base model; the base model's licence governs its use."
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [packtrain]
---
# {title}

A {model.config.model_type} model of {model.num_parameters():,} parameters, post-trained with
packtrain.

| what | value |
|---|---|
{rows}

## Licence

{licence}
"""


def tensors_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """Detached CPU copies of all weights and buffers; a tied weight appears once.

    Loading them into a model of the same config restores both places of a tied weight.
    """
    return copied(live_tensors(model))


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU."""
    return {name: tensor.to("cpu", copy=True).contiguous() for name, tensor in tensors.items()}


def live_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """All weights and buffers themselves, which change as the model does; a tied one once."""
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach()
    return tensors


def freeze_unreached(model: PreTrainedModel) -> dict[str, str]:
    """Freeze what training on text never reaches: an encoder of images and its projector.

    Wrappers wait for a gradient of whatever is not frozen (DDP), or take one of zeros for it and
    let weight decay shrink it (ZeRO). Call it before there is an optimizer or a wrapper.

    Returns:
        What a checkpoint must agree with, since moments are of what is not frozen; nothing where
        text reaches all.
    """
    backbone, head = cast(nn.Module, model.base_model), model.get_output_embeddings()
    reached = {
        id(each) for part in (backbone, head) if part is not None for each in part.parameters()
    }
    unreached = [name for name, each in model.named_parameters() if id(each) not in reached]
    for name in unreached:
        model.get_parameter(name).requires_grad_(False)
    parts = sorted({name.partition(".")[0] for name in unreached})
    return {"frozen": ", ".join(parts)} if parts else {}


def _typed_config(path: Path, config: dict[str, object]) -> PreTrainedConfig:
    kind = CONFIG_MAPPING[str(config.pop("model_type"))]
    try:
        return kind.from_dict(config)
    except (StrictDataclassError, ValueError, TypeError, KeyError, IndexError) as error:
        raise DataError(
            "config.json cannot be used",
            where=str(path / "config.json"),
            why=" ".join(str(error).split()),
            fix="restore the config.json the weights were saved with",
        ) from error


def _architecture(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """The class that holds every weight of the checkpoint, images' too."""
    if isinstance(config, Llama4Config):
        return Llama4ForConditionalGeneration
    return cast(type[PreTrainedModel], MODEL_FOR_CAUSAL_LM_MAPPING[type(config)])


def _check_loaded(path: Path, model: PreTrainedModel, loading: Mapping[str, object]) -> None:
    """transformers fills what a checkpoint lacks with random numbers: refuse that."""
    for what in ("missing_keys", "mismatched_keys"):
        keys = sorted(str(key) for key in cast(set[object], loading.get(what) or set()))
        if keys:
            raise DataError(
                f"the checkpoint has {what.replace('_', ' ')}: {', '.join(keys[:3])}"
                + (f" and {len(keys) - 3} more" if len(keys) > 3 else ""),
                where=str(path),
                fix="copy the folder again, or restore the config.json it was saved with",
            )
    unexpected = cast(set[str], loading.get("unexpected_keys") or set())
    if unexpected:
        logger.warning("%s: ignoring weights that the model lacks: %s", path, sorted(unexpected))
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor).all():
            raise DataError(
                f"weight {name} holds NaN or infinity",
                where=str(path),
                fix="use an earlier checkpoint",
            )


def _cell(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=str, sort_keys=True)
    return text.replace("|", "\\|").replace("\n", " ").replace("<", "&lt;")
