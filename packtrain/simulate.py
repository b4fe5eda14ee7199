"""`packtrain plan --simulate`: the forecast played through by the real controller, and in turns."""

from __future__ import annotations

from collections.abc import Iterator

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
    shape: ModelShape, section: RlSection, device: Device, count: int, load: Workload, skew: float
) -> Iterator[str]:
    """A table: the recipe as it is, and in turns on the same devices, each with its best split."""
    yield ""
    yield f"played through, answers lognormal with sigma {skew:g}, by the real controller and fleet"
    yield "  max_staleness   a step  learner idle  engines idle  places in use  age of samples"
    turns = section.model_copy(update={"max_staleness": 0})
    sections = [turns] if section.max_staleness == 0 else [turns, section]
    found: list[float] = []
    for each in sections:
        played = _play(shape, each, device, count, load, skew)
        rates = played.rates(each.max_staleness + 1, -each.max_staleness - 2)
        found.append(rates.step_seconds)
        yield _line(each, played, rates)
    if len(found) > 1:
        yield f"  asynchronous is {found[0] / found[1]:.2f} x as fast as in turns"


def _play(
    shape: ModelShape,
    section: RlSection,
    device: Device,
    count: int,
    load: Workload,
    skew: float,
) -> Played:
    planned = forecast(shape, section, device, count, load=load)
    cast = Cast(
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
    return rehearse(cast, 2 * section.max_staleness + 3 + _STEPS)


def _line(section: RlSection, played: Played, rates: Rates) -> str:
    total = sum(played.ages.values())
    ages = " ".join(f"{age}: {n / total:.0%}" for age, n in sorted(played.ages.items()))
    return (
        f"  {section.max_staleness:>13}  {seconds(rates.step_seconds):>7}  "
        f"{rates.learner_idle_share:>12.0%}  {rates.engines_idle_share:>12.0%}  "
        f"{rates.places_share:>13.0%}  {ages}"
    )
