"""What a recipe would do on given devices: who gets which, what lies where, how long a step takes.

    forecast(shape, section, device, count) ──▶ Forecast(placement, memory by part, seconds)

Estimates from data sheets (rl/hardware.py, rl/roofline.py, rl/footprint.py) go through the same
plan() as measured speeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ground.config import JudgeSettings
from ground.shape import ModelShape
from rl.config import RlSection
from rl.footprint import (
    Footprint,
    engine_footprint,
    engine_width,
    learner_footprint,
    learner_width,
    require_width,
    teacher_footprint,
)
from rl.hardware import Device, Efficiency
from rl.placement import Placement, plan
from rl.roofline import (
    Workload,
    decoding_step,
    handover_seconds,
    judge_seconds,
    learner_seconds,
    rollout_seconds,
    teacher_seconds,
)
from rl.room import Consumer, Devices
from rollout.judge_source import judge_engine

LEARNER, ROLLOUT, TEACHER, JUDGE = "learner", "rollout", "teacher", "judge"


@dataclass(frozen=True, slots=True)
class Judges:
    """The model behind `reward: judge`, and how the recipe asks it.

    Example:
        Judges(read_shape(folder), recipe.judge)
    """

    shape: ModelShape
    settings: JudgeSettings

    def on(self, device: Device) -> bool:
        """Whether they compute on such devices: transformers judges on processors alone."""
        return device.name == "cpu" or self.settings.kind == "vllm"


@dataclass(frozen=True, slots=True)
class Forecast:
    """A recipe on devices.

    Example:
        forecast(shape, section, DEVICES["h100"], 64).step_seconds → 41.3
    """

    placement: Placement
    consumers: tuple[Consumer, ...]
    footprints: Mapping[str, Footprint]
    samples: int
    """Rollouts that a step consumes, G·B."""
    answer_seconds: float
    """Of a completion of the greatest length allowed."""
    handover_seconds: float

    @property
    def step_seconds(self) -> float:
        """Between two versions; in turns the hand-over and the longest answer count as well."""
        work = self.placement.seconds * self.samples
        if self.placement.overlaps:
            return work
        rollout = self.placement.paces[ROLLOUT] * self.samples
        return work - rollout + max(rollout, self.answer_seconds) + self.handover_seconds

    @property
    def num_beside(self) -> int:
        """Devices of whoever is neither learner nor engine."""
        devices = self.placement.devices
        return sum(devices[name] for name in devices if name not in (LEARNER, ROLLOUT))

    def replicas(self, name: str) -> int:
        """Replicas of a consumer."""
        width = next(each.width for each in self.consumers if each.name == name)
        return self.placement.devices[name] // width

    def memory(self, name: str) -> dict[str, float]:
        """Part → bytes on one of a consumer's devices."""
        width = next(each.width for each in self.consumers if each.name == name)
        return self.footprints[name].on_each(self.placement.devices[name], width)


def forecast(
    shape: ModelShape,
    section: RlSection,
    device: Device,
    count: int,
    *,
    load: Workload,
    counted: Efficiency | None = None,
    teacher: ModelShape | None = None,
    judges: Judges | None = None,
) -> Forecast:
    """Place a recipe on so many devices and estimate its step.

    Args:
        teacher: where the recipe has `distill`; its replicas are as many as that says.
        judges: where the recipe has `judge`; the same.

    Raises:
        PlacementError: it does not fit; with want and have.
    """
    counted = counted or Efficiency()
    consumers, footprints = wanted(shape, section, device, load, counted, teacher, judges)
    room = Devices.of(
        count, per_machine=device.per_machine, bytes_each=device.memory * counted.memory
    )
    placement = plan(room, consumers, overlaps=section.max_staleness > 0)
    slots, width = section.engine.num_slots, consumers[1].width
    step = decoding_step(shape, device, slots, load.tokens, width, counted)
    return Forecast(
        placement,
        consumers,
        footprints,
        section.groups_per_step * section.group_size,
        section.sampling.max_new_tokens * step,
        handover_seconds(shape, device, placement.devices[LEARNER], width, counted, section.lora),
    )


def wanted(
    shape: ModelShape,
    section: RlSection,
    device: Device,
    load: Workload,
    counted: Efficiency,
    teacher: ModelShape | None = None,
    judges: Judges | None = None,
) -> tuple[tuple[Consumer, ...], dict[str, Footprint]]:
    """Learner, rollout, perhaps teacher and judge as plan() takes them; their memory by part."""
    across = learner_width(shape, device, section, counted)
    width = engine_width(shape, device, section, counted)
    training = learner_footprint(shape, device, section, across)
    engine = engine_footprint(shape, device, section.engine)
    learner = Consumer(
        LEARNER,
        learner_seconds(shape, device, load, section, counted),
        width=across,
        shared_bytes=sum(training.shared.values()),
        device_bytes=sum(training.device.values()),
    )
    rollout = Consumer(
        ROLLOUT,
        rollout_seconds(shape, device, load, section, width, counted),
        width=width,
        replica_bytes=sum(engine.replica.values()),
        least=section.fleet.min_workers,
        most=useful_engines(section),
    )
    consumers, footprints = [learner, rollout], {LEARNER: training, ROLLOUT: engine}
    if section.distill is not None and teacher is not None:
        footprints[TEACHER] = teacher_footprint(teacher, device, section.distill)
        speaker = Consumer(
            TEACHER,
            teacher_seconds(teacher, device, load, counted),
            device_bytes=sum(footprints[TEACHER].device.values()),
            least=section.distill.num_teachers,
            most=section.distill.num_teachers,
        )
        consumers.append(speaker)
    if judges is not None and judges.on(device):
        settings = judges.settings
        require_width(settings.tensor_parallel, judges.shape, "judge.tensor_parallel")
        footprints[JUDGE] = engine_footprint(judges.shape, device, judge_engine(settings))
        judge = Consumer(
            JUDGE,
            judge_seconds(judges.shape, device, load, settings, counted),
            width=settings.tensor_parallel,
            replica_bytes=sum(footprints[JUDGE].replica.values()),
            least=settings.replicas,
            most=settings.replicas,
        )
        consumers.append(judge)
    return tuple(consumers), footprints


def useful_engines(section: RlSection) -> int:
    """Engines whose places can all be filled by the groups that may be open at once, (S + 1)·B."""
    answers = (section.max_staleness + 1) * section.groups_per_step * section.group_size
    return max(section.fleet.min_workers, math.ceil(answers / section.engine.num_slots))
