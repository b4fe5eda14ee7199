"""Which machines the learner's ranks get: by hand."""

from __future__ import annotations

import pytest

from rl.seats import Machine, Wanted, seats
from rollout.places import PlacementError, wait_for_room

FIX = "add machines"


def machines(*sizes: tuple[float, float]) -> list[Machine]:
    """Machines a, b, … of so many processors and GPUs."""
    return [Machine("abcdef"[n], {"CPU": c, "GPU": g}) for n, (c, g) in enumerate(sizes)]


@pytest.mark.parametrize(
    ("ranks", "workers", "sizes", "wanted"),
    [
        # On processors: one each, the run's own machine first, then the one with most room.
        (Wanted(2, {"CPU": 1}), Wanted(1, {"CPU": 1}), [(2, 0), (2, 0)], "ab"),
        (Wanted(3, {"CPU": 1}), Wanted(1, {"CPU": 1}), [(2, 0), (2, 0), (4, 0)], "abc"),
        (Wanted(2, {"CPU": 1}), Wanted(1, {"CPU": 1}), [(2, 0), (2, 0), (4, 0)], "ac"),
        (Wanted(4, {"CPU": 1}), Wanted(0, {"CPU": 1}), [(3, 0), (1, 0)], "aaab"),
        # With GPUs: a machine is filled before the next one.
        (Wanted(3, {"CPU": 1, "GPU": 1}), Wanted(1, {"GPU": 2}), [(8, 2), (8, 4)], "aab"),
        # One each would leave no machine with three processors for a worker.
        (Wanted(2, {"CPU": 1}), Wanted(1, {"CPU": 3}), [(3, 0), (3, 0)], "aa"),
        # Filling up would leave no machine with two GPUs for a worker.
        (Wanted(2, {"GPU": 1}), Wanted(2, {"GPU": 2}), [(8, 3), (8, 3)], "ab"),
    ],
)
def test_ranks_sit_where_they_and_the_workers_have_room(
    ranks: Wanted, workers: Wanted, sizes: list[tuple[float, float]], wanted: str
) -> None:
    assert "".join(seats(ranks, workers, machines(*sizes), fix=FIX)) == wanted


@pytest.mark.parametrize(
    ("sizes", "have"),
    [
        ([(2, 0)], "4 places, there are 2"),  # a rank and a worker too many
        ([(2, 0), (1, 0)], "4 places, there are 3"),
        ([(0.5, 0), (8, 0)], "4 places, there are 2"),  # rank 0 has to sit here
    ],
)
def test_what_has_no_room_is_refused_with_want_and_have(
    sizes: list[tuple[float, float]], have: str
) -> None:
    with pytest.raises(PlacementError, match=have) as caught:
        seats(Wanted(2, {"CPU": 1}), Wanted(2, {"CPU": 1}), machines(*sizes), fix=FIX)
    assert "learner ranks       2        each 1 CPU and 0 GPU, rank 0 here" in caught.value.why
    assert f"this one: {sizes[0][0]:g} CPU and 0 GPU" in caught.value.why


def test_room_that_comes_in_time_is_taken_and_none_is_refused() -> None:
    looks = iter([[(1.0, 0.0)], [(1.0, 0.0), (1.0, 0.0)]])

    def look() -> list[str]:
        here = machines(*next(looks))
        return seats(Wanted(2, {"CPU": 1}), Wanted(0, {"CPU": 1}), here, fix=FIX)

    assert wait_for_room(look, seconds=0.2) == ["a", "b"]
    looks = iter([[(1.0, 0.0)]])
    with pytest.raises(PlacementError, match="they want 2 places, there are 1"):
        wait_for_room(look, seconds=0.0)
