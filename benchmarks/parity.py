"""The parity gate: does it see every fault, does it ever cry wolf, and what does it cost?

    python -m benchmarks.parity [--quick]

Two tiny models are trained by real RL steps (random rewards: how far a step goes does not depend
on them) and handed over version by version through the keeper's memory to a real hf engine: the
student of the tiny herd (Llama 4, two MoE layers of four experts) and a dense Llama.

- Faults: the ten of benchmarks/parity_faults.py (seven in the dense model, which has no experts),
  put into the engine after a step at the recipe's learning rate, at 1e-5 and at 1e-6. Bytes and
  probes are asked apart: an engine that keeps other layouts (vLLM) has the probes alone.
- False alarms: clean hand-overs, one a step, through the whole gate.
- Cost: probes on the learner's side and gate on the worker's, against a step of the tiny recipe.
"""

from __future__ import annotations

import logging
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import ray
import torch
from accelerate import Accelerator
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import ROOT, Figure, Report, run_benchmark
from benchmarks.parity_faults import damages
from ground.chat import ChatTemplate
from ground.model import live_tensors, load_model, load_tokenizer, tensors_of
from ground.records import Group, Message, Prompt, Rollout
from rl.buffer import Plan
from rl.config import RlSection
from rl.learner import Learner
from rl.prober import Prober
from rollout.cluster import system_config
from rollout.engine import Completion, Request, generate
from rollout.gate import Gate
from rollout.handover import Inbox, Outbox
from rollout.hf_engine import HfEngine
from rollout.hf_weights import swap_weights
from rollout.parity import drift_of, is_within, wrong_tensors
from rollout.weights import Published, WeightKeeper, this_node

_STUDENT = ROOT / "recipes" / "tiny" / "herd" / "student"
_CASES = (
    (torch.float32, 4e-4),
    (torch.float32, 1e-5),
    (torch.float32, 1e-6),
    (torch.bfloat16, 4e-4),
)
"""Learning rates: the tiny recipe's, what larger models are trained with, a tenth of that. In
bfloat16 smaller steps than the recipe's change next to nothing."""
_PROMISED = ("float32 0.0004", "float32 1e-05")
"""Where the probes alone must see everything."""
_MAX_LENGTH = 256
_SETTLING_STEPS = 2
"""AdamW's first step is larger than those that follow."""
_RECIPE_GROUPS, _RECIPE_SIZE = 32, 8


def measure(quick: bool) -> Report:
    """Inject, hand over cleanly, and time."""
    torch.set_num_threads(1)
    logging.getLogger("ray").setLevel(logging.WARNING)
    ray.init(
        num_cpus=1,
        include_dashboard=False,
        object_store_memory=128 << 20,
        _system_config=system_config(),
    )
    with tempfile.TemporaryDirectory() as folder:
        models = {"herd": _STUDENT, "dense": _dense(Path(folder))}
        cases = _CASES[:2] if quick else _CASES
        faults = [
            {"model": name, "case": f"{dtype} {rate:g}".removeprefix("torch."), **row}
            for name, path in models.items()
            for dtype, rate in cases
            for row in _faults(path, dtype, rate)
        ]
        clean = {name: _clean(path, 10 if quick else 100) for name, path in models.items()}
        cost = _cost(models["herd"], 2 if quick else 5)
    ray.shutdown()
    figures = [*_caught(faults), *_alarms(clean), *cost]
    return Report(figures, {"faults": faults, "clean": clean})


def _caught(faults: Sequence[dict[str, object]]) -> Iterator[Figure]:
    for name in ("herd", "dense"):
        rows = [row for row in faults if row["model"] == name]
        kinds = len({row["fault"] for row in rows})
        for case in dict.fromkeys(str(row["case"]) for row in rows):
            at = [row for row in rows if row["case"] == case]
            by_bytes = sum(bool(row["bytes"]) for row in at)
            by_probes = sum(bool(row["probes"]) for row in at)
            either = sum(bool(row["bytes"]) or bool(row["probes"]) for row in at)
            goal = kinds if case in _PROMISED else None
            yield Figure(f"{name} {case}: caught of {kinds}", either, "", kinds)
            yield Figure(f"{name} {case}: by bytes alone", by_bytes, "", kinds)
            yield Figure(f"{name} {case}: by probes alone", by_probes, "", goal)


def _alarms(clean: dict[str, dict[str, float]]) -> Iterator[Figure]:
    for name, row in clean.items():
        yield Figure(f"{name}: false alarms", row["alarms"], "", 0, "lower")
        yield Figure(f"{name}: clean noise / tolerance, worst", row["nearest"], "", 1, "lower", 0.5)


class _World:
    """A learner, an engine, and the way between them."""

    def __init__(self, path: Path, dtype: torch.dtype, learning_rate: float) -> None:
        self.template = ChatTemplate(load_tokenizer(path))
        model = load_model(path, dtype=dtype)
        section = RlSection.model_validate(
            {
                "steps": 1000,
                "ess_floor": 0,
                "optimizer": {"learning_rate": learning_rate, "warmup_steps": 0},
            }
        )
        self.learner = Learner(model, Accelerator(cpu=True), section, self.template.pad_id)
        self.prober = Prober(model, max_length=_MAX_LENGTH, seed=0)
        self.engine = HfEngine(
            load_model(path, dtype=dtype),
            num_slots=64,
            max_length=_MAX_LENGTH,
            pad_id=self.template.pad_id,
            version=-1,
        )
        self.outbox = Outbox(keeper := WeightKeeper(), this_node())
        self.keeper, self.gate = keeper, Gate(self.engine, Inbox(this_node()))
        self.version, self.random = -1, random.Random(0)
        self.groups: tuple[Group, ...] = ()

    def hand_over(self) -> tuple[Published, dict[str, float]]:
        """Publish the learner's weights and load them; returns what was said and the phases."""
        self.version += 1
        weights = live_tensors(self.learner.model)
        parcel = self.outbox.pack(self.version, weights, lambda: self.prober.measure(self.groups))
        self.outbox.send(parcel)
        _, published = self.keeper.current()
        return published, self.gate.load(self.version, published).seconds

    def sample(self, num_groups: int, size: int, max_new_tokens: int = 64) -> float:
        """Have the engine answer; returns the seconds it took."""
        started = time.perf_counter()
        prompts = [self._prompt() for _ in range(num_groups)]
        requests = [
            Request(
                f"{self.version}/{number}/{index}",
                tuple(self.template.encode_prompt(prompt.messages)),
                max_new_tokens,
                1.0,
                self.random.getrandbits(32),
                self.template.stop_ids,
            )
            for number, prompt in enumerate(prompts)
            for index in range(size)
        ]
        answers = generate(self.engine, requests, timeout_seconds=600)
        self.groups = tuple(
            self._group(number, prompt, requests[number * size].prompt_ids, answers, size)
            for number, prompt in enumerate(prompts)
        )
        return time.perf_counter() - started

    def step(self) -> float:
        """Train on the sampled groups; returns the seconds it took."""
        started = time.perf_counter()
        rollouts = sum(len(group.rollouts) for group in self.groups)
        plan = Plan(self.version, self.groups, {}, rollouts, reward=0.5, pass_rate=0.5)
        self.learner.step(plan)
        return time.perf_counter() - started

    def _prompt(self) -> Prompt:
        question = f"{self.random.randrange(1000)} + {self.random.randrange(1000)} = ?"
        messages = (Message("user", question),)
        return Prompt.make(messages, capability="sums", reward="exact", answer="0")

    def _group(
        self,
        number: int,
        prompt: Prompt,
        prompt_ids: tuple[int, ...],
        answers: Sequence[Completion],
        size: int,
    ) -> Group:
        own = answers[number * size : (number + 1) * size]
        rewards = [float(index == 0 or self.random.random() < 0.3) for index in range(size - 1)]
        rollouts = tuple(
            Rollout(index, (each.segment,), text="", reward=reward, passed=reward > 0)
            for index, (each, reward) in enumerate(zip(own, [*rewards, 0.0], strict=True))
        )
        return Group(f"{prompt.id}.{number}", prompt, prompt_ids, rollouts)


@contextmanager
def _world(path: Path, dtype: torch.dtype, learning_rate: float) -> Iterator[_World]:
    world = _World(path, dtype, learning_rate)
    try:
        yield world
    finally:
        world.engine.close()


def _faults(path: Path, dtype: torch.dtype, learning_rate: float) -> Iterator[dict[str, object]]:
    """What bytes and probes see of each fault after a step."""
    with _world(path, dtype, learning_rate) as world:
        world.hand_over()
        before: dict[str, Tensor] = {}
        for _ in range(_SETTLING_STEPS + 1):
            world.sample(4, 4)
            before = tensors_of(world.learner.model)
            world.step()
            published, _ = world.hand_over()
        now = tensors_of(world.learner.model)
        for fault, damage in damages(now).items():
            _inject(world.engine, damage(now, before))
            drift = drift_of(world.engine, published.probes)
            assert drift
            yield {
                "fault": fault,
                "bytes": len(wrong_tensors(world.engine, published.checksums)),
                "probes": not is_within(drift, published.probes),
                "typical": drift.typical,
                "typical_over_tolerance": drift.typical / published.probes.typical,
                "worst_over_tolerance": drift.worst / published.probes.worst,
            }
            _inject(world.engine, now)
            assert is_within(drift_of(world.engine, published.probes) or drift, published.probes)


def _inject(engine: HfEngine, weights: dict[str, Tensor]) -> None:
    """Past all checks, as if the loader had left these; the engine has nothing to do meanwhile."""
    slots = engine._model
    swap_weights(slots._model, weights)
    slots._head_fp32_VH = slots._head.float()


def _clean(path: Path, count: int) -> dict[str, float]:
    """Hand-overs that must pass, one a step; and how near to an alarm they came."""
    alarms, nearest, drifts = 0, 0.0, []
    with _world(path, *_CASES[0]) as world:
        for _ in range(count):
            published, _ = world.hand_over()
            drift = drift_of(world.engine, published.probes)
            assert drift
            alarms += not is_within(drift, published.probes)
            shares = (
                drift.typical / published.probes.typical,
                drift.worst / published.probes.worst,
            )
            nearest = max(nearest, *shares)
            drifts.append(drift.typical)
            world.sample(4, 4, max_new_tokens=16)
            world.step()
    return {
        "handovers": count,
        "alarms": alarms,
        "nearest": nearest,
        "median_drift": statistics.median(drifts),
        "most_drift": max(drifts),
    }


def _cost(path: Path, count: int) -> Iterator[Figure]:
    """Milliseconds, and shares of a step of the tiny recipe (32 groups of 8 answers)."""
    rows = []
    with _world(path, *_CASES[0]) as world:
        world.hand_over()
        for _ in range(count):
            sampling = world.sample(_RECIPE_GROUPS, _RECIPE_SIZE)
            training = world.step()
            _, seconds = world.hand_over()
            gate = seconds["bytes"] + seconds["probes"]
            share = (seconds["probe"] + gate) / (sampling + training)
            rows.append((seconds["probe"], gate, share))
    probe, gate, share = map(statistics.median, zip(*rows, strict=True))
    yield Figure("learner: probes", probe * 1e3, "ms")
    yield Figure("worker: gate", gate * 1e3, "ms")
    yield Figure("both, share of a step's sampling and training", share)


def _dense(folder: Path) -> Path:
    """A dense Llama of the student's size, with norms as unequal as training makes them."""
    config = LlamaConfig(
        vocab_size=418,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.05,
    )
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        model = LlamaForCausalLM(config)
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(_STUDENT / name, folder)
    return folder


if __name__ == "__main__":
    sys.exit(run_benchmark("parity", measure, seeds=(0,)))
