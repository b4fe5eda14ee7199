"""The teacher's agreement with rewards: by hand, blind to size and group, falling by steps."""

from __future__ import annotations

import math

import pytest
import torch

from distill.config import AlignedWeight
from rl.agreement import Agreement, Lead


def leads(*pairs: tuple[float, float], group: str = "g", name: str = "sums") -> list[Lead]:
    return [Lead(name, group, advantage, nats) for advantage, nats in pairs]


def agreement(**settings: object) -> Agreement:
    return Agreement(AlignedWeight.model_validate(settings), num_steps=100)


def weight(rule: Agreement, step: int = 0, name: str = "sums") -> float:
    entropy, supported = torch.zeros(1, 2), torch.tensor([[True, False]])
    told = rule.weights(step, [name], entropy, supported)
    assert told.shape == (1, 2) and told[0, 1] == 0.0
    return told[0, 0].item()


def test_a_group_by_hand() -> None:
    """A - mean: 1, 0, -1; lead - mean: 1, -2, 1: products 1, 0, -1 → 0. And 2, -1, -1 → 3 / √12."""
    rule = agreement(peak=1.0)
    rule.see(leads((3, 5), (2, 2), (1, 5)))
    assert rule.by_capability == {"sums": 0.0}
    rule = agreement(peak=1.0)
    rule.see(leads((3, 9), (2, 6), (1, 6)))
    assert rule.by_capability["sums"] == pytest.approx(3 / math.sqrt(2 * 6))
    assert weight(rule) == pytest.approx(3 / math.sqrt(12))


@pytest.mark.parametrize(("sign", "expected"), [(1.0, 1.0), (-1.0, -1.0)])
def test_neither_the_size_of_leads_nor_what_a_group_has_in_common_counts(
    sign: float, expected: float
) -> None:
    rule = agreement(peak=1.0)
    rule.see(
        [
            *leads((1, -700 + sign * 0.001), (-1, -700 - sign * 0.001), group="a"),
            *leads((1, 40 + sign * 0.001), (-1, 40 - sign * 0.001), group="b"),
        ]
    )
    assert rule.by_capability["sums"] == pytest.approx(expected, abs=1e-6)
    assert weight(rule) == pytest.approx(max(expected, 0.0), abs=1e-6), "never against the teacher"


def test_the_weight_falls_to_nothing_by_until() -> None:
    rule = agreement(peak=0.5, until=0.4)
    rule.see(leads((1, 1), (-1, -1)))
    assert [weight(rule, step) for step in (0, 10, 40, 99)] == pytest.approx([0.5, 0.375, 0, 0])


def test_earlier_steps_decay_and_each_capability_has_its_own() -> None:
    rule = agreement(memory=0.75)
    rule.see([*leads((1, 1), (-1, -1)), *leads((1, -1), (-1, 1), name="logic")])
    for _ in range(2):
        rule.see(leads((1, -1), (-1, 1)))
    # 0.75 of +1 and 0.25 of -1, and once more: 0.5, then 0.125; the squares stay 1
    assert rule.by_capability == pytest.approx({"sums": 0.125, "logic": -1.0})
    assert weight(rule, name="unheard") == 0.0
    again = agreement(memory=0.75)
    again.load_state_dict(rule.state_dict())
    assert again.by_capability == rule.by_capability


def test_a_teacher_that_says_the_same_and_numbers_that_are_none_say_nothing() -> None:
    rule = agreement()
    rule.see(leads((1, 0), (-1, 0)))
    assert rule.by_capability == {"sums": 0.0}
    rule.see(leads((math.nan, 1), (1, math.inf)))
    assert rule.by_capability == {"sums": 0.0} and weight(rule) == 0.0
