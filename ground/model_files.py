"""What is checked in a model's folder before any library opens it."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from ground.errors import DataError

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
