"""Models and tokenizers in and out of a folder: safetensors and JSON, nothing that can run.

A model folder is hostile until checked: its config is read by us first, its type must be one that
transformers itself implements, shard names may not leave the folder, pickles and remote code are
never touched, and a weight that is missing, damaged or not finite is an error that names its file.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
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

MODEL_TYPES = frozenset(
    {
        "llama",
        "llama4",
        "llama4_text",
        "mistral",
        "mixtral",
        "qwen2",
        "qwen2_moe",
        "qwen3",
        "qwen3_moe",
        "gemma3_text",
        "olmo2",
        "olmoe",
        "phi3",
        "smollm3",
    }
)
"""Families whose LM head is a plain linear map, as `ground.logprobs` assumes."""

_SHARD_NAME = re.compile(r"^[\w.-]+\.safetensors$")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.pkl", "*.ckpt")
_UNSUPPORTED_KEYS = ("quantization_config", "final_logit_softcapping", "logit_scale")

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
    seen: set[int] = set()
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            tensors[name] = tensor.detach().to("cpu", copy=True).contiguous()
    return tensors


def read_config(path: Path) -> dict[str, object]:
    """config.json as a mapping of an allowed model type, pointers to remote code removed."""
    file = path / "config.json"
    if not file.is_file():
        raise DataError(
            "config.json is missing" if path.is_dir() else "the model folder does not exist",
            where=str(path),
            fix="give the path of a folder in Hugging Face format",
        )
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError("config.json is not JSON", where=str(file), why=str(error)) from error
    if not isinstance(config, dict):
        raise DataError("config.json must hold a mapping", where=str(file))
    if str(config.get("model_type")) not in MODEL_TYPES:
        raise DataError(
            f"model_type must be one of {', '.join(sorted(MODEL_TYPES))}; "
            f"got {config.get('model_type')!r}",
            where=str(file),
            fix="use a model of one of these families",
        )
    for key in _UNSUPPORTED_KEYS:
        if config.get(key) is not None:
            raise DataError(
                f"{key} is not supported, got {config[key]!r}",
                where=str(file),
                why="log-probs are computed from a plain, unquantised LM head",
                fix="use an unquantised checkpoint of a plain family",
            )
    if config.pop("auto_map", None) is not None:
        logger.warning("%s: auto_map points to remote code and is ignored", file)
    return config


def check_weight_files(path: Path) -> list[Path]:
    """The safetensors files of a model folder, each inside it, regular, and with a sound header."""
    if (path / "adapter_config.json").exists():
        raise DataError(
            "the folder holds an adapter, not a whole model",
            where=str(path / "adapter_config.json"),
            fix="merge the adapter into its base model and save that",
        )
    index = path / "model.safetensors.index.json"
    names = _index_shards(index) if index.exists() else ["model.safetensors"]
    if not index.exists() and not (path / names[0]).exists():
        raise _no_weights(path)
    return [_checked_shard(path, name) for name in names]


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


def _index_shards(index: Path) -> list[str]:
    """Shard names that an index lists, each a plain file name."""
    try:
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DataError("the index has no readable weight_map", where=str(index)) from error
    for name in shards:
        if not isinstance(name, str) or not _SHARD_NAME.match(name):
            raise DataError(
                f"a shard must be named like model-00001.safetensors, got {name!r}",
                where=str(index),
                why="a name with a path in it could lead out of the folder",
                fix="save the model again, or do not use this folder",
            )
    return sorted(shards)


def _checked_shard(path: Path, name: str) -> Path:
    """A shard that is a regular file inside the folder and whose header fits its length."""
    file = path / name
    if not file.exists() and not file.is_symlink():
        raise DataError("a shard is missing", where=str(file), fix="copy the folder again")
    if not file.is_file() or file.resolve().parent != path.resolve():
        raise DataError(
            "weights must be regular files inside the model folder",
            where=str(file),
            why="it is a link out of the folder, a pipe or a device",
            fix="copy the real file into the folder",
        )
    try:
        with safe_open(file, framework="pt"):
            return file
    except (SafetensorError, OSError) as error:
        raise DataError(
            "the safetensors file is damaged",
            where=str(file),
            why=str(error),
            fix="copy it again",
        ) from error


def _no_weights(path: Path) -> DataError:
    pickles = sorted(file.name for pattern in _PICKLES for file in path.glob(pattern))
    if not pickles:
        return DataError("model.safetensors is missing", where=str(path))
    return DataError(
        f"weights must be safetensors, got {', '.join(pickles)}",
        where=str(path),
        why="a pickle can run any code when it is loaded, so packtrain never opens one",
        fix="convert it where you trust it: model.save_pretrained(folder), safetensors by default",
    )


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
