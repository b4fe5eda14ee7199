"""Quotas: exact arithmetic of a batch, of all batches, and of what is owed, dry and lent."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from curation.mixture import Mixture, require_quotas
from ground.errors import DataError, RecipeError

NAMES = "abcdefgh"


def settle(mixture: Mixture, counts: dict[str, int], lost: dict[str, int] | None = None) -> None:
    """All slots of a batch are through, of some capabilities so many in vain."""
    for name, count in counts.items():
        in_vain = (lost or {}).get(name, 0)
        for turn in range(count):
            mixture.settle(name, taught=turn >= in_vain)


def test_places_left_over_go_to_those_who_would_soonest_be_a_slot_behind() -> None:
    """Of 5 slots: 2.5, 1.5 and 1; the half slots change hands."""
    mixture = Mixture({"chat": 0.2, "code": 0.3, "math": 0.5}, batch=5, patience=3)
    dealt = [mixture.turns(5, {"chat", "code", "math"}) for _ in range(3)]
    assert dealt == [
        {"chat": 1, "code": 2, "math": 2},
        {"chat": 1, "code": 1, "math": 3},
        {"chat": 1, "code": 2, "math": 2},
    ]


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=8),
    st.integers(1, 33),
    st.integers(1, 60),
)
def test_a_batch_and_the_sum_of_all_are_within_one_slot(
    weights: list[int], batch: int, batches: int
) -> None:
    quotas = {name: weight / sum(weights) for name, weight in zip(NAMES, weights, strict=False)}
    mixture, dealt = Mixture(quotas, batch=batch, patience=3), Counter[str]()
    for number in range(1, batches + 1):
        counts = mixture.turns(batch, quotas.keys())
        assert sum(counts.values()) == batch
        dealt.update(counts)
        settle(mixture, counts)
        for name, quota in quotas.items():
            assert abs(counts.get(name, 0) - quota * batch) < 1 + 1e-6
            assert abs(dealt[name] - quota * batch * number) < 1 + 1e-6
    assert mixture.error < 1 + 1e-6


def test_what_taught_nothing_is_given_again_one_for_one() -> None:
    mixture = Mixture({"code": 0.5, "math": 0.5}, batch=4, patience=3)
    settle(mixture, mixture.turns(4, {"code", "math"}), lost={"math": 2})
    assert mixture.taught == {"code": 2, "math": 0} and mixture.error == 1
    counts = mixture.turns(4, {"code", "math"})
    assert counts == {"code": 1, "math": 3}
    settle(mixture, counts)
    assert mixture.taught == {"code": 3, "math": 3} and mixture.error == 0


def test_quotas_hold_on_what_is_trained_though_half_of_the_slots_of_one_teach_nothing() -> None:
    """Without what is owed, math would have .25 / .75 = a third."""
    quotas, random_ = {"code": 0.5, "math": 0.5}, random.Random(0)
    mixture = Mixture(quotas, batch=16, patience=3)
    for _ in range(50):
        counts = mixture.turns(16, quotas.keys())
        lost = sum(random_.random() < 0.5 for _ in range(counts["math"]))
        settle(mixture, counts, {"math": lost})
    trained = mixture.taught
    assert trained["math"] / sum(trained.values()) == pytest.approx(0.5, abs=0.01)


def test_a_quota_yields_last_and_comes_back_with_the_first_group_that_teaches() -> None:
    """Of 8 slots half are math's: dry after max(8, 3 * 4) = 12 in vain, lent after 24."""
    mixture, seen = Mixture({"code": 0.5, "math": 0.5}, batch=8, patience=3), []
    for _ in range(6):
        counts = mixture.turns(8, {"code", "math"})
        settle(mixture, counts, lost={"math": 8})
        seen.append((counts["math"], "math" in mixture.dry, "math" in mixture.lent))
    assert seen == [
        (4, False, False),
        (6, False, False),  # 4 owed, 2 of the other 4
        (6, True, False),
        (6, True, False),
        (6, True, True),
        (1, True, True),
    ]
    settle(mixture, {"math": 1})
    assert not mixture.dry and not mixture.lent
    assert mixture.turns(8, {"code", "math"}) == {"code": 4, "math": 4}


@pytest.mark.parametrize(
    ("quotas", "batch"),
    [
        ({"a": 0.25, "b": 0.25, "c": 0.5}, 6),
        ({"a": 0.2, "b": 0.2, "c": 0.2, "d": 0.4}, 8),
        ({"a": 0.2, "b": 0.2, "c": 0.2, "d": 0.2, "e": 0.2}, 10),
        ({"a": 0.9, "b": 0.1}, 4),
    ],
)
def test_the_only_one_that_teaches_is_never_left_out_for_long(
    quotas: dict[str, float], batch: int
) -> None:
    """A run ends for want of groups after six steps without any."""
    alive, mixture, empty = max(quotas), Mixture(quotas, batch=batch, patience=3), 0
    for _ in range(80):
        counts = mixture.turns(batch, quotas.keys())
        empty = 0 if counts.get(alive) else empty + 1
        assert empty < 4
        settle(mixture, counts, {name: 99 for name in quotas if name != alive})
    assert counts[alive] > batch / 2, "the others lent theirs"


def test_what_was_late_or_broken_is_owed_but_shows_no_drought() -> None:
    mixture = Mixture({"code": 0.5, "math": 0.5}, batch=4, patience=3)
    for _ in range(99):
        mixture.settle("math", taught=False, told=False)
    assert not mixture.dry
    assert mixture.turns(4, {"code", "math"}) == {"code": 1, "math": 3}


def test_quotas_of_nobody_who_is_left_are_refused() -> None:
    mixture = Mixture({"code": 0.0, "math": 1.0}, batch=4, patience=3)
    with pytest.raises(DataError, match="none has any"):
        mixture.turns(4, {"code"})


def test_where_all_are_lent_all_go_on_by_quota() -> None:
    mixture = Mixture({"code": 0.25, "math": 0.75}, batch=4, patience=1)
    settle(mixture, {"code": 99, "math": 99}, lost={"code": 99, "math": 99})
    assert mixture.lent == {"code", "math"}
    assert mixture.turns(4, {"code", "math"}) == {"code": 1, "math": 3}


def test_a_capability_without_prompts_leaves_its_quota_to_the_others() -> None:
    mixture = Mixture({"chat": 0.5, "code": 0.25, "math": 0.25}, batch=4, patience=3)
    assert mixture.turns(4, {"code", "math"}) == {"code": 2, "math": 2}
    assert mixture.turns(4, {"math"}) == {"math": 4}


def test_an_account_that_was_saved_deals_the_same() -> None:
    quotas = {"chat": 0.2, "code": 0.3, "math": 0.5}
    mixture = Mixture(quotas, batch=7, patience=2)
    for _ in range(3):
        settle(mixture, mixture.turns(7, quotas.keys()), lost={"math": 2, "chat": 1})
    again = Mixture(quotas, batch=7, patience=2)
    again.load_state_dict(json.loads(json.dumps(mixture.state_dict())))
    assert again.taught == mixture.taught
    for _ in range(5):
        assert again.turns(7, quotas.keys()) == mixture.turns(7, quotas.keys())


def test_quotas_and_prompts_speak_of_the_same_capabilities() -> None:
    require_quotas({"code": 1.0, "math": 0.0, "chat": 0.0}, {"code", "math"})
    with pytest.raises(RecipeError, match=r"\['math'\] have none, and of \['maths'\] there are no"):
        require_quotas({"code": 0.5, "maths": 0.5}, {"code", "math"})
