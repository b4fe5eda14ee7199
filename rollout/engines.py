"""From a recipe's `engine` section to a running engine."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from ground.chat import ChatTemplate
from ground.model import load_model, load_tokenizer
from rollout.config import EngineSection
from rollout.engine import Engine
from rollout.hf_engine import HfEngine
from rollout.installed import require_engine


def open_engine(
    model_path: Path, section: EngineSection, *, version: int = 0
) -> tuple[Engine, ChatTemplate]:
    """Load a model folder into an engine; the caller closes it.

    Sets the number of torch threads of this process, since bits depend on it.

    Raises:
        SetupError: its library is not installed, or there are not the devices that it asks for.
    """
    torch.set_num_threads(section.threads)
    template = ChatTemplate(load_tokenizer(model_path))
    if section.kind == "vllm":
        return _open_vllm(model_path, section, version), template
    engine = HfEngine(
        load_model(model_path),
        num_slots=section.num_slots,
        max_length=section.max_length,
        pad_id=template.pad_id,
        version=version,
    )
    return engine, template


def import_engine(kind: str) -> None:
    """Import what an engine of this kind needs; others are none of a recipe's business.

    vLLM tells much; what it must be heard for are errors, unless the environment says otherwise.
    """
    if kind == "vllm":
        require_engine(kind)
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        import rollout.vllm_engine  # noqa: F401


def _open_vllm(model_path: Path, section: EngineSection, version: int) -> Engine:
    """Here and not above: whoever uses another engine needs no vLLM."""
    import_engine(section.kind)
    from rollout.vllm_engine import VllmEngine

    return VllmEngine(model_path, section, version=version)
