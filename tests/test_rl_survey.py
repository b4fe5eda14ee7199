"""Groups that are asked only to learn how hard their prompts are: told, never trained, in turn."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping
from pathlib import Path

import pytest
from test_rl_books import ALL_RIGHT, ALL_WRONG, MIXED, make_group, make_pool
from test_rl_controller import ScriptedFleet, first_is_right, mostly_mixed

from curation.curriculum import Observation
from ground.errors import DataError
from ground.records import Group, Prompt
from rl.audit import audit_run
from rl.books import Books
from rl.buffer import Outcome
from rl.config import RlSection
from rl.consumed import Consumed, read_plan, survey_path
from rl.controller import Controller
from rl.ledger import audit_ledger
from rl.source import Draw
from rl.survey import Survey
from rollout.systems import SystemInstruction
from rollout.task import GroupTask

POOL = make_pool(20)


def make_section(max_staleness: int = 1, **settings: object) -> RlSection:
    shape = {"steps": 6, "groups_per_step": 2, "group_size": 2, "max_staleness": max_staleness}
    return RlSection.model_validate(shape | {"curriculum": {"survey_groups": 3}} | settings)


def make_books(records: list[Mapping[str, object]], max_staleness: int = 1) -> Books:
    return Books.of(make_section(max_staleness), POOL, 0, records.append)


def settle_all(books: Books, step: int) -> None:
    """Answer a step's draws; those of odd number are right twice, and replaced."""
    while waiting := books.buffer.waiting(step):
        for slot in waiting:
            draw = slot.draw
            books.send(draw)
            books.settle(draw, make_group(draw, MIXED if draw.number % 2 else ALL_RIGHT))


def answer(books: Books, count: int, passed: list[bool] = ALL_WRONG) -> list[str]:
    """Answer the oldest askings; returns their prompts."""
    askings = books.askings()[:count]
    for asking in askings:
        books.send(asking)
        assert books.settle(asking, make_group(asking, passed)) is None
    return [asking.prompt.id for asking in askings]


def test_everyone_has_a_turn_before_anybody_has_another() -> None:
    survey = Survey(POOL, groups=6, max_staleness=0, seed=0)
    asked = []
    for version in range(4):
        draws = survey.open(version)
        asked += [draw.prompt.id for draw in draws]
        for draw in draws:
            survey.put(Outcome(draw, "surveyed"))
        survey.free(version)
    assert len(set(asked[:20])) == 20
    assert asked[20:] == asked[:4]
    other = Survey(POOL, groups=6, max_staleness=0, seed=1)
    assert [draw.prompt.id for draw in other.open(0)] != asked[:6]


def test_who_was_drawn_waits_for_his_turn_and_who_was_late_is_next() -> None:
    survey = Survey(POOL[:4], groups=2, max_staleness=0, seed=0)
    first = survey.open(0)
    survey.put(Outcome(first[0], "late"))
    survey.put(Outcome(first[1], "surveyed"))
    survey.free(0)
    second = survey.open(1)
    assert second[0].prompt == first[0].prompt and second[1].prompt not in _prompts(first)
    for draw in second:
        survey.put(Outcome(draw, "surveyed"))
    survey.free(1)
    survey.see([first[1].prompt.id])
    last = survey.open(2)
    assert last[0].prompt not in _prompts(first) + _prompts(second)
    assert last[1].prompt == first[0].prompt, "the other one was drawn since"
    survey.leave_out([second[1].prompt.id])
    assert _prompts(survey.open(3)) == [first[1].prompt]


def _prompts(draws: list[Draw]) -> list[Prompt]:
    return [draw.prompt for draw in draws]


def test_askings_are_told_with_their_step_and_have_no_place_in_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    books = make_books([])
    books.open()
    told: list[str] = []
    observe = books.curriculum.observe

    def tell(version: int, seen: list[Observation], refused: list[str], *, wide: set[str]) -> None:
        told.extend(f"{version} {each.prompt_id}" for each in seen)
        observe(version, seen, refused, wide=wide)

    monkeypatch.setattr(books.curriculum, "observe", tell)
    numbers = [(draw.number, draw.slot, draw.version) for draw in books.askings()]
    assert numbers == [(-1, -1, 0), (-2, -1, 0), (-3, -1, 0)]
    asked = answer(books, 3)
    settle_all(books, 0)
    assert books.plan(0).surveyed == ()
    books.publish(1)
    settle_all(books, 1)
    plan = books.plan(1)
    assert [outcome.draw.prompt.id for outcome in plan.surveyed] == asked
    assert [outcome.reason for outcome in plan.surveyed] == ["surveyed"] * 3
    assert len(plan.groups) == 2 and plan.filtered == {"all-1": 2} and plan.rollouts == 8
    books.publish(2)
    assert [each.split()[0] for each in told] == ["1"] * 4 + ["2"] * 7
    assert told[-3:] == [f"2 {prompt_id}" for prompt_id in asked]
    counts = books.ledger.counts()
    assert counts["filtered/surveyed"] == 3 and counts["trained"] == 4


def test_a_step_of_turns_waits_for_its_askings_and_one_that_overlaps_does_not() -> None:
    for max_staleness, waits in ((0, True), (1, False)):
        books = make_books([], max_staleness)
        books.open()
        for step in range(max_staleness + 1):
            settle_all(books, step)
        assert books.is_ready(max_staleness) is not waits
        if waits:
            assert "group " in books.describe_waiting(0)
            answer(books, 3)
            assert books.is_ready(0)
        if not waits:
            books.publish(1)
            oldest = books.askings()[:3]
            assert books.drop_late(1) == oldest
            plan = books.plan(1)
            assert [outcome.reason for outcome in plan.surveyed] == ["late"] * 3
            assert not any(books.waits_for(asking) for asking in oldest)
            books.publish(2)
            assert books.ledger.counts()["withdrawn/late"] == 3
            # It is their turn before everybody else's, unless they were drawn meanwhile.
            seen = {o.draw.prompt for o in plan.outcomes}
            next_ones = [prompt for prompt in _prompts(oldest) if prompt not in seen]
            assert next_ones and _prompts(books.askings()[3:])[: len(next_ones)] == next_ones


@pytest.mark.parametrize("seed", range(8))
def test_a_cut_and_its_journal_lead_to_the_same_books(seed: int, tmp_path: Path) -> None:
    """Steps are answered and published in an order of chance; the cut is made anywhere."""
    chance = random.Random(seed)
    max_staleness, cut_at = chance.choice([0, 1, 2]), chance.randrange(5)
    records: list[Mapping[str, object]] = []
    books, consumed = make_books(records, max_staleness), Consumed(tmp_path)
    books.open()
    saved = ""
    for step in range(6):
        if step == cut_at:
            saved = json.dumps(books.state_dict())
        answer(books, chance.randrange(9), chance.choice([MIXED, ALL_WRONG, ALL_RIGHT]))
        settle_all(books, step)
        answer(books, len(books.askings()) if max_staleness == 0 else chance.randrange(3))
        books.drop_late(step)
        consumed.write(books.plan(step))
        books.publish(step + 1)
    again = make_books([], max_staleness)
    again.load_state_dict(json.loads(saved), {prompt.id: prompt for prompt in POOL})
    for plan in consumed.after(cut_at):
        again.replay(plan.told)
    state, repeated = books.state_dict(), again.state_dict()
    for key in ("version", "curriculum", "survey"):
        assert state[key] == repeated[key], key
    assert {k: v for k, v in books.ledger.counts().items() if "/" in k} == {
        k: v for k, v in again.ledger.counts().items() if "/" in k
    }


def test_a_journal_without_its_survey_is_refused_and_one_that_is_trimmed_leaves_none(
    tmp_path: Path,
) -> None:
    books, consumed = make_books([]), Consumed(tmp_path)
    books.open()
    answer(books, 3)
    for step in range(2):
        settle_all(books, step)
        consumed.write(books.plan(step))
        books.publish(step + 1)
    step_1, survey = consumed.files()[1], survey_path(tmp_path, 2)
    assert len(read_plan(step_1).surveyed) == 3 and not survey_path(tmp_path, 1).exists()
    content = survey.read_bytes()
    survey.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        read_plan(step_1)
    survey.write_bytes(content)
    consumed.trim(1)
    assert [path.name for path in tmp_path.iterdir()] == ["step_000001.parquet"]


def make_controller(
    fleet: ScriptedFleet, records: list[dict[str, object]], section: RlSection, places: int = 2
) -> Controller:
    books = Books.of(section, POOL, 0, lambda record: records.append(dict(record)))
    books.open()
    return Controller(
        books,
        fleet,
        section,
        seed=0,
        validation=[],
        system_of=lambda prompt, pass_: SystemInstruction(),
        in_flight=2 * places,
        note=lambda event: None,
    )


async def play(controller: Controller, consumed: Consumed, steps: int) -> list[list[str]]:
    drawn = []
    await controller.begin(0, "weights")
    for step in range(steps):
        plan, _ = await controller.next_batch(step)
        consumed.write(plan)
        drawn.append([f"{o.draw.group_id} {o.observation}" for o in plan.told])
        await controller.publish(step + 1, "weights")
    await controller.close("end")
    return drawn


def test_in_turns_what_is_surveyed_and_drawn_does_not_depend_on_latency(tmp_path: Path) -> None:
    def run(jitter: float) -> list[list[str]]:
        records: list[dict[str, object]] = []
        fleet, section = ScriptedFleet(mostly_mixed, jitter), make_section(0)
        folder = tmp_path / str(jitter)
        drawn = asyncio.run(
            play(make_controller(fleet, records, section), Consumed(folder / "groups"), 6)
        )
        (folder / "ledger.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        audited = audit_run(folder, section)
        assert audited["lost"] == 0 and audited["trained_groups"] == 12
        assert sum("surveyed" in str(record.get("reason")) for record in records) == 15
        return drawn

    assert run(0.0) == run(0.01)


class Hanging(ScriptedFleet):
    """Never answers an asking, and remembers which ones were called off."""

    def __init__(self) -> None:
        super().__init__(first_is_right)
        self.begun: asyncio.Event = asyncio.Event()
        self.called_off: list[str] = []

    async def rollout(self, task: GroupTask) -> Group:
        if ".-" not in task.id:
            return await super().rollout(task)
        self.begun.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.called_off.append(task.id)
            raise
        raise AssertionError


def test_askings_that_hang_hold_nobody_up_and_make_room_for_draws(tmp_path: Path) -> None:
    """One place: an asking has it as soon as all draws are in, and loses it to the next draw."""
    records: list[dict[str, object]] = []

    def put_off() -> list[object]:
        return [record["state"] for record in records if record.get("reason") == "put off"]

    async def run() -> list[str]:
        fleet = Hanging()
        controller = make_controller(fleet, records, make_section(1), places=1)
        await controller.begin(0, "weights")
        for step in range(6):
            await controller.next_batch(step)
            if step == 0:
                await fleet.begun.wait()
            await controller.publish(step + 1, "weights")
            while step == 0 and not put_off():
                await asyncio.sleep(0)
        await controller.close("end")
        return fleet.called_off

    assert asyncio.run(run())
    assert set(put_off()) == {"re-admitted"}
    totals = audit_ledger(records)
    assert totals["trained"] == 12
    assert not any(r.get("reason") == "surveyed" for r in records)
