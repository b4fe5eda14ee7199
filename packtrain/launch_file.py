"""What can be said against a launch file before any stage is started with it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import yaml

from ground.errors import RecipeError, SetupError

_KNOWN = ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP", "DEEPSPEED")


def check_launch_file(path: Path) -> None:
    """Refuse a file that no stage could be started with.

    Raises:
        RecipeError: it is absent, no launch file, or asks for what packtrain does not run.
        SetupError: it asks for DeepSpeed, which is not installed.
    """
    if not path.is_file():
        raise RecipeError(f"--accelerate names {path}, which is not a file")
    kind = _distributed_type(path)
    if kind not in _KNOWN:
        raise RecipeError(
            f"distributed_type must be one of {', '.join(_KNOWN)}, got {kind!r}",
            where=str(path),
            fix="start from a file of recipes/accelerate: cpu, ddp, fsdp2, zero2 or zero3",
        )
    if kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise SetupError(
            "the launch file asks for DeepSpeed, which is not installed",
            where=str(path),
            fix="pip install 'packtrain[deepspeed]', or use recipes/accelerate/ddp.yaml",
        )


def _distributed_type(path: Path) -> object:
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(
            "a launch file must be YAML, as `accelerate config` writes it",
            where=str(path),
            why=" ".join(str(error).split()),
        ) from error
    if not isinstance(settings, dict):
        return settings
    kind = settings.get("distributed_type", "NO")
    return "NO" if kind is False else kind  # YAML reads a bare NO as false
