"""Placement: the optimum by formula, brute force over random cases, and refusals with a table."""

from __future__ import annotations

import itertools
import math
import operator
import random
from collections.abc import Sequence

import pytest

from rl.placement import plan
from rl.room import Consumer, Devices, fits
from rollout.places import PlacementError, Want, require_room


def test_side_by_side_the_learners_share_is_its_cost_over_both() -> None:
    placed = plan(Devices.of(64), [Consumer("learner", 1.0), Consumer("rollout", 3.0)])
    assert placed.devices == {"learner": 16, "rollout": 48}  # 1 / (1 + 3) of 64
    assert placed.seconds == 1 / 16 and placed.left_over == 0
    assert placed.idle_share("learner") == placed.idle_share("rollout") == 0


def test_in_turns_the_shares_are_as_the_roots_of_the_costs() -> None:
    costs = [Consumer("learner", 1.0), Consumer("rollout", 4.0)]
    placed = plan(Devices.of(12), costs, overlaps=False)
    assert placed.devices == {"learner": 4, "rollout": 8}  # 1 : 2
    assert placed.seconds == 1 / 4 + 4 / 8 and placed.idle_share("learner") == pytest.approx(2 / 3)


def test_devices_that_would_make_nothing_faster_are_left_over() -> None:
    one = Consumer("learner", 10.0, most=1)
    placed = plan(Devices.of(8), [one, Consumer("rollout", 1.0, width=2)])
    assert placed.devices == {"learner": 1, "rollout": 2} and placed.left_over == 5
    assert placed.bottleneck == "learner" and placed.idle_share("rollout") == 0.95


def test_replicas_are_whole_and_stay_within_a_machine() -> None:
    wide = Consumer("rollout", 9.0, width=4)
    placed = plan(Devices((6, 6)), [wide, Consumer("learner", 1.0)])
    assert placed.devices == {"rollout": 8, "learner": 1}  # 4 of each machine, not 12
    assert not fits(Devices((6, 6)), [wide], [3])
    assert fits(Devices((8, 8)), [Consumer("giant", 1.0, width=16)], [1])
    assert not fits(Devices((8, 4)), [Consumer("giant", 1.0, width=16)], [1])


def test_the_refusal_says_when_only_the_machines_are_too_small() -> None:
    two = [Consumer(name, 1.0, width=4) for name in ("learner", "rollout")]
    with pytest.raises(
        PlacementError, match=r"there are 10 but not side by side: machines of 6, 2"
    ):
        plan(Devices((6, 2, 2)), two)


def test_memory_sets_the_least_of_a_sharded_learner() -> None:
    learner = Consumer("learner", 1.0, shared_bytes=100.0, device_bytes=5.0)
    rollout = Consumer("rollout", 100.0)
    placed = plan(Devices.of(32, bytes_each=15.0), [learner, rollout])
    assert placed.devices["learner"] == 10  # 100 / 10 + 5 = 15
    assert learner.bytes_on_each(10) == 15.0
    assert plan(Devices.of(32, bytes_each=105.0), [learner, rollout]).devices["learner"] == 1


def test_what_cannot_fit_is_refused_at_once_with_want_and_have() -> None:
    """#40"""
    learner = Consumer("learner", 1.0, shared_bytes=60 * 2**30)
    rollout = Consumer("rollout", 1.0, width=4, replica_bytes=20 * 2**30)
    with pytest.raises(PlacementError) as caught:
        plan(Devices.of(8, bytes_each=10 * 2**30), [learner, rollout])
    told = str(caught.value)
    assert caught.value.exit_code == 4
    assert "they want 10 devices, there are 8" in told and "fix: give more devices, or" in told
    assert "learner     6        1 x 1 side by side, 60.0 GiB spread over all" in told
    assert "rollout     4        1 x 4 side by side, 5.0 of 10.0 GiB on each" in told


def test_a_device_that_is_too_small_is_no_matter_of_their_number() -> None:
    judge = Consumer("judge", 1.0, replica_bytes=11.0)
    with pytest.raises(PlacementError, match="no number of devices would do") as caught:
        plan(Devices.of(4, bytes_each=10.0), [judge])
    assert caught.value.fix == "give devices with more memory, or a smaller model"


def test_wants_within_what_is_there_pass_and_others_do_not() -> None:
    wants = [Want("rollout workers", 60, "rl.fleet.num_workers"), Want("spare", 4)]
    require_room(wants, 64, "processors", where="rl.fleet", fix="lower it")
    with pytest.raises(PlacementError, match="they want 64 processors, there are 2"):
        require_room(wants, 2, "processors", where="rl.fleet", fix="lower it")


@pytest.mark.parametrize("overlaps", [True, False])
@pytest.mark.parametrize("block", range(6))
def test_no_split_of_brute_force_is_faster_by_five_percent(overlaps: bool, block: int) -> None:
    placeable = 0
    for case in range(80):
        devices, consumers = _random_case(random.Random(f"{block} {case}"))
        best = _brute_force(devices, consumers, overlaps)
        placeable += best is not None
        if best is None:
            with pytest.raises(PlacementError):
                plan(devices, consumers, overlaps=overlaps)
            continue
        placed = plan(devices, consumers, overlaps=overlaps)
        counts = [placed.devices[each.name] // each.width for each in consumers]
        assert _is_allowed(devices, consumers, counts)
        assert best <= placed.seconds * (1 + 1e-9)
        assert placed.seconds <= best * (1.05 if not overlaps else 1 + 1e-9)
    assert 40 <= placeable < 80  # of six blocks: at least 240 splits, and refusals too


def test_with_many_splits_turns_are_within_five_percent_too() -> None:
    for case in range(12):
        chance = random.Random(f"many {case}")
        devices = Devices.of(chance.randint(56, 64))
        consumers = [
            Consumer(name, chance.lognormvariate(0, 1.5), width=chance.choice((1, 2, 4, 8)))
            for name in ("learner", "rollout", "teacher")
        ]
        best = _brute_force(devices, consumers, overlaps=False)
        assert best and plan(devices, consumers, overlaps=False).seconds <= 1.05 * best


def _random_case(chance: random.Random) -> tuple[Devices, list[Consumer]]:
    machines = tuple(chance.choice((2, 4, 6, 8)) for _ in range(chance.randint(2, 3)))
    names = ("learner", "rollout", "reward", "teacher")[: chance.choice((2, 2, 3, 3, 3, 4))]
    return Devices(machines, bytes_each=16.0), [
        Consumer(
            name,
            seconds=chance.lognormvariate(0, 1.5),
            width=chance.choice((1, 1, 1, 2, 2, 4)),
            replica_bytes=chance.choice((0, 0, 10, 16)),
            shared_bytes=chance.choice((0, 0, 30)),
            device_bytes=chance.choice((0, 0, 4)),
            most=chance.choice((None, None, 3)),
        )
        for name in names
    ]


def _brute_force(devices: Devices, consumers: list[Consumer], overlaps: bool) -> float | None:
    """The best pace of all splits there are, each checked by an honest search for seats."""
    ranges = [range(1, devices.count // each.width + 1) for each in consumers]
    widths = [each.width for each in consumers]
    paced = sorted(
        (_pace(consumers, counts, overlaps), counts)
        for counts in itertools.product(*ranges)
        if sum(map(operator.mul, counts, widths)) <= devices.count
    )
    return next((pace for pace, counts in paced if _is_allowed(devices, consumers, counts)), None)


def _pace(consumers: list[Consumer], counts: Sequence[int], overlaps: bool) -> float:
    each = [c.seconds / (n * c.width) for c, n in zip(consumers, counts, strict=True)]
    return max(each) if overlaps else sum(each)


def _is_allowed(devices: Devices, consumers: list[Consumer], counts: Sequence[int]) -> bool:
    for each, n in zip(consumers, counts, strict=True):
        held = each.replica_bytes / each.width + each.shared_bytes / (n * each.width)
        if held + each.device_bytes > devices.bytes_each + 1e-9:
            return False
        if each.most is not None and n > each.most:
            return False
    widths = [each.width for each, n in zip(consumers, counts, strict=True) for _ in range(n)]
    return _seats(
        tuple(sorted(devices.machines)),
        tuple(sorted(widths, reverse=True)),
        {},
        max(devices.machines),
    )


def _seats(
    free: tuple[int, ...], widths: tuple[int, ...], seen: dict[object, bool], largest: int
) -> bool:
    """Every way to seat replicas in machines, tried one after another."""
    if not widths or set(widths) == {1}:
        return sum(free) >= sum(widths)
    if (free, widths) in seen:
        return seen[free, widths]
    if widths[0] > largest:  # whole machines, all of the largest kind and still unused
        need, rest = divmod(widths[0], largest)
        if rest or free.count(largest) < need:
            return False
        return _seats(tuple(sorted((*free[:-need], *[0] * need))), widths[1:], seen, largest)
    trials = {
        tuple(sorted(room - widths[0] * (n == m) for m, room in enumerate(free)))
        for n in range(len(free))
        if free[n] >= widths[0]
    }
    found = any(_seats(trial, widths[1:], seen, largest) for trial in trials)
    seen[free, widths] = found
    return found


def test_a_split_over_ten_thousand_devices_takes_no_time() -> None:
    big = [Consumer("learner", 1.0, width=8), Consumer("rollout", 3.1, width=16)]
    placed = plan(Devices.of(10_000), big)
    assert placed.devices["learner"] == pytest.approx(10_000 / 4.1, rel=0.01)
    assert math.isclose(placed.paces["learner"], placed.paces["rollout"], rel_tol=0.01)
