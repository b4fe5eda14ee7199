"""What can be said against a launch file before any stage is started with it.

file → the variables that accelerate makes of it → Launch → what each stage says to that
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from distill.ranks import require_whole_weights
from ground.errors import RecipeError, SetupError
from ground.launch import Launch, launch_of
from packtrain.recipe import Recipe
from rl.train import require_known, require_one_starter

_KNOWN = ("NO", "MULTI_GPU", "MULTI_CPU", "FSDP", "DEEPSPEED")
_DEEPSPEED = {
    "zero_stage": "ACCELERATE_DEEPSPEED_ZERO_STAGE",
    "offload_optimizer_device": "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE",
    "offload_param_device": "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE",
    "deepspeed_config_file": "ACCELERATE_DEEPSPEED_CONFIG_FILE",
}
"""Field → the variable that accelerate makes of it."""


def require_launchable(launch: Launch, recipe: Recipe) -> None:
    """Refuse now what a stage would refuse when its turn comes, hours later.

    Raises:
        SetupError: naming the stage that cannot be started so.
    """
    if recipe.rl:
        require_known(launch)
        require_one_starter(launch, recipe.rl.learner)
    for stage, section in (("sft", recipe.sft), ("rl", recipe.rl), ("dpo", recipe.dpo)):
        if section and section.lora:
            section.lora.require_launch(launch, stage)
    for stage, section in (("sft", recipe.sft), ("rl", recipe.rl)):
        if section and section.distill:
            require_whole_weights(launch, stage)


def check_launch_file(path: Path) -> Launch:
    """What a file makes of the first process that is started with it.

    Raises:
        RecipeError: it is absent, or no launch file.
        SetupError: it asks for DeepSpeed, which is not installed, or for what packtrain does not
            run.
    """
    if not path.is_file():
        raise RecipeError(f"--accelerate names {path}, which is not a file")
    settings = _settings(path)
    kind = settings["distributed_type"]
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
    try:
        return launch_of(dict(_variables(settings)))
    except ValueError as error:
        raise RecipeError(
            "num_processes and zero_stage must be numbers", where=str(path), why=str(error)
        ) from error


def _variables(settings: Mapping[str, object]) -> Iterator[tuple[str, str]]:
    """What accelerate tells the first process."""
    kind = settings["distributed_type"]
    yield "ACCELERATE_MIXED_PRECISION", _word(settings.get("mixed_precision", "no"))
    if kind == "NO":
        return
    yield from (("RANK", "0"), ("WORLD_SIZE", _word(settings.get("num_processes", 1))))
    if kind == "FSDP":
        yield "ACCELERATE_USE_FSDP", "true"
        yield "FSDP_VERSION", _word(_part(settings, "fsdp_config").get("fsdp_version", 1))
    elif kind == "DEEPSPEED":
        yield "ACCELERATE_USE_DEEPSPEED", "true"
        for field, value in _part(settings, "deepspeed_config").items():
            if field in _DEEPSPEED:
                yield _DEEPSPEED[field], _word(value)


def _part(settings: Mapping[str, object], name: str) -> Mapping[str, object]:
    part = settings.get(name)
    return part if isinstance(part, dict) else {}


def _word(value: object) -> str:
    """As written: YAML reads a bare `no` as false, and `none` alone is a word to it."""
    return "no" if value is False else "none" if value is None else str(value)


def _settings(path: Path) -> Mapping[str, object]:
    """The file's fields, `distributed_type` among them."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise RecipeError(
            "a launch file must be YAML, as `accelerate config` writes it",
            where=str(path),
            why=" ".join(str(error).split()),
        ) from error
    if not isinstance(settings, dict):
        return {"distributed_type": settings}
    kind = settings.get("distributed_type", "NO")
    # YAML reads a bare NO as false.
    return settings | {"distributed_type": "NO" if kind is False else kind}
