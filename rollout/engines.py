"""From a recipe's `engine` section to a running engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from transformers import PreTrainedModel

from ground.chat import ChatTemplate
from ground.model import blank_model, load_model, load_tokenizer
from rollout.config import EngineSection
from rollout.engine import Engine
from rollout.hf_engine import HfEngine

BLANK = -1
"""Version of an engine that has no weights of a model yet."""


def open_engine(model_path: Path, section: EngineSection) -> tuple[Engine, ChatTemplate]:
    """Load a model folder into an engine of version 0; the caller closes it.

    Sets the number of torch threads of this process, since bits depend on it.
    """
    return _opened(model_path, load_model, section, version=0)


def open_blank(model_path: Path, section: EngineSection) -> tuple[Engine, ChatTemplate]:
    """The same for a folder that needs no weights: they are handed over before the first token."""
    return _opened(model_path, blank_model, section, version=BLANK)


def _opened(
    model_path: Path,
    model_of: Callable[[Path], PreTrainedModel],
    section: EngineSection,
    version: int,
) -> tuple[Engine, ChatTemplate]:
    torch.set_num_threads(section.threads)
    template = ChatTemplate(load_tokenizer(model_path))
    engine = HfEngine(
        model_of(model_path),
        num_slots=section.num_slots,
        max_length=section.max_length,
        pad_id=template.pad_id,
        version=version,
    )
    return engine, template
