"""A forecast played through: durations from data sheets, schedules from the code of real runs.

    rehearse(Cast(shape, device, section, …)) ──▶ rl.simulate.run_steps ──▶ Played

The forecast's arithmetic (rl/forecast.py) takes all devices as busy but for the split; here answers
have lengths, the longest is waited for, refills come late, and hand-overs take their time.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from ground.shape import ModelShape
from rl.buffer import Plan
from rl.config import RlSection
from rl.hardware import Device, Efficiency
from rl.roofline import Workload, decoding_step, learner_seconds
from rl.simulate import Durations, Played, make_pool, patient, run_steps

_POOL = 4000


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of an answer: lognormal, cut off at the greatest length allowed, mean as it is told.

    Example:
        Lengths(mean=9000, most=27_648, skew=1.0).of(seed) → 4,211.0
    """

    mean: float
    """After the cut."""
    most: float
    skew: float = 1.0
    """Sigma of the logarithm: at 1 the longest of 64 takes about ten times the median."""

    def of(self, seed: int) -> float:
        """A length; the same seed has the same one."""
        return min(random.Random(seed).lognormvariate(self.location, self.skew), self.most)

    @property
    def location(self) -> float:
        """Mean of the logarithm for which the cut lengths have the wanted mean; by halving."""
        low, high = math.log(self.mean) - self.skew**2, math.log(self.most) + 8 * self.skew
        for _ in range(60):
            middle = (low + high) / 2
            if _cut_mean(middle, self.skew, self.most) < self.mean:
                low = middle
            else:
                high = middle
        return low


def _cut_mean(location: float, skew: float, most: float) -> float:
    """E[min(X, m)] of a lognormal X with location l and skew s.

    It is e^(l + s²/2) N(z - s) + m (1 - N(z)), where z = (ln m - l) / s and N is the normal law.
    """
    if skew == 0:
        return min(math.exp(location), most)
    z = (math.log(most) - location) / skew
    below = math.exp(location + skew**2 / 2) * _normal(z - skew)
    return below + most * (1 - _normal(z))


def _normal(z: float) -> float:
    return 0.5 * math.erfc(-z / math.sqrt(2))


@dataclass(frozen=True, slots=True)
class Cast:
    """Who plays: a model, devices, and how they are split.

    Example:
        Cast(shape, DEVICES["h100"], section, load, learner_devices=34, engines=27, width=8)
    """

    shape: ModelShape
    device: Device
    section: RlSection
    load: Workload
    learner_devices: int
    engines: int
    width: int
    """Devices of an engine."""
    skew: float = 1.0
    load_seconds: float = 0.0
    reward_seconds: float = 0.02
    """Of the verifiers for an answer: assumed."""
    switch_seconds: float = 0.0
    """Lost with every step where learner and engines share their devices."""
    counted: Efficiency = field(default_factory=Efficiency)

    @property
    def lengths(self) -> Lengths:
        """Of answers."""
        most = float(self.section.sampling.max_new_tokens)
        return Lengths(min(self.load.new_tokens, most * 0.999), most, self.skew)

    def durations(self) -> Durations:
        """How long everything takes."""
        lengths = self.lengths
        location, skew, most = lengths.location, lengths.skew, lengths.most
        return Durations(
            tokens=lambda seed: min(random.Random(seed).lognormvariate(location, skew), most),
            train_seconds=self.train_seconds,
            step_seconds=self._step_seconds(),
            reward_seconds=self.reward_seconds / self.section.fleet.reward_processes,
            load_seconds=self.load_seconds,
            flat_share=self.load.flat_share,
        )

    def train_seconds(self, plan: Plan) -> float:
        """Of a step on the groups that are left of it."""
        cost = learner_seconds(self.shape, self.device, self.load, self.section, self.counted)
        each = cost / self.load.trained_per_slot
        samples = len(plan.groups) * self.section.group_size
        return each * samples / self.learner_devices + self.switch_seconds

    def _step_seconds(self) -> Callable[[int], float]:
        """A row's token costs a step, and its share of the time in which its prompt was read."""
        load, counted = self.load, self.counted
        context = load.prompt_tokens + load.new_tokens / 2
        reading = load.prompt_tokens * self.shape.flops(load.prompt_tokens / 2)
        reading /= self.width * self.device.flops * counted.prefill * load.new_tokens
        table = [
            decoding_step(self.shape, self.device, rows, context, self.width, counted)
            + rows * reading
            for rows in range(self.section.engine.num_slots + 1)
        ]
        return table.__getitem__


def rehearse(cast: Cast, steps: int, seed: int = 0) -> Played:
    """Play so many steps."""
    section = cast.section.model_copy(update={"steps": steps})
    pool = make_pool(_POOL, list(section.quotas)) if section.quotas else make_pool(_POOL)
    return run_steps(patient(section, cast.engines), pool, cast.durations(), seed=seed)
