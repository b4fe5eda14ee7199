"""Seeded draws from mined pass rates."""

from __future__ import annotations

import json
import math
import random
from collections import Counter

import numpy as np
import pytest

from curation.bands import Band, band
from curation.config import CurriculumSection
from curation.curriculum import Curriculum, Observation
from curation.posterior import gradient_chance
from ground.errors import DataError
from ground.records import Difficulty, Group, Message, Prompt, Rollout


def make_prompt(name: str, successes: int, trials: int, capability: str = "sums") -> Prompt:
    return Prompt.make(
        (Message("user", name),),
        capability=capability,
        reward="exact",
        answer="4",
        difficulty=Difficulty(successes=successes, trials=trials),
    )


def make_curriculum(pool: list[Prompt], seed: int = 0, **settings: float | str) -> Curriculum:
    section = CurriculumSection.model_validate(settings)
    return Curriculum(pool, section, seed=seed, group_size=8, steps=10)


def test_gradient_chance_by_hand() -> None:
    chance = gradient_chance(np.array([0.0, 1.0]), np.array([0.0, 2.0]), group_size=2)
    assert chance.tolist() == pytest.approx([1 - 1 / 3 - 1 / 3, 1 - 2 * (2 * 3) / (4 * 5)])


def test_draws_are_pure_without_repeats_and_independent_of_file_order() -> None:
    pool = [make_prompt(str(number), 4, 8) for number in range(12)]
    one, two = make_curriculum(pool), make_curriculum(pool[::-1])
    drawn = [one.draw(0, "sums", n).id for n in range(12)]
    assert drawn == [two.draw(0, "sums", n).id for n in reversed(range(12))][::-1]
    assert len(set(drawn)) == 12
    assert one.draw(0, "sums", 12).id == drawn[0]
    assert drawn != [make_curriculum(pool, seed=1).draw(0, "sums", n).id for n in range(12)]
    one.observe(1, [])
    assert drawn != [one.draw(1, "sums", n).id for n in range(12)]


def test_solved_and_hopeless_prompts_share_the_review_draws() -> None:
    pool = [make_prompt(f"solved {n}", 8, 8) for n in range(200)]
    pool += [make_prompt(f"hopeless {n}", 0, 8) for n in range(200)]
    pool += [make_prompt(f"half {n}", 4, 8) for n in range(400)]
    curriculum = make_curriculum(pool, review_share=0.1)
    assert curriculum.counts() == {"active": 400, "retired": 200, "deferred": 200, "refused": 0}
    kinds: Counter[str] = Counter()
    for version in range(200):
        for n in range(10):
            kinds[curriculum.draw(version, "sums", n).messages[0].content.split()[0]] += 1
        curriculum.observe(version + 1, [])
    assert kinds["half"] / 2000 == pytest.approx(0.9, abs=0.03)
    assert kinds["solved"] > 50 and kinds["hopeless"] > 50


def test_77_a_widened_version_gives_half_of_its_draws_to_what_was_shut_out() -> None:
    pool = [make_prompt("half", 4, 8, "logic"), make_prompt("solved", 8, 8, "sums")]
    curriculum = make_curriculum(pool, review_share=0.1)
    assert curriculum.shares() == pytest.approx({"logic": 0.9, "sums": 0.1})
    curriculum.observe(1, [], wide=("logic", "sums"))
    assert curriculum.shares() == pytest.approx({"logic": 0.5, "sums": 0.5})
    again = make_curriculum(pool, review_share=0.1)
    again.load_state_dict(**json.loads(json.dumps(curriculum.state_dict())))
    assert again.wide == {"logic", "sums"} and again.shares() == curriculum.shares()
    curriculum.observe(2, [])
    assert not curriculum.wide
    assert curriculum.shares() == pytest.approx({"logic": 0.9, "sums": 0.1})
    wider = make_curriculum(pool, review_share=0.7)
    wider.observe(1, [], wide=("logic", "sums"))
    assert wider.shares() == pytest.approx({"logic": 0.3, "sums": 0.7}), "it never narrows"


def test_observations_retire_defer_and_bring_back() -> None:
    prompt = make_prompt("one", 0, 8)
    curriculum = make_curriculum([prompt], decay=0.5)
    assert curriculum.counts()["deferred"] == 1
    curriculum.observe(1, [Observation(prompt.id, 4, 8)])
    assert curriculum.counts()["active"] == 1
    assert curriculum.state_dict()["evidence"] == {prompt.id: [4.0, 12.0]}
    for version in range(2, 6):
        curriculum.observe(version, [Observation(prompt.id, 8, 8)])
    assert curriculum.counts()["retired"] == 1


def test_shares_follow_the_weights() -> None:
    pool = [make_prompt(f"a{n}", 4, 8, "logic") for n in range(3)]
    pool += [make_prompt("b", 4, 8, "sums")]
    assert make_curriculum(pool).shares() == pytest.approx({"logic": 0.75, "sums": 0.25})


def test_a_saved_state_draws_the_same_and_a_foreign_pool_is_refused() -> None:
    pool = [make_prompt(str(number), number % 8, 8) for number in range(12)]
    curriculum = make_curriculum(pool)
    curriculum.observe(1, [Observation(pool[3].id, 8, 8)])
    state = json.loads(json.dumps(curriculum.state_dict()))
    again = make_curriculum(pool)
    again.load_state_dict(**state)
    drawn = [again.draw(1, "sums", n) for n in range(12)]
    assert drawn == [curriculum.draw(1, "sums", n) for n in range(12)]
    with pytest.raises(DataError, match="must know the same prompts, these differ"):
        make_curriculum(pool[:-1]).load_state_dict(**state)


def test_a_refused_prompt_is_never_drawn_again_also_after_a_restart() -> None:
    pool = [make_prompt(str(number), 4, 8) for number in range(4)]
    curriculum = make_curriculum(pool)
    curriculum.observe(1, [Observation(pool[0].id, 4, 8)], refused=[pool[0].id, pool[0].id])
    again = make_curriculum(pool)
    again.load_state_dict(**json.loads(json.dumps(curriculum.state_dict())))
    for each in (curriculum, again):
        assert pool[0] not in [each.draw(1, "sums", n) for n in range(8)]
        assert each.counts() == {"active": 3, "retired": 0, "deferred": 0, "refused": 1}


@pytest.mark.parametrize("seed", range(20))
def test_whatever_has_happened_a_saved_state_draws_the_same(seed: int) -> None:
    """Prompts are observed and refused in turns, which moves the members of their strata about."""
    chance = random.Random(seed)
    pool = [make_prompt(str(n), n % 3, 4, "sums" if n % 2 else "logic") for n in range(40)]
    order = "target" if seed % 2 else "chance"
    curriculum = make_curriculum(pool, seed=seed, order=order)
    for version in range(1, 8):
        seen = [Observation(each.id, chance.randrange(5), 4) for each in chance.choices(pool, k=3)]
        refused = [each.id for each in chance.choices(pool, k=chance.randrange(3))]
        curriculum.observe(version, seen, refused)
        again = make_curriculum(pool, seed=seed, order=order)
        again.load_state_dict(**json.loads(json.dumps(curriculum.state_dict())))
        assert again.gauges() == curriculum.gauges()
        assert again.shares() == curriculum.shares() and again.counts() == curriculum.counts()
        for capability in ("sums", "logic"):
            drawn = [curriculum.draw(version, capability, n) for n in range(25)]
            assert drawn == [again.draw(version, capability, n) for n in range(25)]


def test_the_target_falls_evenly_and_stays_at_its_end() -> None:
    section = CurriculumSection(target_from=0.8, target_to=0.2)
    assert [section.target_at(x) for x in (0, 0.5, 1, 2)] == pytest.approx([0.8, 0.5, 0.2, 0.2])
    curriculum = make_curriculum([make_prompt("a", 1, 2)], order="target")
    assert curriculum.gauges()["target"] == pytest.approx(0.75)
    for version in range(1, 6):
        curriculum.observe(version, [])
    assert curriculum.gauges()["target"] == pytest.approx(0.75 - 0.45 * 5 / 10)
    assert "target" not in make_curriculum([make_prompt("a", 1, 2)]).gauges()


def test_a_rising_curriculum_goes_from_easy_to_hard() -> None:
    """Sure pass rates; by the bell at 0.75 and at 0.30, each 0.2 wide, by hand."""
    pool = [make_prompt(f"{rate}", rate * 100, 1000, f"{rate}") for rate in (1, 4, 8)]
    curriculum = make_curriculum(pool, order="target", review_share=0.0, decay=1.0)
    bells = {rate: math.exp(-((rate / 10 - 0.75) ** 2) / 0.08) for rate in (1, 4, 8)}
    first = {str(rate): bell / sum(bells.values()) for rate, bell in bells.items()}
    assert curriculum.shares() == pytest.approx(first, abs=0.01)
    for version in range(1, 11):
        curriculum.observe(version, [])
    # At 0.30 what passes more than 0.55 of the time counts as solved for now.
    assert curriculum.counts() == {"active": 2, "retired": 1, "deferred": 0, "refused": 0}
    last = {rate: math.exp(-((rate / 10 - 0.30) ** 2) / 0.08) for rate in (1, 4)}
    expected = {str(rate): bell / sum(last.values()) for rate, bell in last.items()}
    assert curriculum.shares() == pytest.approx(expected | {"8": 0.0}, abs=0.01)


def test_with_a_target_nobody_is_left_without_draws_when_all_is_above_it() -> None:
    pool = [make_prompt(f"{n}", 7, 8) for n in range(4)]
    curriculum = make_curriculum(pool, order="target", decay=1.0)
    for version in range(1, 11):
        curriculum.observe(version, [])
    assert curriculum.counts()["active"] == 0
    assert len({curriculum.draw(10, "sums", n).id for n in range(4)}) == 4


def test_what_some_prompts_show_moves_what_is_believed_of_all_of_their_capability() -> None:
    pool = [make_prompt(str(n), 4, 8, "sums" if n < 6 else "logic") for n in range(12)]
    curriculum = make_curriculum(pool)
    curriculum.observe(1, [Observation(prompt.id, 8, 8) for prompt in pool[:3]])
    means = {(row.capability, row.prompt_id): row.mean for row in curriculum.known()}
    assert means["sums", None] > 0.55 and means["logic", None] == pytest.approx(0.5)
    assert all(means["sums", prompt.id] > means["sums", None] for prompt in pool[:3])
    level = curriculum.gauges()["level/sums"]
    hopeless = [make_prompt(str(n), 0, 8) for n in range(6)]
    still = make_curriculum(hopeless)
    still.observe(1, [Observation(prompt.id, 0, 8) for prompt in hopeless])
    assert level > 0 and still.gauges()["level/sums"] == 0, "what was never solved says nothing"


def test_draws_of_another_version_and_an_empty_pool_are_refused() -> None:
    with pytest.raises(ValueError, match="draws are of version 0, got version 1"):
        make_curriculum([make_prompt("a", 1, 2)]).draw(1, "sums", 0)
    with pytest.raises(DataError, match="at least one prompt, got none"):
        make_curriculum([])


@pytest.mark.parametrize(
    ("advantages", "passed", "expected"),
    [
        ([0.5, -0.5], [True, False], Band.MIXED),
        ([0.0, 0.0], [False, False], Band.ALL_0),
        ([0.0, 0.0], [True, True], Band.ALL_1),
        ([0.0, 0.0], [True, False], Band.OTHER),
        ([0.05, -0.05], [True, True], Band.MIXED),
        ([math.nan, math.nan], [False, False], Band.MIXED),
    ],
)
def test_bands(advantages: list[float], passed: list[bool], expected: Band) -> None:
    rollouts = tuple(
        Rollout(index, (), text="", passed=is_right) for index, is_right in enumerate(passed)
    )
    assert band(Group("g", make_prompt("a", 1, 2), (1,), rollouts), advantages) is expected
