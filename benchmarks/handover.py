"""Hand-over of weights from a learner to a worker's engine, against a plain copy of the same bytes.

    python -m benchmarks.handover [--quick]

Everything is real: a keeper and a rollout worker as Ray actors in processes of their own, the
worker with the hf engine; the learner is this process. A hand-over begins when the learner begins
to copy its live tensors and ends with the worker's acknowledgement, which it gives after it has
taken a checksum of every tensor that its engine then uses. Probes are left out here: their cost is
that of a forward pass, whatever is handed over (benchmarks/parity.py).

What it is compared with, in the same process, on one thread, by the same clock:
- a plain copy: `tensor.clone()` of each tensor, memory that the process gets for it included;
- a warm copy: `copy_` into memory that was written before, the least that any copy can cost.
"""

from __future__ import annotations

import asyncio
import gc
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.actor import ActorHandle
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import ROOT, Figure, Report, run_benchmark
from ground.model import live_tensors
from rollout.cluster import system_config
from rollout.config import EngineSection, FleetSection
from rollout.handover import Outbox
from rollout.ray_worker import RayWorker
from rollout.task import Loaded, WorkerConfig
from rollout.weights import Published, start_keeper, this_node

_TOKENIZER = ROOT / "recipes" / "tiny" / "herd" / "student"
_SIZES = {"1 MB": 1, "10 MB": 10, "100 MB": 100, "500 MB": 500, "2 GB": 2000}
_QUICK = ("1 MB", "10 MB", "100 MB")
_LARGE_MB = 100
"""The promise holds from here on."""
_REPEATS = 9
_UNCOUNTED = 4
"""The first hand-overs fill pages that the kernel has not given out yet, one buffer each."""
_PHASES = ("reserve", "copy", "fetch", "load", "bytes")


def measure(quick: bool) -> Report:
    """Hand models of rising size over; returns times, ratios and phases."""
    torch.set_num_threads(1)
    names = _QUICK if quick else tuple(_SIZES)
    rows = {name: _measured(_SIZES[name]) for name in names}
    large = {name: row for name, row in rows.items() if _SIZES[name] >= _LARGE_MB}
    plain = max(row["ratio_to_plain_copy"] for row in large.values())
    warm = max(row["ratio_to_warm_copy"] for row in large.values())
    wait = max(row["wait_ratio_to_warm_copy"] for row in large.values())
    figures = [
        Figure("hand-over / plain copy, worst from 100 MB", plain, "x", 2.0, "lower", 0.5),
        Figure("hand-over / warm copy, worst from 100 MB", warm, "x", None, "lower", 1.0),
        Figure("learner waits / warm copy, worst", wait, "x", 2.0, "lower", 0.7),
        *_linearity(large),
    ]
    return Report(figures, {"sizes": rows, "uncounted": _UNCOUNTED, "repeats": _REPEATS})


def _linearity(rows: Mapping[str, Mapping[str, float]]) -> Iterator[Figure]:
    """How much more a megabyte costs in the largest model than in the smallest that counts."""
    costs = [row["median_ms"] / row["megabytes"] for row in rows.values()]
    if len(costs) > 1:
        growth = max(costs) / costs[0]
        yield Figure("cost per MB, worst / at 100 MB", growth, "x", 1.5, "lower")


def _measured(megabytes: int) -> dict[str, float]:
    model = _model(megabytes)
    tensors = live_tensors(model)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    plain, warm = _copies(tensors)
    with _worker(model) as worker:
        runs = asyncio.run(_hand_over(worker, tensors))
    first, counted = runs[0], runs[_UNCOUNTED:]
    totals = [run["total"] for run in counted]
    waits = [run["reserve"] + run["copy"] for run in counted]
    row = {
        "megabytes": num_bytes / 1e6,
        "median_ms": statistics.median(totals) * 1e3,
        "least_ms": min(totals) * 1e3,
        "most_ms": max(totals) * 1e3,
        "first_ms": first["total"] * 1e3,
        "plain_copy_ms": plain * 1e3,
        "warm_copy_ms": warm * 1e3,
        "learner_waits_ms": statistics.median(waits) * 1e3,
        "ratio_to_plain_copy": statistics.median(totals) / plain,
        "ratio_to_warm_copy": statistics.median(totals) / warm,
        "wait_ratio_to_warm_copy": statistics.median(waits) / warm,
    }
    for phase in (*_PHASES, "messages"):
        row[f"{phase}_ms"] = statistics.median(run[phase] for run in counted) * 1e3
    _tell(f"{megabytes:>6} MB: " + "  ".join(f"{name} {value:.3g}" for name, value in row.items()))
    return row


async def _hand_over(worker: RayWorker, tensors: Mapping[str, Tensor]) -> list[dict[str, float]]:
    """Phases of hand-overs one after the other; the weights change in between."""
    keeper = cast(ActorHandle, start_keeper())
    outbox = Outbox(_Keeper(keeper), this_node())
    runs = []
    for version in range(_UNCOUNTED + _REPEATS):
        next(iter(tensors.values())).view(-1)[version] += 1
        started = time.perf_counter()
        outbox.send(outbox.pack(version, tensors))
        current = cast(Awaitable[tuple[int, Published]], keeper.current.remote())
        _, published = await current
        loaded: Loaded = await worker.load(version, published)
        total = time.perf_counter() - started
        assert loaded.version == version
        phases = {phase: loaded.seconds[phase] for phase in _PHASES}
        runs.append({**phases, "total": total, "messages": total - sum(phases.values())})
    ray.kill(keeper)
    return runs


def _copies(tensors: Mapping[str, Tensor]) -> tuple[float, float]:
    """Seconds of a plain copy and of one into memory that was used before: medians."""

    def clone() -> list[Tensor]:
        return [tensor.clone() for tensor in tensors.values()]

    kept = clone()

    def refill() -> None:
        for target, tensor in zip(kept, tensors.values(), strict=True):
            target.copy_(tensor)

    return _median_seconds(clone), _median_seconds(refill)


def _median_seconds(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_REPEATS):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
        del result
    return statistics.median(seconds)


def _model(megabytes: int) -> LlamaForCausalLM:
    """A dense Llama of about that many megabytes in fp32: four layers, as wide as it takes."""
    width = max(round((megabytes * 1e6 / 4 / (4 * 12)) ** 0.5 / 64), 1) * 64
    config = LlamaConfig(
        vocab_size=418,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=4,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        max_position_embeddings=256,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


@contextmanager
def _worker(model: LlamaForCausalLM) -> Iterator[RayWorker]:
    """A worker with this model, in a cluster of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        model.save_pretrained(path)
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copy(_TOKENIZER / name, path)
        ray.init(
            num_cpus=2,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=128 << 20,
            _system_config=system_config(),
        )
        try:
            engine = EngineSection(num_slots=32, max_length=64)
            fleet = FleetSection(cpus_per_worker=0.5)
            worker = RayWorker(WorkerConfig(path, engine, fleet, lease_seconds=3600))
            asyncio.run(_open(worker))
            yield worker
        finally:
            ray.shutdown()
            gc.collect()


async def _open(worker: RayWorker) -> None:
    await worker.prepare()
    await worker.open(0)


class _Keeper:
    """The keeper in its own process, called and waited for."""

    def __init__(self, actor: ActorHandle) -> None:
        self._actor = actor

    def node(self) -> str:
        """See `WeightKeeper.node`."""
        return cast(str, ray.get(self._actor.node.remote()))

    def buffers(self, size: int, at_least: int = 0) -> list[str]:
        """See `WeightKeeper.buffers`."""
        return cast(list[str], ray.get(self._actor.buffers.remote(size, at_least)))

    def publish(self, published: Published) -> None:
        """See `WeightKeeper.publish`."""
        ray.get(self._actor.publish.remote(published))

    def has_room(self, size: int) -> bool:
        """See `WeightKeeper.has_room`."""
        return bool(ray.get(self._actor.has_room.remote(size)))

    def deliver(self, published: Published, content: NDArray[np.uint8]) -> None:
        """See `WeightKeeper.deliver`."""
        ray.get(self._actor.deliver.remote(published, content))


def _tell(line: str) -> None:
    sys.stderr.write(line + "\n")


if __name__ == "__main__":
    sys.exit(run_benchmark("handover", measure, seeds=(0,)))
