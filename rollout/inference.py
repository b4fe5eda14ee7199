"""What a stage samples and scores with: an engine in its own process, or several in others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ground.chat import ChatTemplate
from ground.model import load_tokenizer
from rollout.config import EnginesSection
from rollout.engine import Inference
from rollout.engines import open_engine
from rollout.processes import reserved


@contextmanager
def inference(
    model_path: Path, section: EnginesSection, record: Path, where: str
) -> Iterator[tuple[Inference, ChatTemplate]]:
    """Engine or `replicas` of it for as long as the body runs, and the model's chat template.

    Args:
        record: a file of the run, see `rollout.processes.reserved`.
        where: the section of the recipe, for errors.
    """
    if section.replicas:
        torch.set_num_threads(section.engine.threads)
        template = ChatTemplate(load_tokenizer(model_path))
        with reserved(record) as ours:
            from rollout.replicas import replicas_of  # Ray reads its settings when it is imported

            with replicas_of(model_path, section, ours, where) as engines:
                yield engines, template
        return
    engine, template = open_engine(model_path, section.engine)
    try:
        yield engine, template
    finally:
        engine.close()
