"""Phases of a hand-over to vLLM, by the size of the model.

    python -m benchmarks.vllm_handover [--quick]

A dense Llama of 3 million, 100 million and 1 billion parameters in float32; vLLM on a CPU. Tensors
that lie in memory are handed over in flight, as a worker does it: checked for numbers that are not
finite, laid out in memory that vLLM's process opens (`lay`), generation stands still (`pause`),
vLLM loads and packs them (`load`), generation goes on (`resume`). Sequences run all the time.
A plain copy of the same bytes, on one thread, is what it is compared with.
"""

from __future__ import annotations

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import ROOT, Figure, Report, run_benchmark
from ground.model import live_tensors
from rollout.config import EngineSection
from rollout.engine import Lent, Request
from rollout.vllm_engine import VllmEngine
from rollout.vllm_weights import CheckpointForm, Laid

_TOKENIZER = ROOT / "recipes" / "tiny" / "herd" / "student"
_SHAPES = {"3 M": (256, 4), "100 M": (1024, 8), "1 B": (2048, 20)}
"""Width and layers."""
_QUICK = ("3 M",)
_REPEATS = 5
_RUNNING = 4
_PHASES: tuple[str, ...] = ("check", "lay", "pause", "load", "resume")


def measure(quick: bool) -> Report:
    """Hand models of rising size over; returns the phases' medians."""
    torch.set_num_threads(1)
    rows = {name: _measured(*_SHAPES[name]) for name in (_QUICK if quick else _SHAPES)}
    figures = [
        Figure(f"{name}: {phase}", row[phase], "ms", None, "lower")
        for name, row in rows.items()
        for phase in (*_PHASES, "still", "plain copy")
    ]
    return Report(figures, {"sizes": rows, "repeats": _REPEATS, "running": _RUNNING})


def _measured(width: int, layers: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        model = _model(width, layers)
        model.save_pretrained(path)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(_TOKENIZER / name, path)
        tensors = live_tensors(model)
        section = EngineSection(kind="vllm", num_slots=8, max_length=512)
        with closing(VllmEngine(path, section)) as engine:
            versions = range(1, _REPEATS + 2)
            runs = [_handed_over(engine, path, each, tensors) for each in versions][1:]
    row = {name: statistics.median(run[name] for run in runs) * 1e3 for name in runs[0]}
    row["parameters"] = float(model.num_parameters())
    row["plain copy"] = statistics.median(_copied(tensors) for _ in range(_REPEATS)) * 1e3
    sys.stderr.write("  ".join(f"{name} {value:.4g}" for name, value in row.items()) + "\n")
    return row


def _handed_over(
    engine: VllmEngine, path: Path, version: int, tensors: Mapping[str, Tensor]
) -> dict[str, float]:
    """Seconds of each phase of one hand-over to an engine at work."""
    form = CheckpointForm(path)
    asked = [Request(f"{version}/{n}", (1, 5, 6), 400, 1.0, n, ()) for n in range(_RUNNING)]
    futures = [engine.submit(request) for request in asked]
    while engine.waiting():
        time.sleep(0.01)
    marks = [time.perf_counter()]
    form.check(tensors)
    marks.append(time.perf_counter())
    laid = Laid(form.saved(tensors))
    marks.append(time.perf_counter())
    laid.close()
    engine.pause()
    marks.append(time.perf_counter())
    engine.load(version, Lent(tensors))
    marks.append(time.perf_counter())
    engine.resume()
    marks.append(time.perf_counter())
    engine.abort([request.id for request in asked])
    for future in futures:
        future.result(60)
    seconds = dict(zip(_PHASES, _differences(marks), strict=True))
    seconds["load"] -= seconds["check"] + seconds["lay"]  # which `load` does again
    seconds["still"] = seconds["pause"] + seconds["load"] + seconds["resume"]
    return seconds


def _differences(marks: list[float]) -> list[float]:
    return [after - before for before, after in pairwise(marks)]


def _copied(tensors: Mapping[str, Tensor]) -> float:
    started = time.perf_counter()
    copies = [tensor.clone() for tensor in tensors.values()]
    del copies
    return time.perf_counter() - started


def _model(width: int, layers: int) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=418,
        hidden_size=width,
        intermediate_size=8 * width // 3 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=1024,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


if __name__ == "__main__":
    sys.exit(run_benchmark("vllm_handover", measure, seeds=(0,)))
