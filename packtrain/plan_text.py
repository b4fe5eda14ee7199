"""A plan in words: step, placement and why, memory by part, seconds, and what it rests on."""

from __future__ import annotations

import math
from collections.abc import Iterator

from ground.lora import LoraSection
from ground.shape import ModelShape
from rl.config import RlSection
from rl.footprint import host_bytes
from rl.forecast import LEARNER, ROLLOUT, Forecast, Judges, useful_engines
from rl.hardware import Device, Efficiency
from rl.roofline import Workload

_GIB = 2**30
_NAMED = {"": 1.0, "k": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}


def model_lines(name: str, shape: ModelShape, source: str) -> Iterator[str]:
    """Which model, how large, known from where."""
    experts = ""
    if shape.experts:
        chosen = f"{shape.experts_per_token} of {shape.experts} experts"
        experts = f", {short(shape.active)} of them on a token's way ({chosen})"
    yield f"{name}: {short(shape.parameters)} parameters{experts}, {shape.layers} layers"
    yield f"  shape from {source}"


def step_lines(section: RlSection, load: Workload) -> Iterator[str]:
    """The arithmetic of a step."""
    groups, size, staleness = section.groups_per_step, section.group_size, section.max_staleness
    samples = groups * size
    capacity = (staleness + 1) * groups
    yield ""
    yield "a step"
    yield (
        f"  {groups:,} groups x {size} rollouts = {samples:,} answers, of "
        f"{load.prompt_tokens:,.0f} + {load.new_tokens:,.0f} tokens on average: "
        f"{short(samples * load.tokens)} tokens"
    )
    yield (
        f"  {load.flat_share:.0%} of the groups flat, a slot refilled {load.refills} x at most: "
        f"{load.sampled_per_slot:.2f} groups sampled for a slot, "
        f"{load.trained_per_slot:.2f} of them trained"
    )
    yield (
        f"  max_staleness {staleness}: "
        + (
            f"learner and fleet in turns, {capacity:,} slots"
            if staleness == 0
            else f"up to ({staleness} + 1) x {groups:,} = {capacity:,} groups open at once"
        )
    )


def batch_lines(section: RlSection, plan: Forecast, load: Workload) -> Iterator[str]:
    """What each learner device and each engine gets of a step."""
    ranks, engines = plan.placement.devices[LEARNER], plan.replicas(ROLLOUT)
    tokens = plan.samples * load.trained_per_slot * load.tokens
    passes = math.ceil(tokens / ranks / section.micro_batch_tokens)
    yield (
        f"  {ranks} learner ranks: {short(tokens / ranks)} tokens each, in {passes:,} "
        f"micro-batches of {section.micro_batch_tokens:,}"
    )
    places = engines * section.engine.num_slots
    yield (
        f"  {engines} engines x {section.engine.num_slots} places = {places:,} answers at once, "
        f"{plan.samples / places:.1f} rounds of them a step"
    )


def placement_lines(
    section: RlSection, device: Device, count: int, plan: Forecast
) -> Iterator[str]:
    """Who gets which devices, and why so many."""
    placed = plan.placement
    yield ""
    yield f"placement on {count:,} x {device.name}"
    for each in plan.consumers:
        width = f" = {plan.replicas(each.name)} x {each.width}" if each.width > 1 else ""
        yield (
            f"  {each.name:8} {placed.devices[each.name]:>6,} devices{width}: "
            f"{each.seconds:.3g} device-seconds a sample, idle {placed.idle_share(each.name):.0%}"
        )
    if placed.left_over:
        yield f"  left over {placed.left_over:,}: {_why_left(section, plan)}"
    costs = {each.name: each.seconds for each in plan.consumers}
    if placed.overlaps:
        ideal = costs[LEARNER] / (costs[LEARNER] + costs[ROLLOUT])
        yield f"  side by side the learner's best share is c_t / (c_t + c_g) = {ideal:.1%}"
    else:
        roots = math.sqrt(costs[LEARNER]) + math.sqrt(costs[ROLLOUT])
        ideal = math.sqrt(costs[LEARNER]) / roots
        yield f"  in turns the learner's best share is √c_t / (√c_t + √c_g) = {ideal:.1%}"
    if section.fleet.num_workers != plan.replicas(ROLLOUT):
        yield (
            f"  the recipe has rl.fleet.num_workers={section.fleet.num_workers}; "
            f"for this plan: rl.fleet.num_workers={plan.replicas(ROLLOUT)}"
        )
    yield from _engine_keys(section, device, plan)


def _engine_keys(section: RlSection, device: Device, plan: Forecast) -> Iterator[str]:
    """What the recipe must say for its engines to be as wide as planned."""
    width = next(each.width for each in plan.consumers if each.name == ROLLOUT)
    if width == section.engine.tensor_parallel:
        return
    if width > device.per_machine:
        yield f"  not built yet: an engine of {width} devices, which is more than a machine has"
    else:
        yield (
            f"  an engine of {width} devices: rl.engine.kind=vllm rl.engine.tensor_parallel={width}"
        )


def memory_lines(
    shape: ModelShape, device: Device, plan: Forecast, lora: LoraSection | None = None
) -> Iterator[str]:
    """What lies in a device of each kind."""
    room = device.memory * Efficiency().memory
    yield ""
    yield f"memory of one device, GiB of {room / _GIB:.1f} that may be filled"
    for name in (each.name for each in plan.consumers):
        parts = plan.memory(name)
        told = ", ".join(f"{part} {_gib(size)}" for part, size in parts.items())
        yield f"  {name:8} {_gib(sum(parts.values())):>6}: {told}"
    yield (
        f"  keeper   {_gib(host_bytes(shape, lora)):>6} of {_gib(device.memory_of_machine)} of its "
        f"machine: {'the base, and ' * bool(lora)}two versions and the one that is filled, FP32"
    )


def time_lines(section: RlSection, plan: Forecast) -> Iterator[str]:
    """How long a step takes and what bounds it."""
    yield ""
    step, whole = plan.step_seconds, plan.step_seconds * section.steps
    yield f"a step takes about {seconds(step)}, {section.steps:,} steps {seconds(whole)}"
    yield f"  slowest: {plan.placement.bottleneck}"
    longest = section.sampling.max_new_tokens
    yield f"  an answer of {longest:,} tokens takes {_longest(section, plan)}"
    yield f"  a version reaches the engines in {seconds(plan.handover_seconds)}"
    if section.lora:
        yield "  not counted: each worker adds it to its base and puts the sums into its engine"


def judge_lines(judges: Judges, device: Device) -> Iterator[str]:
    """What is said of judges beside the consumers."""
    settings = judges.settings
    yield ""
    if judges.on(device):
        yield (
            "judges: counted as if every prompt had `reward: judge`, and as if a reference were as "
            "long as an answer"
        )
    else:
        yield (
            f"judges: {settings.replicas} x {settings.cpus_per_replica:g} processors beside these "
            "devices, their time is not counted (judge.kind=vllm puts them there)"
        )


def assumption_lines(
    shape: ModelShape, device: Device, tokens_given: bool, lora: LoraSection | None = None
) -> Iterator[str]:
    """What the figures rest on, and what is planned with but not built."""
    counted = Efficiency()
    yield ""
    yield (
        f"counted on: {counted.train:.0%} of peak FLOP/s in training, {counted.prefill:.0%} in "
        f"prompts, {counted.decode:.0%} of the bandwidth in sampling (rl/hardware.py says whence)"
    )
    if not tokens_given:
        yield "assumed: half of max_new_tokens on average (--tokens), 30% flat groups"
    if shape.experts:
        wasted = shape.flops(0, is_routed=False) / shape.flops(0)
        yield (
            f"not built yet: experts where they are routed (transformers computes all of them on "
            f"every token, {wasted:.1f} x the arithmetic)"
        )
    if device.name != "cpu":
        spread = "DDP" if lora else "DDP or ZeRO"
        yield (
            "not built yet: recomputed activations, BF16 in the learner (ranks it has: rl.learner "
            f"on the machines of a Ray cluster, or --accelerate on one; {spread})"
        )


def seconds(value: float) -> str:
    """A duration as a person says it.

    Example:
        93 → "1.6 min";  0.25 → "0.25 s"
    """
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if value >= 1.5 * length:
            return f"{value / length:.1f} {unit}"
    return f"{value:.3g} s"


def short(value: float) -> str:
    """A large number with its letter.

    Example:
        107_800_000_000 → "107.8B"
    """
    letter = max((name for name, size in _NAMED.items() if value >= size), key=_NAMED.__getitem__)
    return f"{value / _NAMED[letter]:.4g}{letter}"


def _longest(section: RlSection, plan: Forecast) -> str:
    """The longest answer against what the bound on staleness leaves it."""
    longest, step = plan.answer_seconds, plan.step_seconds
    if section.max_staleness == 0:
        return f"{seconds(longest)}: no step is shorter"
    steps = longest / step
    verdict = "within" if steps <= section.max_staleness else "the learner waits for it: beyond"
    return f"{seconds(longest)}, {steps:.1f} steps: {verdict} max_staleness {section.max_staleness}"


def _why_left(section: RlSection, plan: Forecast) -> str:
    if plan.replicas(ROLLOUT) >= useful_engines(section):
        return "more engines would have empty places, so many groups are never open at once"
    return "less than a replica of the slowest"


def _gib(size: float) -> str:
    return f"{size / _GIB:.1f}" if size >= 0.05 * _GIB else f"{size / _GIB:.2g}"
