"""Runs on a virtual clock: an engine's rows in step, steps by hand, sync against async."""

from __future__ import annotations

import asyncio
import random
import statistics
from pathlib import Path

import pytest

from ground.records import Message, Prompt, Span
from ground.shape import read_shape
from packtrain.cli import main
from packtrain.simulate import sharing
from rl.buffer import Plan
from rl.config import RlSection
from rl.forecast import forecast
from rl.hardware import DEVICES
from rl.rehearse import Cast, Lengths, rehearse
from rl.roofline import workload_of
from rl.simulate import Durations, make_pool, make_section, run_steps
from rollout.config import SamplingSection
from rollout.simulation import Clock, SimulatedWorker, run_virtual
from rollout.task import GroupResult, GroupTask

RECIPES = Path(__file__).parents[1] / "recipes"


def make_task(size: int) -> GroupTask:
    prompt = Prompt.make((Message("user", "x"),), capability="c", reward="exact", answer="")
    return GroupTask("t", prompt, "", SamplingSection(), tuple(range(size)))


def make_worker(clock: Clock, *tokens: float, slots: int = 2) -> SimulatedWorker:
    return SimulatedWorker(
        clock,
        slots,
        lambda task: tokens[: len(task.seeds)],
        lambda task: [1.0] * len(task.seeds),
        step_seconds=float,  # a step over so many rows takes so many seconds
        reward_seconds=0.5,
    )


def test_rows_decode_in_step_and_wait_for_places() -> None:
    """2, 4 and 2 tokens in two places: two rows all the time, so each step takes 2 s."""
    clock = Clock()
    worker = make_worker(clock, 2, 4, 2)

    async def play() -> GroupResult:
        await worker.load(0, "weights")
        return await worker.rollout(make_task(3), 0)

    result = run_virtual(play(), clock)
    assert (result.sampled, clock.now) == (8.0, 9.5)  # 4 steps; then 3 verifiers
    assert worker.used() == (8.0, 16.0)
    assert result.num_tokens == 8


def test_a_lone_row_is_faster_than_two() -> None:
    clock = Clock()
    worker = make_worker(clock, 1, 4)

    async def play() -> GroupResult:
        await worker.load(0, "weights")
        return await worker.rollout(make_task(2), 0)

    assert run_virtual(play(), clock).sampled == 2 * 1 + 1 * 3


def test_a_rollout_has_a_token_of_each_version_that_sampled_it() -> None:
    clock = Clock()
    worker = make_worker(clock, 4, 1, slots=1)

    async def play() -> GroupResult:
        await worker.load(0, "weights")
        answer = asyncio.create_task(worker.rollout(make_task(2), 0))
        await asyncio.sleep(2)
        await worker.load(1, "weights")
        await asyncio.sleep(4)
        await worker.load(2, "weights")  # after all is sampled
        return await answer

    first, second = run_virtual(play(), clock).group.rollouts
    assert first.segments[0].versions == (Span(0, 1), Span(1, 1))
    assert second.segments[0].versions == (Span(1, 1),)


def test_a_group_that_is_called_off_gives_up_its_places() -> None:
    clock = Clock()
    worker = make_worker(clock, 100, 100, slots=2)

    async def play() -> float:
        await worker.load(0, "weights")
        lost = asyncio.create_task(worker.rollout(make_task(2), 0))
        waiting = asyncio.create_task(worker.rollout(make_task(1), 0))
        await asyncio.sleep(10)
        lost.cancel()
        return (await waiting).sampled

    assert run_virtual(play(), clock) == 10 + 100  # alone from then on


def make_plain(staleness: int, steps: int = 12) -> RlSection:
    """Two groups of four a step, eight places: a step's answers fill the fleet once."""
    return make_section(
        steps=steps, groups_per_step=2, group_size=4, workers=1, slots=8, staleness=staleness
    )


def test_in_turns_a_step_is_the_sum_and_side_by_side_the_longer() -> None:
    durations = Durations(tokens=lambda seed: 10.0, train_seconds=lambda plan: 4.0)
    turns = run_steps(make_plain(0), make_pool(50), durations).rates(2)
    assert turns.step_seconds == pytest.approx(14.0)
    assert turns.learner_idle_share == pytest.approx(10 / 14)
    assert turns.engines_idle_share == pytest.approx(4 / 14)
    overlapped = run_steps(make_plain(1), make_pool(50), durations)
    rates = overlapped.rates(4, -4)
    assert rates.step_seconds == pytest.approx(10.0) and rates.places_share == pytest.approx(1.0)
    assert max(overlapped.ages) <= 1 and sum(overlapped.ages.values()) == 12 * 8


def test_hand_over_and_verifiers_cost_the_turns_what_they_take() -> None:
    durations = Durations(
        tokens=lambda seed: 10.0,
        train_seconds=lambda plan: 4.0,
        load_seconds=1.0,
        reward_seconds=0.5,
    )
    rates = run_steps(make_plain(0), make_pool(50), durations).rates(2)
    assert rates.step_seconds == pytest.approx(10 + 4 * 0.5 + 4 + 1)


def test_no_trained_token_is_older_than_the_bound_however_skewed_the_answers() -> None:
    durations = Durations(
        tokens=lambda seed: random.Random(seed).lognormvariate(2, 1.5),
        train_seconds=lambda plan: 0.1,
        flat_share=0.3,
    )
    for staleness in (0, 1, 3):
        played = run_steps(make_plain(staleness, steps=20), make_pool(100), durations)
        assert max(played.ages) <= staleness and len(played.marks) == 20


def test_lengths_have_the_mean_that_they_are_told() -> None:
    lengths = Lengths(mean=900, most=2765, skew=1.0)
    drawn = [lengths.of(seed) for seed in range(4000)]
    assert statistics.fmean(drawn) == pytest.approx(900, rel=0.04) and max(drawn) == 2765
    assert Lengths(mean=100, most=1e9, skew=1.0).location == pytest.approx(4.605 - 0.5, abs=1e-3)


def test_a_rehearsal_agrees_with_the_forecast_where_the_engines_are_full() -> None:
    """With room between learner and fleet the split's arithmetic is right within a tenth; with
    less, whoever waits for the last answer of a step loses what the arithmetic does not know."""
    section = RlSection.model_validate(
        {
            "steps": 10,
            "groups_per_step": 32,
            "group_size": 8,
            "max_staleness": 6,
            "sampling": {"max_new_tokens": 1024},
            "engine": {"num_slots": 32, "max_length": 1536},
        }
    )
    shape, h100 = read_shape(RECIPES / "llama8b" / "shape"), DEVICES["h100"]
    load = workload_of(section)
    planned = forecast(shape, section, h100, 8, load=load)
    cast = Cast(
        *(shape, h100, section, load),
        learner_devices=planned.placement.devices["learner"],
        engines=planned.replicas("rollout"),
        width=1,
        skew=0.5,
    )
    rates = rehearse(cast, 30).rates(8, -8)
    assert rates.step_seconds == pytest.approx(planned.step_seconds, rel=0.1)


def test_plan_simulate_tells_turns_and_overlap(capsys: pytest.CaptureFixture[str]) -> None:
    tiny = str(RECIPES / "tiny" / "recipe.yaml")
    assert main(["plan", tiny, "--simulate", "rl.groups_per_step=8", "--gpus", "2"]) == 0
    told = capsys.readouterr().out
    assert "by the real controller and fleet" in told
    table = [line.split() for line in told.splitlines()]
    steps = {
        " ".join(row[:2]): float(row[2]) for row in table if row[1:2] in (["split"], ["shared"])
    }
    [beside] = [float(row[1]) for row in table if row[:1] == ["1"] and row[2:3] == ["s"]]
    told_ratio = float(told.split("asynchronous is ")[1].split()[0])
    assert told_ratio == pytest.approx(min(steps.values()) / beside, rel=0.02)
    assert "2 devices, if they hold both sides at once; 0 s a step for the switch (none is" in told


def test_in_turns_on_shared_devices_both_sides_have_all_of_them() -> None:
    """A learner on 2 of 8 devices takes 4 times as long as on all 8, plus the switch."""
    section = RlSection.model_validate({"steps": 1, "groups_per_step": 4, "group_size": 4})
    shape, h100 = read_shape(RECIPES / "llama8b" / "shape"), DEVICES["h100"]
    cast = Cast(
        *(shape, h100, section, workload_of(section)), learner_devices=2, engines=3, width=2
    )
    shared = sharing(cast, 8, 5.0)
    assert (shared.learner_devices, shared.engines) == (8, 4)
    plan = Plan(0, (), {}, rollouts=0, reward=0.0, pass_rate=0.0)
    assert shared.train_seconds(plan) == 5.0 and cast.train_seconds(plan) == 0.0
