"""Does IFD know which word problems are hard? Against the solve rates of four published models.

    GSM8K's train split → tokenizer and a small Llama from nothing → IFD of each test problem with
    its reference solution → rank correlation with the share of four models that fail on it

The four models are those of the GSM8K release (6B and 175B, fine-tuned and with a verifier), one
recorded solution each. Beside IFD stand what costs nothing, the length of the solution, and what
IFD divides, the loss behind the question. Intervals are Fisher's. Needs the GSM8K copy in
../shared/data/gsm8k. `--quick` trains for a few steps and looks at 200 problems: it shows that the
benchmark runs, and no more.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from scipy import stats
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.gsm8k_verdicts import DATA
from benchmarks.harness import Figure, Report, run_benchmark
from curation.ifd_judge import IfdJudge
from curation.judge import Judgement
from ground.chat import ChatTemplate
from ground.herd.tokenizer import BEGIN, CHAT_TEMPLATE, PAD, SPECIAL_TOKENS, TURN_END
from ground.records import Demonstration, Message
from rollout.config import EngineSection
from rollout.engines import open_engine

SEED = 0
STEPS, QUICK_STEPS, QUICK_PROBLEMS = 240, 8, 200
_BATCH, _RATE, _VOCABULARY, _MAX_LENGTH = 32, 4e-3, 2048, 640


def measure(quick: bool) -> Report:
    """Train, judge, compare."""
    if not DATA.is_dir():
        raise SystemExit(f"needs GSM8K at {DATA}")
    solutions = _lines("example_model_solutions")[: QUICK_PROBLEMS if quick else None]
    references = {each["question"]: each["answer"] for each in _lines("test")}
    rows = [_row(each["question"], references[each["question"]]) for each in solutions]
    failed = [_share_failed(each) for each in solutions]
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "small"
        losses = _train(model, QUICK_STEPS if quick else STEPS)
        judgements = _judge(model, rows)
    measures: dict[str, list[float]] = {
        "ifd": [each.parts.get("ifd", math.nan) for each in judgements],
        "loss behind the question": [each.parts.get("loss", math.nan) for each in judgements],
        "length of the solution": [float(len(row.messages[-1].content)) for row in rows],
    }
    found = {name: _spearman(values, failed) for name, values in measures.items()}
    return Report(
        [
            *(Figure(f"spearman of {name}, with failures", r[0]) for name, r in found.items()),
            Figure("spearman of ifd, low", found["ifd"][1]),
            Figure("spearman of ifd, high", found["ifd"][2]),
            Figure("misaligned", sum(each.is_misaligned for each in judgements) / len(rows)),
            Figure("problems", len(rows)),
            Figure("loss of the last steps", sum(losses[-8:]) / len(losses[-8:]), better="lower"),
        ],
        {"spearman": found, "losses": losses[::10]},
    )


def _train(directory: Path, steps: int) -> list[float]:
    """A small Llama on the train split, every token of it; the losses of its steps."""
    torch.manual_seed(SEED)
    talks = [_row(each["question"], each["answer"]).messages for each in _lines("train")]
    tokenizer = _tokenizer([message.content for talk in talks for message in talk])
    chat = ChatTemplate(tokenizer)
    rows = [chat.encode_demonstration(talk)[0][:_MAX_LENGTH] for talk in talks]
    network = LlamaForCausalLM(_shape(tokenizer))
    optimizer = torch.optim.AdamW(network.parameters(), lr=_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, steps, pct_start=0.1)
    order = torch.randperm(len(rows)).tolist()
    losses: list[float] = []
    for step in range(steps):
        own = [rows[order[(step * _BATCH + n) % len(order)]] for n in range(_BATCH)]
        ids_BT = torch.full((_BATCH, max(map(len, own))), chat.pad_id)
        for place, row in enumerate(own):
            ids_BT[place, : len(row)] = torch.tensor(row)
        mask_BT = torch.tensor([[n < len(row) for n in range(ids_BT.shape[1])] for row in own])
        targets = ids_BT[:, 1:].masked_fill(~mask_BT[:, 1:], -100)
        logits = network(input_ids=ids_BT, attention_mask=mask_BT.long()).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    network.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return losses


def _judge(model: Path, rows: Sequence[Demonstration]) -> list[Judgement]:
    engine, chat = open_engine(model, EngineSection(num_slots=8, max_length=_MAX_LENGTH))
    try:
        return IfdJudge(engine, chat, max_length=_MAX_LENGTH).judge(rows)
    finally:
        engine.close()


def _tokenizer(texts: Sequence[str]) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BEGIN,
        eos_token=TURN_END,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _shape(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    vocabulary = tokenizer.get_vocab()
    return LlamaConfig(
        vocab_size=len(vocabulary),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=_MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=vocabulary[PAD],
        bos_token_id=vocabulary[BEGIN],
        eos_token_id=vocabulary[TURN_END],
    )


def _row(question: str, answer: str) -> Demonstration:
    messages = (Message("user", question), Message("assistant", answer))
    return Demonstration(question, messages, "math")


def _share_failed(solved: dict) -> float:
    verdicts = [value["is_correct"] for value in solved.values() if isinstance(value, dict)]
    return 1 - sum(verdicts) / len(verdicts)


def _spearman(values: Sequence[float], failed: Sequence[float]) -> tuple[float, float, float]:
    """Rank correlation with a 95 % interval; problems without a value are left out."""
    pairs = [(x, y) for x, y in zip(values, failed, strict=True) if not math.isnan(x)]
    rho = float(np.asarray(stats.spearmanr(np.array(pairs)))[0])
    half = 1.96 / math.sqrt(len(pairs) - 3)
    return rho, math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half)


def _lines(name: str) -> list[dict]:
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(run_benchmark("ifd_gsm8k", measure, seeds=(SEED,)))
