"""What lies in a device's memory, part by part: the learner's, an engine's, a teacher's.

The learner holds weights, gradients and two moments in FP32, 16 bytes a parameter, sharded over all
its devices (FSDP2 or ZeRO-3), and activations of one micro-batch: what enters each layer in BF16,
and one layer's own while it is computed again. With an adapter the weights lie whole on each device
(DDP), and gradients and moments are the adapter's. An engine holds its weights and the keys and
values of all its places at full length, spread over the devices of its replica.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from distill.config import RolloutDistillSection
from ground.errors import RecipeError
from ground.lora import LoraSection
from ground.shape import ModelShape
from rl.adapter_shape import adapter_parameters
from rl.config import RlSection
from rl.hardware import Device, Efficiency
from rollout.config import EngineSection
from rollout.places import Want, require_room

_FULL = 4
"""Bytes of the learner's numbers: it computes in FP32 where it sums."""
_HALF = 2
TEACHER_LOGITS = 1 << 24
"""Elements of a teacher's largest tensor of logits, as distill/teacher.py has it."""
_GIB = 2**30
_VERSIONS = 3
_WORKING_SET = 34
"""Bytes per token and hidden number of a layer under computation (Korthikanti and others, arXiv
2205.05198, equation 1, without attention's square, which fused kernels do not store)."""
_TILES = 3
_TILE_NUMBERS = {"cpu": 1 << 20}
_TILE_NUMBERS_ELSEWHERE = 1 << 26
"""Of a tile of logits in ground/logprobs.py, however large the vocabulary; three are held."""


@dataclass(frozen=True, slots=True)
class Footprint:
    """Bytes by part, as `Consumer` counts them.

    Example:
        Footprint(shared={"weights": 32e9, …}, replica={}, device={"activations": 2e9})
    """

    shared: Mapping[str, float]
    """Spread over all devices of the consumer."""
    replica: Mapping[str, float]
    """Spread over the devices of each replica."""
    device: Mapping[str, float]
    """On each device."""

    def on_each(self, devices: int, width: int) -> dict[str, float]:
        """Part → bytes on one device."""
        parts = {name: size / max(devices, 1) for name, size in self.shared.items()}
        parts |= {name: size / width for name, size in self.replica.items()}
        return parts | dict(self.device)


def learner_footprint(
    shape: ModelShape, device: Device, section: RlSection, width: int
) -> Footprint:
    """Weights, gradients, moments, perhaps a reference; activations, gathered layers, logits.

    Args:
        width: devices over which the experts of a gathered layer are spread.
    """
    size = float(shape.parameters * _FULL)
    tokens = section.micro_batch_tokens
    activations = tokens * shape.hidden * (_HALF * shape.layers + _WORKING_SET)
    experts = shape.experts * shape.one_expert / width
    layer = (shape.dense - shape.embedding + experts) / shape.layers * _HALF
    tile = _TILE_NUMBERS.get(device.name, _TILE_NUMBERS_ELSEWHERE) * _FULL
    own = {
        "activations": float(activations),
        "two gathered layers": 2 * layer,
        "logits chunk": float(_TILES * tile),
    }
    if section.lora:
        trained = float(adapter_parameters(shape, section.lora) * _FULL)
        held = {"weights": size, "adapter": trained, "gradients": trained}
        del own["two gathered layers"]
        return Footprint({}, {}, held | {"moments (AdamW)": 2 * trained} | own)
    shared = {"weights": size, "gradients": size, "moments (AdamW)": 2 * size}
    if section.loss.reference_kl:
        shared["reference"] = size
    return Footprint(shared, {}, own)


def teacher_footprint(
    shape: ModelShape, device: Device, section: RolloutDistillSection
) -> Footprint:
    """A teacher is whole on each of its devices, in FP32: weights, what one layer of a pass makes,
    and the logits of a part of it (distill/teacher.py)."""
    parts = {
        "weights": float(shape.parameters * _FULL),
        "activations": float(section.pass_tokens * shape.hidden * _WORKING_SET),
        "logits chunk": float(_TILES * TEACHER_LOGITS * _FULL),
    }
    return Footprint({}, {}, parts)


def engine_footprint(shape: ModelShape, device: Device, engine: EngineSection) -> Footprint:
    """Weights, and keys and values of every place at its full length."""
    each = device.number_bytes
    cache = engine.num_slots * engine.max_length * shape.cache_bytes(each)
    return Footprint({}, {"weights": float(shape.parameters * each), "KV cache": float(cache)}, {})


def engine_width(shape: ModelShape, device: Device, section: RlSection, counted: Efficiency) -> int:
    """Devices of a replica: those that the recipe names, or the fewest that hold it.

    A power of two. Within a machine it must divide the heads (tensor parallelism); beyond, whole
    machines take layers in turn. Where even the widest does not hold it, the plan says what does
    not fit.

    Raises:
        RecipeError: the recipe names a number that is none, or that the heads cannot be cut into.
    """
    if (named := section.engine.tensor_parallel) > 1:
        require_width(named, shape, "rl.engine.tensor_parallel")
        return named
    footprint, width = engine_footprint(shape, device, section.engine), 1
    while sum(footprint.on_each(1, width).values()) > device.memory * counted.memory:
        within = 2 * width <= device.per_machine
        if shape.heads % (2 * width) if within else 2 * width > shape.layers * device.per_machine:
            break
        width *= 2
    return width


def require_width(width: int, shape: ModelShape, key: str) -> None:
    """Refuse a width that a model cannot be cut to.

    Args:
        key: the recipe's, for the error.

    Raises:
        RecipeError: it is no power of two, or the heads cannot be dealt out to so many.
    """
    if width & (width - 1) or shape.heads % width:
        raise RecipeError(
            f"{key} must be a power of two that divides the {shape.heads} heads, got {width}",
            where="placement",
        )


def learner_width(
    shape: ModelShape, device: Device, section: RlSection, counted: Efficiency
) -> int:
    """Devices over which a layer's experts are spread: the fewest that leave half of each free."""
    room, width = device.memory * counted.memory / 2, 1
    while width < device.per_machine and shape.experts % (2 * width) == 0 and shape.experts:
        footprint = learner_footprint(shape, device, section, width)
        if sum(footprint.device.values()) <= room:
            break
        width *= 2
    return width


def host_bytes(shape: ModelShape, lora: LoraSection | None = None) -> float:
    """Of the memory of the learner's machine: the keeper holds two versions while a third is
    filled, each a copy of what the learner trains, in FP32 as that is. It holds an adapter's base
    once, which the workers of the machine read in place."""
    if lora:
        each = adapter_parameters(shape, lora)
        return float((shape.parameters + _VERSIONS * each) * _FULL)
    return float(_VERSIONS * shape.parameters * _FULL)


def require_machine(shape: ModelShape, device: Device, lora: LoraSection | None = None) -> None:
    """Refuse weights that are handed over through memory which no machine has.

    Raises:
        PlacementError: with want and have.
    """
    each = shape.parameters * _FULL / _GIB
    because = "the base" if lora else f"{_VERSIONS} versions x {each:,.1f}"
    require_room(
        [Want("weight keeper", round(host_bytes(shape, lora) / _GIB), because)],
        round(device.memory_of_machine / _GIB),
        f"GiB of a machine with {device.name}",
        where="placement",
        fix="a smaller model, or machines with more memory",
    )
