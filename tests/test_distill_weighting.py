"""Shares of the soft target: each rule by hand, and what `aligned` learns."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch
from pydantic import TypeAdapter, ValidationError

from distill.config import AlignedShare, ScheduleShare, StaticShare, WeightingSection
from distill.weighting import Weighting, weighting_of

ENTROPY = torch.tensor([[math.log(4), 0.0], [math.log(16), math.log(2)]])
SUPPORTED = torch.tensor([[True, True], [False, True]])
SECTION = TypeAdapter(WeightingSection)


def rule(value: object, num_steps: int = 100) -> Weighting:
    section = cast(WeightingSection, SECTION.validate_python(value))
    return weighting_of(section, num_steps=num_steps, vocab_size=16)


def weights(weighting: Weighting, step: int = 0) -> torch.Tensor:
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


def test_aligned_moves_the_share_of_the_capability_that_was_observed() -> None:
    aligned = rule("aligned")
    aligned.observe("math", 0.5)
    aligned.observe("math", -1.0)
    torch.testing.assert_close(weights(aligned), torch.tensor([[0.65, 0.65], [0.0, 0.7]]))
    assert aligned.shares == pytest.approx({"math": 0.65})
    assert aligned.observe_every == 10 and rule("static").observe_every == 0


def test_aligned_stays_within_its_bounds() -> None:
    aligned = rule("aligned")
    for _ in range(9):
        aligned.observe("math", 1.0)
        aligned.observe("chat", -1.0)
    assert aligned.shares == {"math": 0.98, "chat": 0.02}


def test_aligned_goes_on_where_its_checkpoint_was_written() -> None:
    aligned, resumed = rule("aligned"), rule("aligned")
    aligned.observe("math", -0.5)
    resumed.load_state_dict(aligned.state_dict())
    aligned.observe("math", 0.25)
    resumed.observe("math", 0.25)
    assert resumed.shares == aligned.shares == pytest.approx({"math": 0.675})


def test_a_start_outside_the_bounds_is_refused() -> None:
    with pytest.raises(ValidationError, match="low <= start <= high"):
        AlignedShare(start=0.99)
