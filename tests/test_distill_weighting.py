"""Shares of the soft target: each rule by hand, and what `aligned` learns."""

from __future__ import annotations

import json
import math
from typing import cast

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from distill.config import AlignedShare, ScheduleShare, StaticShare, WeightingSection
from distill.signal import Gains
from distill.weighting import HeldoutWeighting, parts_of, weighting_of

ENTROPY = torch.tensor([[math.log(4), 0.0], [math.log(16), math.log(2)]])
SUPPORTED = torch.tensor([[True, True], [False, True]])
SECTION = TypeAdapter(WeightingSection)


def rule(value: object, num_steps: int = 100) -> HeldoutWeighting:
    section = cast(WeightingSection, SECTION.validate_python(value))
    return weighting_of(section, num_steps=num_steps, vocab_size=16)


def weights(weighting: HeldoutWeighting, step: int = 0) -> torch.Tensor:
    return weighting.weights(step, ["math", "chat"], ENTROPY, SUPPORTED)


def test_a_name_alone_is_a_section_and_no_name_is_aligned() -> None:
    assert SECTION.validate_python("static") == StaticShare(kind="static")
    assert SECTION.validate_python({"rate": 0.2}) == AlignedShare(rate=0.2)
    with pytest.raises(ValidationError, match="expected tags"):
        SECTION.validate_python("dynamic")


def test_static_gives_its_share_where_the_label_is_supported() -> None:
    assert weights(rule({"kind": "static", "share": 0.25})).tolist() == [[0.25, 0.25], [0, 0.25]]


@pytest.mark.parametrize(
    ("step", "share"),
    [(0, 0.0), (5, 0.45), (10, 0.9), (70, 0.9), (85, 0.45), (100, 0.0), (120, 0.0)],
)
def test_the_schedule_rises_stays_and_falls(step: int, share: float) -> None:
    expected = torch.tensor([[share, share], [0.0, share]])
    torch.testing.assert_close(weights(rule("schedule"), step), expected)


def test_a_schedule_without_ramps_is_static() -> None:
    flat = {"kind": "schedule", "peak": 0.5, "warmup": 0, "decay": 0}
    assert weights(rule(flat), 0)[0, 0] == weights(rule(flat), 99)[0, 0] == 0.5


def test_ramps_longer_than_the_run_are_refused() -> None:
    with pytest.raises(ValidationError, match="leave the run its length"):
        ScheduleShare(kind="schedule", warmup=0.6, decay=0.5)


def test_entropy_gives_the_teacher_the_tokens_on_which_it_is_unsure() -> None:
    # log 4 / log 16 = 1/2, log 2 / log 16 = 1/4
    expected = torch.tensor([[0.45, 0.0], [0.0, 0.225]])
    torch.testing.assert_close(weights(rule("entropy")), expected)


def one_share(**settings: object) -> HeldoutWeighting:
    return rule({"knots": [0.0], "trust": 0.0, "rate": 0.1, "labels_from": 0.0} | settings)


def observe(
    weighting: HeldoutWeighting,
    capability: str,
    *soft: float,
    hard: float = 0.0,
    step: int = 0,
    entropy: float = 0.0,
) -> None:
    soft_N = torch.tensor(soft)
    gains = Gains(soft_N, torch.full_like(soft_N, hard))
    weighting.observe(step, capability, gains, torch.full_like(soft_N, entropy))


def test_aligned_moves_the_share_of_the_capability_that_was_observed() -> None:
    aligned = one_share()
    observe(aligned, "math", -3.0, -3.0)
    torch.testing.assert_close(weights(aligned), torch.tensor([[0.6, 0.6], [0.0, 0.7]]))
    assert aligned.shares == pytest.approx({"math": 0.6})
    assert aligned.observe_every == 10 and rule("static").observe_every == 0


def test_a_share_moves_with_the_evidence_and_not_with_the_size_of_the_gains() -> None:
    near, far = one_share(), one_share()
    observe(near, "math", -4.0, -2.0)  # mean -3, variance of the mean 1 / 2: -3 / sqrt 9.5
    observe(far, "math", -4e6, -2e6)
    expected = 0.7 - 0.1 * 3 / math.sqrt(9.5)
    assert near.shares["math"] == pytest.approx(expected)
    assert far.shares["math"] == pytest.approx(expected)


def test_evidence_fades_and_contradictions_cancel() -> None:
    aligned = one_share(memory=0.5)
    observe(aligned, "math", -3.0, -3.0)  # sums -1.5 of squares 4.5, mass 1/2: -1
    observe(aligned, "math", 3.0, 3.0)  # sums 0.75 of squares 6.75, mass 3/4: 0.75 / 2.25
    assert aligned.shares["math"] == pytest.approx(0.6 + 0.1 / 3)


@pytest.mark.parametrize(("step", "share"), [(0, 0.8), (50, 0.7), (100, 0.6), (200, 0.6)])
def test_the_labels_get_the_word_as_the_run_goes_on(step: int, share: float) -> None:
    aligned = one_share()
    observe(aligned, "math", 1.0, 1.0, hard=2.0, step=step)  # 1 - step / 100 * 2
    assert aligned.shares["math"] == pytest.approx(share)


def test_labels_count_from_the_first_step_as_far_as_asked_for() -> None:
    aligned = one_share(labels_from=0.5)
    observe(aligned, "math", 1.0, 1.0, hard=2.0)  # 1 - 0.5 * 2
    assert aligned.shares["math"] == pytest.approx(0.7)
    observe(aligned, "math", 1.0, 1.0, hard=2.0, step=100)  # 1 - 2
    assert aligned.shares["math"] < 0.7


def test_trust_is_added_in_the_teacher_s_favour() -> None:
    aligned = one_share(trust=0.25)
    observe(aligned, "math", 0.0, 0.0)
    assert aligned.shares["math"] == pytest.approx(0.725)


def test_entropy_is_dealt_out_to_the_knots_beside_it() -> None:
    entropy = torch.tensor([0.0, 0.25, 1.75, 4.0])
    expected = torch.tensor([[1, 0, 0], [0.75, 0.25, 0], [0, 0.5, 0.5], [0, 0, 1.0]])
    torch.testing.assert_close(parts_of(entropy, (0.0, 1.0, 2.5)), expected)


def test_a_teacher_that_is_wrong_where_it_is_sure_loses_these_tokens_alone() -> None:
    aligned = rule({"trust": 0.0, "rate": 0.1, "knots": [0.0, 1.0, 2.0]})
    soft_N = torch.tensor([-4.0, -4.0, 4.0, 4.0])
    gains = Gains(soft_N, torch.zeros(4))
    aligned.observe(0, "math", gains, torch.tensor([0.0, 0.0, 2.0, 2.0]))
    # knot 0: (-4, -4, 0, 0), mean -2, variance of the mean 4 / 4: -2 / sqrt 5; knot 2 the opposite
    step = 0.1 * 2 / math.sqrt(5)
    entropy, known = torch.tensor([[0.0, 0.5, 1.0, 2.0]]), torch.ones(1, 4, dtype=torch.bool)
    torch.testing.assert_close(
        aligned.weights(0, ["math"], entropy, known),
        torch.tensor([[0.7 - step, 0.7 - step / 2, 0.7, 0.7 + step]]),
    )
    assert aligned.shares["math"] == pytest.approx(0.7)


def test_gains_that_are_not_finite_or_absent_say_nothing() -> None:
    aligned = one_share(trust=0.3)
    observe(aligned, "math", math.nan, -1.0)
    observe(aligned, "math")
    assert aligned.shares == {}


def test_aligned_stays_within_its_bounds() -> None:
    aligned = one_share()
    for _ in range(9):
        observe(aligned, "math", 3.0, 3.0)
        observe(aligned, "chat", -3.0, -3.0)
    assert aligned.shares == {"math": 0.98, "chat": 0.02}


def test_aligned_goes_on_where_its_checkpoint_was_written() -> None:
    aligned, resumed = rule("aligned"), rule("aligned")
    observe(aligned, "math", -4.0, -2.0, entropy=0.5)
    resumed.load_state_dict(json.loads(json.dumps(aligned.state_dict())))
    for weighting in (aligned, resumed):
        observe(weighting, "math", 2.0, 5.0, entropy=0.25, hard=1.0, step=30)
    assert resumed.shares == aligned.shares and aligned.shares["math"] != 0.7
    assert torch.equal(weights(resumed), weights(aligned))


@pytest.mark.parametrize("knots", [[], [1.0, 1.0], [2.0, 1.0]])
def test_knots_that_do_not_rise_are_refused(knots: list[float]) -> None:
    with pytest.raises(ValidationError, match="knots must rise"):
        AlignedShare(knots=tuple(knots))


def test_a_start_outside_the_bounds_is_refused() -> None:
    with pytest.raises(ValidationError, match="low <= start <= high"):
        AlignedShare(start=0.99)
