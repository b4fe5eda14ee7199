"""What ends a run or holds a step back, decided on numbers alone."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rl_doubles import make_group, make_plan
from test_rl_books import make_books, make_pool

from curation.config import CurriculumSection
from ground.errors import DivergedError
from ground.records import Difficulty, Group, Segment, Span
from rl.books import Books
from rl.buffer import Plan
from rl.config import RlSection
from rl.guards import EssBrake, NoSignalGuard, check_finite
from rl.objective_config import AdvantageSection, BaselineAdvantages, PassAtKAdvantages
from rl.source import Draw


@pytest.mark.parametrize(
    ("loss", "norm"), [(math.nan, 1.0), (1.0, math.nan), (math.inf, 1.0), (1.0, math.inf)]
)
def test_75_a_number_that_is_none_is_refused(loss: float, norm: float) -> None:
    check_finite(-1e30, 1e30, step=3, num_rows=8)
    with pytest.raises(DivergedError, match="loss and gradient must be finite") as caught:
        check_finite(loss, norm, step=3, num_rows=8)
    assert (caught.value.exit_code, caught.value.where) == (5, "rl, step 3")


def test_75_a_norm_that_nobody_has_measured_is_neither_held_against_a_step_nor_told() -> None:
    check_finite(1.0, None, step=3, num_rows=8)
    with pytest.raises(DivergedError, match="got nan\n") as caught:
        check_finite(math.nan, None, step=3, num_rows=8)
    assert "norm" not in caught.value.what


def test_the_brake_is_off_above_the_floor_and_linear_below() -> None:
    brake = EssBrake(0.5, max_steps=9)
    factors = [brake.factor(share, 0) for share in (1.0, 0.5, 0.49, 0.2, 0.0)]
    assert factors == pytest.approx([1.0, 1.0, 0.98, 0.4, 0.0])
    assert EssBrake(0.0, max_steps=1).factor(0.0, 0) == 1.0


def test_only_braked_steps_in_a_row_end_the_run() -> None:
    brake = EssBrake(0.5, max_steps=3)
    for share in (0.1, 0.1, 0.9, 0.1, 0.1):
        brake.factor(share, 0)
    with pytest.raises(DivergedError, match=r"3 times in a row, got 0\.300") as caught:
        brake.factor(0.3, 7)
    assert caught.value.exit_code == 5
    assert "rl.max_staleness" in caught.value.fix


@given(st.lists(st.floats(0, 1), max_size=40), st.integers(1, 5))
def test_a_braked_run_ends_with_the_first_run_of_so_many_steps(
    shares: list[float], max_steps: int
) -> None:
    brake, in_a_row = EssBrake(0.5, max_steps), 0
    for share in shares:
        in_a_row = in_a_row + 1 if share < 0.5 else 0
        if in_a_row == max_steps:
            with pytest.raises(DivergedError):
                brake.factor(share, 0)
            return
        assert brake.factor(share, 0) <= 1.0


def empty(**filtered: int) -> Plan:
    reasons = {name.replace("_", "-"): count for name, count in filtered.items()}
    return replace(make_plan(step=7), filtered=reasons)


def test_77_nothing_to_learn_from_ends_the_run_with_a_histogram() -> None:
    guard = NoSignalGuard(max_empty_steps=2)
    guard.check(empty(all_1=3))
    guard.check(make_plan(make_group(0)))
    guard.check(empty(all_1=3, all_0=1))
    with pytest.raises(DivergedError, match="in 2 steps must teach") as caught:
        guard.check(empty(all_1=2, broken=2))
    assert caught.value.why == "8 groups were filtered: all-1 5, broken 2, all-0 1"
    assert caught.value.fix == "give it harder prompts: every answer was right"
    assert caught.value.exit_code == 5


@pytest.mark.parametrize("reason", ["all-0", "all-1", "flat", "broken", "refused", "late"])
def test_77_every_reason_has_its_advice(reason: str) -> None:
    with pytest.raises(DivergedError) as caught:
        NoSignalGuard(1).check(empty(**{reason.replace("-", "_"): 1}))
    assert len(caught.value.fix) > 20


def test_77_a_step_without_any_draw_is_no_signal_either() -> None:
    with pytest.raises(DivergedError, match="must teach something"):
        NoSignalGuard(1).check(empty())


def answered(draw: Draw, rewards: tuple[float, ...], passed: tuple[bool, ...]) -> Group:
    group = make_group(0)
    segment = Segment("policy", (7, 2), (-0.5, -0.1), (Span(draw.version, 2),))
    rollouts = tuple(
        replace(rollout, segments=(segment,), reward=reward, passed=verdict)
        for rollout, reward, verdict in zip(group.rollouts, rewards, passed, strict=True)
    )
    return replace(group, id=draw.group_id, prompt=draw.prompt, rollouts=rollouts)


def run_until_stopped(
    rewards: tuple[float, ...], passed: tuple[bool, ...], section: AdvantageSection
) -> DivergedError | None:
    """Four steps in which every prompt earns the same; what the guard said."""
    template = make_books([], pool=make_pool(40), max_refills=1)
    books = Books(template.source, template.buffer, lambda record: None, section)
    guard, waiting = NoSignalGuard(max_empty_steps=3), list(books.open())
    for step in range(4):
        while waiting:
            draw = waiting.pop()
            books.send(draw)
            refill = books.settle(draw, answered(draw, rewards, passed))
            waiting += [refill] if refill else []
        try:
            guard.check(books.plan(step))
        except DivergedError as error:
            return error
        waiting += books.publish(step + 1)
    return None


class WronglyMined:
    """What mining called half solved is hopeless; one prompt in eight, which it called hopeless, is
    half solved, or hopeless too. Two steps of four slots widen the curriculum."""

    def __init__(self, *, is_hopeless: bool = False) -> None:
        self.is_hopeless = is_hopeless
        self.pool = [
            replace(prompt, difficulty=Difficulty(successes=4 * (number % 8 > 0), trials=8))
            for number, prompt in enumerate(make_pool(160, ("sums",)))
        ]
        self.section = RlSection(
            steps=40,
            groups_per_step=4,
            max_staleness=2,
            max_refills=0,
            max_empty_steps=2,
            curriculum=CurriculumSection(review_share=0),
        )
        self.books = self.new_books()
        self.books.open()
        self.plans: list[Plan] = []
        self.is_wide = [False]
        """By version."""

    def new_books(self) -> Books:
        return Books.of(self.section, self.pool, 0, lambda record: None)

    def step(self) -> Plan:
        """Everything that waits is answered, and a step is consumed."""
        for draw in self.books.waiting():
            mined = draw.prompt.difficulty
            assert mined
            is_mixed = not mined.successes and not self.is_hopeless
            self.books.send(draw)
            rewards = (float(is_mixed), 0.0, 0.0, 0.0)
            self.books.settle(draw, answered(draw, rewards, (is_mixed, False, False, False)))
        self.plans.append(self.books.plan(len(self.plans)))
        self.books.publish(len(self.plans))
        self.is_wide.append(bool(self.books.curriculum.wide))
        return self.plans[-1]


def test_77_empty_steps_widen_the_curriculum_until_one_teaches() -> None:
    """Versions 0 and 1 have opened steps 0 to 3; step 4 is the first that a wide version opened."""
    world = WronglyMined()
    guard = NoSignalGuard(world.section.max_starved_steps)
    for _ in range(6):
        guard.check(world.step())
    assert [len(plan.groups) > 0 for plan in world.plans] == [False] * 4 + [True] * 2
    assert world.is_wide == [False, False, True, True, True, False, False]


def test_77_a_curriculum_that_was_widened_in_vain_ends_the_run() -> None:
    """Two empty steps, two that were open by then, two that were drawn widely: 6 times 4 slots."""
    world = WronglyMined(is_hopeless=True)
    assert world.section.max_starved_steps == 2 * 2 + 2
    guard = NoSignalGuard(world.section.max_starved_steps)
    for _ in range(5):
        guard.check(world.step())
    assert world.is_wide == [False, False, True, True, True, True]
    with pytest.raises(DivergedError, match="in 6 steps must teach") as caught:
        guard.check(world.step())
    assert caught.value.why == "24 groups were filtered: all-0 24"


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_77_a_restart_widens_at_the_same_version_and_draws_the_same(cut: int) -> None:
    """From a cut at this version, or from the beginning, by the journal to version 4."""
    world = WronglyMined()
    state: dict[str, object] = {}
    for version in range(4):
        if version == cut:
            state = json.loads(json.dumps(world.books.state_dict()))
        world.step()
    again = world.new_books()
    if cut:
        again.load_state_dict(state, {prompt.id: prompt for prompt in world.pool})
    else:
        again.open()
    for plan in world.plans[cut:]:
        again.replay([outcome.without_group for outcome in plan.outcomes])
    assert again.curriculum.wide
    assert again.curriculum.state_dict() == world.books.curriculum.state_dict()
    drawn = [[slot.draws for slot in books.buffer.slots()] for books in (world.books, again)]
    assert drawn[0] == drawn[1]


CENTERED = BaselineAdvantages()
PASS_AT_3 = PassAtKAdvantages(kind="pass_at_k", k=3)


@pytest.mark.parametrize(
    ("rewards", "passed", "section", "reason"),
    [
        ((0.0,) * 4, (False,) * 4, CENTERED, "all-0"),
        ((1.0,) * 4, (True,) * 4, CENTERED, "all-1"),
        ((0.5,) * 4, (True, False, True, False), CENTERED, "flat"),
        ((1.0, 1.0, 0.0, 0.0), (True, True, False, False), PASS_AT_3, "flat"),
    ],
)
def test_77_a_reward_that_never_differs_ends_the_run_and_names_it(
    rewards: tuple[float, ...],
    passed: tuple[bool, ...],
    section: AdvantageSection,
    reason: str,
) -> None:
    error = run_until_stopped(rewards, passed, section)
    # Three steps of two slots, each drawn and drawn again once.
    assert error is not None and error.why == f"12 groups were filtered: {reason} 12"


@pytest.mark.parametrize("section", [CENTERED, BaselineAdvantages(kind="group_std")])
@pytest.mark.parametrize("rewards", [(1.0, 0.0, 0.0, 0.0), (math.nan, 0.0, 0.0, 0.0)])
def test_77_what_differs_or_is_poisoned_is_not_taken_for_a_flat_group(
    section: AdvantageSection, rewards: tuple[float, ...]
) -> None:
    assert run_until_stopped(rewards, (True, False, False, False), section) is None


def test_76_a_group_with_less_than_two_answers_is_broken_not_flat() -> None:
    books = make_books([], max_refills=0)
    for draw, kept in zip(books.open(), (0, 1, 4, 4), strict=True):
        group = answered(draw, (1.0, 0.0, 0.0, 1.0), (True, False, False, True))
        books.send(draw)
        books.settle(draw, replace(group, rollouts=group.rollouts[:kept]))
    plan = books.plan(0)
    assert (plan.groups, plan.filtered) == ((), {"broken": 2})
    assert len(books.plan(1).groups) == 2
    known = {o.observation for slot in books.buffer.take(0) for o in slot.outcomes}
    assert known == {None}
