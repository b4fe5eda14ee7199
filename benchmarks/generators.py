"""Our engine and transformers' `generate` on the same prompts: answers per second of each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.contest import GROUPS, THREADS, Work
from benchmarks.exam import MAX_LENGTH, MAX_NEW_TOKENS
from benchmarks.flat_pools import GROUP, STUDENT
from benchmarks.harness import Figure
from ground.chat import ChatTemplate
from ground.config import Data
from ground.model import load_model, load_tokenizer
from ground.tables import read_prompts
from rollout.config import EngineSection
from rollout.engine import Engine, Request, generate
from rollout.engines import open_engine

_TURNS = 5
_SECONDS = 120.0


def speeds(work: Work) -> list[Figure]:
    """Batches of a step's size, in turns, with two threads for either."""
    chat = ChatTemplate(load_tokenizer(STUDENT))
    prompts = read_prompts(work.folder / work.prompts, Data())[: _TURNS * GROUPS]
    asked = [tuple(chat.encode_prompt(prompt.messages)) for prompt in prompts]
    section = EngineSection(num_slots=64, max_length=MAX_LENGTH, threads=THREADS)
    engine, _ = open_engine(STUDENT, section)
    model = load_model(STUDENT).eval()
    ours, theirs = list[float](), list[float]()
    try:
        for start in range(0, len(asked), GROUPS):
            batch = [ids for ids in asked[start : start + GROUPS] for _ in range(GROUP)]
            ours.append(_seconds(partial(_with_engine, engine, chat, batch)))
            theirs.append(_seconds(partial(_with_generate, model, chat, batch)))
    finally:
        engine.close()
    rates = [GROUPS * GROUP / statistics.median(each) for each in (ours, theirs)]
    return [
        Figure("answers a second, our engine", rates[0], "1/s"),
        Figure("answers a second, generate", rates[1], "1/s"),
        Figure("our engine / generate", rates[0] / rates[1], "x"),
    ]


def _with_engine(engine: Engine, chat: ChatTemplate, batch: Sequence[tuple[int, ...]]) -> None:
    requests = [
        Request(str(n), ids, MAX_NEW_TOKENS, 1.0, n, stop_ids=chat.stop_ids)
        for n, ids in enumerate(batch)
    ]
    generate(engine, requests, timeout_seconds=_SECONDS)


@torch.no_grad()
def _with_generate(
    model: PreTrainedModel, chat: ChatTemplate, batch: Sequence[tuple[int, ...]]
) -> None:
    ids_BT, mask_BT = _padded(batch, chat.pad_id)
    model.generate(  # pyright: ignore[reportCallIssue]
        input_ids=ids_BT,
        attention_mask=mask_BT,
        do_sample=True,
        max_new_tokens=MAX_NEW_TOKENS,
        pad_token_id=chat.pad_id,
        eos_token_id=list(chat.stop_ids),
    )


def _padded(batch: Sequence[tuple[int, ...]], pad_id: int) -> tuple[Tensor, Tensor]:
    """On the left, as TRL does."""
    longest = max(map(len, batch))
    rows = [[pad_id] * (longest - len(ids)) + list(ids) for ids in batch]
    masks = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch]
    return torch.tensor(rows), torch.tensor(masks)


def _seconds(answer: Callable[[], None]) -> float:
    began = time.perf_counter()
    answer()
    return time.perf_counter() - began
