"""How long learner, rollout and hand-over take, from shape, device and recipe: an estimate.

    Workload (tokens of a sample, who is filtered) ─▶ learner_seconds, rollout_seconds: c_t, c_g

A roofline: arithmetic takes its operations over the peak, memory its bytes over the bandwidth, and
the slower of both counts, at the stated efficiencies. c is in device-seconds per sample, which is
G·B of a step; what refills and filtered groups cost or save is spread over these.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ground.config import JudgeSettings
from ground.lora import LoraSection
from ground.shape import ModelShape
from rl.adapter_shape import adapter_parameters
from rl.config import RlSection
from rl.hardware import Device, Efficiency


@dataclass(frozen=True, slots=True)
class Workload:
    """What a sample is made of; what a recipe cannot know is assumed, or measured.

    Example:
        Workload(prompt_tokens=512, new_tokens=4096, flat_share=0.3, refills=1)
    """

    prompt_tokens: float
    new_tokens: float
    """Mean of a completion."""
    flat_share: float = 0.3
    """Of groups without an advantage. Assumed; the tiny recipe sees 0.2 to 0.7."""
    refills: int = 1

    @property
    def tokens(self) -> float:
        """Of a sample as the learner reads it."""
        return self.prompt_tokens + self.new_tokens

    @property
    def sampled_per_slot(self) -> float:
        """Groups that are sampled until a slot is settled: 1 + f + f² + … + f^R."""
        return sum(self.flat_share**turn for turn in range(self.refills + 1))

    @property
    def trained_per_slot(self) -> float:
        """Groups that a slot gives to the learner: 1 - f^(R + 1)."""
        return 1 - self.flat_share ** (self.refills + 1)


def workload_of(section: RlSection, new_tokens: float | None = None) -> Workload:
    """Half of the allowed length, and what is left for the prompt up to 512: assumed."""
    room = section.engine.max_length - section.sampling.max_new_tokens
    new = section.sampling.max_new_tokens / 2 if new_tokens is None else new_tokens
    return Workload(min(room, 512), new, refills=section.max_refills)


def learner_seconds(
    shape: ModelShape, device: Device, load: Workload, section: RlSection, counted: Efficiency
) -> float:
    """Device-seconds of the learner for a sample: c_t.

    A forward pass and a backward of twice its cost, as model FLOPs utilisation counts: whatever is
    computed again is within the efficiency. An adapter's backward pass lacks the gradients of the
    base's weights, half of it. One more for each model whose log-probs the loss asks.
    """
    passes = (2 if section.lora else 3) + bool(section.loss.reference_kl)
    if section.loss.kind == "decoupled" and section.loss.proximal == "recompute":
        passes += 1
    flops = passes * load.tokens * shape.flops(load.tokens / 2)
    return load.trained_per_slot * flops / (device.flops * counted.train)


def widths(device: Device, width: int) -> tuple[int, int]:
    """Tensor and pipeline width of an engine: each layer over the devices of a machine, and whole
    machines take layers in turn.

    Example:
        32 devices in machines of 8 → (8, 4)
    """
    tensor = min(width, device.per_machine)
    return tensor, width // tensor


def decoding_step(
    shape: ModelShape, device: Device, rows: int, context: float, width: int, counted: Efficiency
) -> float:
    """Seconds in which an engine over `width` devices samples one token of each row.

    With p stages the rows are p micro-batches, so that each stage has one. A token passes all
    stages one after the other: all weights, at the bandwidth of one stage, and each stage reads
    its own again for the next micro-batch.

    Example:
        8B in BF16 on one h100, 64 rows at 1,000 tokens: (15.0e9 + 8.4e9) bytes at 2.01e12 a second,
        and 32 layers at 20 µs: 12.3 ms
    """
    tensor, stages = widths(device, width)
    each = math.ceil(rows / stages)
    read = shape.read_in_a_step(each) * device.number_bytes
    read += each * context * shape.cache_bytes(device.number_bytes)
    seconds = read / (tensor * device.bandwidth * counted.decode)
    arithmetic = each * shape.flops(context) / (tensor * device.flops * counted.prefill)
    return max(seconds, arithmetic) + shape.layers * counted.layer_seconds


def rollout_seconds(
    shape: ModelShape,
    device: Device,
    load: Workload,
    section: RlSection,
    width: int,
    counted: Efficiency,
) -> float:
    """Device-seconds of the fleet for a sample, all places of its engines being in use: c_g."""
    rows = section.engine.num_slots
    context = load.prompt_tokens + load.new_tokens / 2
    step = decoding_step(shape, device, rows, context, width, counted)
    reading = load.prompt_tokens * shape.flops(load.prompt_tokens / 2)
    prefill = reading / (device.flops * counted.prefill)
    return load.sampled_per_slot * (width * load.new_tokens * step / rows + prefill)


def teacher_seconds(
    shape: ModelShape, device: Device, load: Workload, counted: Efficiency
) -> float:
    """Device-seconds of the teachers for a sample: a forward pass over those of groups that teach.

    transformers computes every expert on every token.
    """
    flops = load.tokens * shape.flops(load.tokens / 2, is_routed=False)
    return load.trained_per_slot * flops / (device.flops * counted.prefill)


def judge_seconds(
    shape: ModelShape,
    device: Device,
    load: Workload,
    settings: JudgeSettings,
    counted: Efficiency,
) -> float:
    """Device-seconds of the judges for a sample, nothing being written: a `verdict` reads question,
    answer and a reference as long as the answer, in each order that is asked; a `likelihood` reads
    question and answer twice, once with either conclusion. Of every group that is sampled, as if
    all prompts had `reward: judge`. transformers computes every expert on every token."""
    answer = min(load.new_tokens, settings.max_answer_tokens)
    reads_verdict = settings.read == "verdict"
    rows = 1 + settings.both_orders if reads_verdict else 2
    quoted = 2 * answer if reads_verdict else answer
    tokens = min(load.prompt_tokens + quoted, settings.max_length)
    flops = rows * tokens * shape.flops(tokens / 2, is_routed=settings.kind == "vllm")
    return load.sampled_per_slot * flops / (device.flops * counted.prefill)


def handover_seconds(
    shape: ModelShape,
    device: Device,
    learner_devices: int,
    width: int,
    counted: Efficiency,
    lora: LoraSection | None = None,
) -> float:
    """Until every engine has a version, sent as a pipeline: its bytes over the narrowest network on
    the way, the learner's or an engine's. What a worker then does on its own machine, adding an
    adapter to its base and loading the sums, is not counted."""
    numbers = adapter_parameters(shape, lora) if lora else shape.parameters
    moved = numbers * device.number_bytes
    return moved / (min(learner_devices, width) * device.network * counted.network)
