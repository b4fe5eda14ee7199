"""What the controller does when a side is slow or a part of it fails."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from test_rl_controller import ScriptedFleet, first_is_right, make_controller

from rl.controller import Controller


async def settled(controller: Controller, count: int) -> None:
    """Wait until so many groups are buffered, and a little longer for any that should not be."""
    async with asyncio.timeout(10):
        while controller.status()["buffered"] != count:
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)


def test_a_sleeping_trainer_holds_the_fleet_back_and_nothing_is_dropped() -> None:
    """#80: (1 + 1) steps of 3 slots are filled, then nothing is drawn; the oldest is trained
    first."""
    records: list[dict[str, object]] = []
    fleet = ScriptedFleet(first_is_right)

    async def run() -> list[int]:
        controller = make_controller(fleet, records)
        await controller.begin(0, "weights")
        await settled(controller, 6)
        assert controller.status()["buffered"] == 6
        assert Counter(str(record["state"]) for record in records)["buffered"] == 6
        assert {str(record["state"]) for record in records} == {"pending", "in flight", "buffered"}
        sizes = []
        for step in range(4):
            plan, _ = await controller.next_batch(step)
            sizes.append(len(plan.groups))
            await controller.publish(step + 1, "weights")
        assert (await controller.close("end"))["trained"] == 12
        return sizes

    assert asyncio.run(run()) == [3, 3, 3, 3]


def test_a_background_task_that_dies_fails_the_waiting_learner(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """#28: also one that dies while nobody waits."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError("a defect in the books")

    async def run(when_it_dies: str) -> None:
        controller = make_controller(ScriptedFleet(first_is_right), [])
        monkeypatch.setattr(controller._books, "record", broken)
        await controller.begin(0, "weights")
        if when_it_dies == "before anybody waits":
            await asyncio.sleep(0.1)
        async with asyncio.timeout(5):
            await controller.next_batch(0)

    for when_it_dies in ("while the learner waits", "before anybody waits"):
        with pytest.raises(ZeroDivisionError, match="a defect in the books"):
            asyncio.run(run(when_it_dies))


def test_what_is_waited_for_is_told_from_outside() -> None:
    """#81: a starved trainer names the slots that it waits for, and since when."""

    async def run() -> None:
        fleet = ScriptedFleet(first_is_right, jitter=60)
        controller = make_controller(fleet, [])
        await controller.begin(0, "weights")
        idle = controller.status()
        assert (idle["step"], idle["waits_for"], idle["since"]) == (None, "", None)
        waiting = asyncio.create_task(controller.next_batch(0))
        await asyncio.sleep(0.05)
        status = controller.status()
        assert status["step"] == 0 and str(status["waits_for"]).startswith("slot 0 (group ")
        assert isinstance(status["since"], float) and status["in_flight"] == 4
        waiting.cancel()
        await controller.close("end")

    asyncio.run(run())
