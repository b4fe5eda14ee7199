"""From a recipe's `engine` section to a running engine."""

from __future__ import annotations

from pathlib import Path

import torch

from ground.chat import ChatTemplate
from ground.model import load_model, load_tokenizer
from rollout.config import EngineSection
from rollout.engine import Engine
from rollout.hf_engine import HfEngine


def open_engine(
    model_path: Path, section: EngineSection, *, version: int = 0
) -> tuple[Engine, ChatTemplate]:
    """Load a model folder into an engine; the caller closes it.

    Sets the number of torch threads of this process, since bits depend on it.
    """
    torch.set_num_threads(section.threads)
    template = ChatTemplate(load_tokenizer(model_path))
    engine = HfEngine(
        load_model(model_path),
        num_slots=section.num_slots,
        max_length=section.max_length,
        pad_id=template.pad_id,
        version=version,
    )
    return engine, template
