"""`packtrain plan --simulate`: the forecast played through by the real controller, and in turns.

In turns there are two ways: each side keeps its own devices, which idle while the other works, or
both share all of them, which costs a switch twice a step. What side by side gains is told against
the faster one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from ground.shape import ModelShape
from packtrain.plan_text import seconds
from rl.config import RlSection
from rl.forecast import LEARNER, ROLLOUT, forecast
from rl.hardware import Device
from rl.rehearse import Cast, rehearse
from rl.roofline import Workload
from rl.simulate import Played, Rates

_STEPS = 8
"""Beside the first and the last ones, in which the fleet runs ahead and runs dry."""


def simulation_lines(
    shape: ModelShape,
    section: RlSection,
    device: Device,
    count: int,
    load: Workload,
    *,
    skew: float,
    switch_seconds: float,
) -> Iterator[str]:
    """A table: the recipe as it is, and in turns on the same devices in both ways.

    Args:
        switch_seconds: lost in a step of learner and engines that share their devices.
    """
    yield ""
    yield f"played through, answers lognormal with sigma {skew:g}, by the real controller and fleet"
    yield "  max_staleness   a step  learner idle  engines idle  places in use  age of samples"
    turns = _cast(shape, section.model_copy(update={"max_staleness": 0}), device, count, load, skew)
    shared = sharing(turns, count, switch_seconds)
    found: list[float] = []
    casts = {"0, split": turns, "0, shared": shared}
    if section.max_staleness:
        casts[f"{section.max_staleness}"] = _cast(shape, section, device, count, load, skew)
    for name, cast in casts.items():
        staleness = cast.section.max_staleness
        played = rehearse(cast, 2 * staleness + 3 + _STEPS)
        rates = played.rates(staleness + 1, -staleness - 2)
        found.append(rates.step_seconds)
        yield _line(name, played, rates)
    yield (
        f"  shared: in turns on all {count:,} devices, if they hold both sides at once; "
        f"{seconds(switch_seconds)} a step for the switch ({_SAID[switch_seconds > 0]}); packtrain "
        "itself keeps the two sides apart"
    )
    if section.max_staleness:
        *in_turns, beside = found
        yield (
            f"  asynchronous is {min(in_turns) / beside:.2f} x as fast as the faster way in turns"
        )


_SAID = ("none is stated: --switch", "--switch")


def sharing(cast: Cast, count: int, switch_seconds: float) -> Cast:
    """The same models in turns, each on all devices."""
    engines = count // cast.width
    return replace(cast, learner_devices=count, engines=engines, switch_seconds=switch_seconds)


def _cast(
    shape: ModelShape,
    section: RlSection,
    device: Device,
    count: int,
    load: Workload,
    skew: float,
) -> Cast:
    planned = forecast(shape, section, device, count, load=load)
    return Cast(
        shape,
        device,
        section,
        load,
        learner_devices=planned.placement.devices[LEARNER],
        engines=planned.replicas(ROLLOUT),
        width=planned.placement.devices[ROLLOUT] // planned.replicas(ROLLOUT),
        skew=skew,
        load_seconds=planned.handover_seconds,
    )


def _line(name: str, played: Played, rates: Rates) -> str:
    total = sum(played.ages.values())
    ages = " ".join(f"{age}: {n / total:.0%}" for age, n in sorted(played.ages.items()))
    return (
        f"  {name:>13}  {seconds(rates.step_seconds):>7}  "
        f"{rates.learner_idle_share:>12.0%}  {rates.engines_idle_share:>12.0%}  "
        f"{rates.places_share:>13.0%}  {ages}"
    )
