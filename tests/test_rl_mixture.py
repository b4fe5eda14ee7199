"""Quotas in the loop's books: they hold on what is trained, and a restart deals the same."""

from __future__ import annotations

import json
import random
from collections import Counter

import pytest
from test_rl_books import ALL_WRONG, MIXED, make_group, make_pool

from curation.config import CurriculumSection
from ground.errors import RecipeError
from rl.books import Books
from rl.buffer import Plan
from rl.config import RlSection

QUOTAS = {"chat": 0.2, "code": 0.3, "math": 0.5}
TEACHES = {"chat": 0.9, "code": 0.6, "math": 0.3}
"""Chance that a group of the capability has an advantage."""
POOL = make_pool(300, tuple(QUOTAS))
SECTION = RlSection(
    steps=60, groups_per_step=16, group_size=2, max_staleness=2, max_refills=3, quotas=QUOTAS
)


class Loop:
    """Steps whose groups teach or not by their draw's number alone."""

    def __init__(self, section: RlSection = SECTION) -> None:
        self.books = Books.of(section, POOL, 0, lambda record: None)
        self.books.open()
        self.plans: list[Plan] = []

    def step(self, teaches: dict[str, float]) -> Counter[str]:
        """Returns how many groups of each capability are trained on."""
        step = self.books.version
        waiting = self.books.waiting()
        while waiting:
            draw = waiting.pop()
            self.books.send(draw)
            luck = random.Random(draw.number).random()
            passed = MIXED if luck < teaches[draw.prompt.capability] else ALL_WRONG
            refill = self.books.settle(draw, make_group(draw, passed))
            waiting += [refill] if refill else []
        self.plans.append(self.books.plan(step))
        self.books.publish(step + 1)
        return Counter(group.prompt.capability for group in self.plans[-1].groups)


def test_quotas_hold_on_what_is_trained_after_filtering_and_staleness() -> None:
    """A slot of math teaches with 1 - .7^4 = .76: without what is owed math would have .44."""
    loop, trained = Loop(), Counter[str]()
    for _ in range(55):
        trained += loop.step(TEACHES)
    total = trained.total()
    for name, quota in QUOTAS.items():
        assert trained[name] / total == pytest.approx(quota, abs=0.012), trained
    assert loop.books.mixture and loop.books.mixture.taught == trained
    assert loop.books.mixture.error == max(abs(trained[n] - q * total) for n, q in QUOTAS.items())


def test_every_batch_and_their_sum_are_within_one_group_where_refills_suffice() -> None:
    loop, trained = Loop(), Counter[str]()
    for number in range(1, 56):
        batch = loop.step({"chat": 1.0, "code": 1.0, "math": 1.0})
        trained += batch
        for name, quota in QUOTAS.items():
            assert abs(batch[name] - 16 * quota) < 1, batch
            assert abs(trained[name] - 16 * number * quota) < 1, trained


def test_a_capability_that_teaches_nothing_is_widened_alone_then_lends_its_quota() -> None:
    """Of 16 slots math has 8: dry after 3 * 8 in vain, lent after 48."""
    loop, teaches = Loop(), {"chat": 1.0, "code": 1.0, "math": 0.0}
    wide: list[frozenset[str]] = []
    while not loop.books.mixture or not loop.books.mixture.lent:
        loop.step(teaches)
        wide.append(loop.books.curriculum.wide)
    assert wide[0] == frozenset() and wide[-1] == {"math"}
    for _ in range(SECTION.max_staleness + 1):  # what was open by then
        loop.step(teaches)
    slots = {o.draw.slot: o.draw.prompt.capability for o in loop.plans[-1].outcomes}
    assert Counter(slots.values()) == {"math": 1, "chat": 6, "code": 9}
    for _ in range(SECTION.max_staleness + 1):
        loop.step(teaches | {"math": 1.0})
    assert not loop.books.mixture.lent and not loop.books.curriculum.wide


@pytest.mark.parametrize("cut", [0, 3, 7])
def test_a_restart_from_cut_and_journal_deals_the_same(cut: int) -> None:
    loop, state = Loop(), {}
    for step in range(9):
        if step == cut:
            state = json.loads(json.dumps(loop.books.state_dict()))
        loop.step(TEACHES | {"math": 0.05})
    again = Books.of(SECTION, POOL, 0, lambda record: None)
    if cut:
        again.load_state_dict(state, {prompt.id: prompt for prompt in POOL})
    else:
        again.open()
    for plan in loop.plans[cut:]:
        again.replay([outcome.without_group for outcome in plan.outcomes])
    assert again.mixture and loop.books.mixture
    assert again.mixture.state_dict() == loop.books.mixture.state_dict()
    drawn = [[slot.draws for slot in books.buffer.slots()] for books in (loop.books, again)]
    assert drawn[0] == drawn[1]


def test_quotas_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match=r"quotas must sum to 1, got 0\.8"):
        RlSection(steps=1, quotas={"chat": 0.5, "math": 0.3})
    with pytest.raises(ValueError, match="groups_per_step must be at least 4, got 3"):
        RlSection(steps=1, groups_per_step=3, quotas={"chat": 0.5, "code": 0.5})
    with pytest.raises(ValueError, match=r"review_share above 0"):
        RlSection(
            steps=1,
            groups_per_step=8,
            quotas={"chat": 0.5, "code": 0.5},
            curriculum=CurriculumSection(review_share=0),
        )
    section = RlSection(steps=1, groups_per_step=4, quotas={"chat": 0.5, "code": 0.5})
    with pytest.raises(RecipeError, match=r"rl\.quotas.*\['math'\] have none"):
        Books.of(section, POOL, 0, lambda record: None)
