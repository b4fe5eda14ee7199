"""From a recipe's `engine` section to a running engine."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ground.chat import ChatTemplate
from ground.model import load_model, load_tokenizer, random_model
from rollout.config import EngineSection
from rollout.engine import BLANK, Engine
from rollout.hf_engine import HfEngine
from rollout.installed import require_engine


def open_engine(model_path: Path, section: EngineSection) -> tuple[Engine, ChatTemplate]:
    """Load a model folder into an engine of version 0; the caller closes it.

    Sets the number of torch threads of this process, since bits depend on it.

    Raises:
        SetupError: its library is not installed, or there are not the devices that it asks for.
    """
    return _opened(model_path, load_model, section, version=0)


def open_blank(model_path: Path, section: EngineSection) -> tuple[Engine, ChatTemplate]:
    """The same for a folder that needs no weights: they are handed over before the first token."""
    return _opened(model_path, random_model, section, version=BLANK)


def _opened(
    model_path: Path,
    model_of: Callable[[Path], PreTrainedModel],
    section: EngineSection,
    version: int,
) -> tuple[Engine, ChatTemplate]:
    torch.set_num_threads(section.threads)
    template = ChatTemplate(load_tokenizer(model_path))
    if section.kind == "vllm":
        return _open_vllm(model_path, section, version), template
    engine = HfEngine(
        model_of(model_path),
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
