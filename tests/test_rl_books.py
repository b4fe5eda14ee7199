"""Slots, draws and ledger: determinism, bounds and closing sums, on the pure pieces."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from curation.config import CurriculumSection
from curation.curriculum import Curriculum
from ground.errors import DataError
from ground.records import Difficulty, Group, Message, Prompt, Rollout, Segment, Span
from rl.books import Books
from rl.buffer import Buffer, Outcome
from rl.ledger import Ledger, State, audit_ledger
from rl.source import Draw, Source, apportion


def make_pool(size: int, capabilities: tuple[str, ...] = ("counting", "sums")) -> list[Prompt]:
    return [
        Prompt.make(
            (Message("user", f"task {number}"),),
            capability=capabilities[number % len(capabilities)],
            reward="exact",
            answer=str(number),
            difficulty=Difficulty(successes=number % 9, trials=8),
        )
        for number in range(size)
    ]


def make_group(draw: Draw, passed: list[bool], version: int | None = None) -> Group:
    version = draw.version if version is None else version
    rollouts = tuple(
        Rollout(
            index=index,
            segments=(Segment("policy", (7, 2), (-0.5, -0.1), (Span(version, 2),)),),
            text="7",
            reward=float(is_right),
            passed=is_right,
        )
        for index, is_right in enumerate(passed)
    )
    return Group(draw.group_id, draw.prompt, (1, 5), rollouts)


MIXED, ALL_RIGHT, ALL_WRONG = [True, False], [True, True], [False, False]


def make_books(
    records: list[dict[str, object]],
    *,
    pool: list[Prompt] | None = None,
    steps: int = 4,
    groups_per_step: int = 2,
    max_staleness: int = 1,
    max_refills: int = 1,
    seed: int = 0,
    late_floor: float = 1.0,
) -> Books:
    curriculum = Curriculum(
        pool or make_pool(20), CurriculumSection(), seed=seed, group_size=2, steps=steps
    )
    source = Source(
        curriculum,
        steps=steps,
        groups_per_step=groups_per_step,
        max_staleness=max_staleness,
        max_refills=max_refills,
    )
    buffer = Buffer(groups_per_step=groups_per_step, max_staleness=max_staleness)

    def write(record: Mapping[str, object]) -> None:
        records.append(json.loads(json.dumps(record)))

    return Books(source, buffer, write, late_floor=late_floor)


def test_slots_are_opened_as_far_ahead_as_staleness_allows_and_no_further_than_the_end() -> None:
    books = make_books([], steps=3)
    opened = [[draw.slot for draw in books.open()]]
    for version in (1, 2, 3):
        for slot in books.buffer.take(version - 1):
            books.send(slot.draw)
            books.settle(slot.draw, make_group(slot.draw, MIXED))
        opened.append([draw.slot for draw in books.publish(version)])
    assert opened == [[0, 1, 2, 3], [4, 5], [], []]
    assert books.ledger.counts() == {"drawn": 6, "trained": 6}


def test_a_step_waits_for_its_own_slots_although_younger_ones_are_in() -> None:
    books = make_books([])
    draws = books.open()
    for draw in (draws[0], draws[2], draws[3]):
        books.send(draw)
        books.settle(draw, make_group(draw, MIXED))
    assert not books.is_ready(0)
    assert books.is_ready(1)
    assert [slot.number for slot in books.buffer.waiting(0)] == [1]
    books.send(draws[1])
    books.settle(draws[1], make_group(draws[1], MIXED))
    assert [group.id for group in books.plan(0).groups] == [draws[0].group_id, draws[1].group_id]


def test_a_flat_group_is_replaced_once_within_its_capability_then_the_slot_is_given_up() -> None:
    books = make_books([])
    first = books.open()[0]
    books.send(first)
    refill = books.settle(first, make_group(first, ALL_RIGHT))
    assert refill is not None
    assert (refill.slot, refill.attempt, refill.number) == (0, 1, 1)
    assert refill.prompt.capability == first.prompt.capability
    assert refill.prompt != first.prompt
    books.send(refill)
    assert books.settle(refill, make_group(refill, ALL_WRONG)) is None
    second = books.buffer.take(0)[1].draw
    books.send(second)
    books.settle(second, "broken")
    replaced = books.buffer.take(0)[1].draw
    books.send(replaced)
    books.settle(replaced, make_group(replaced, MIXED))
    plan = books.plan(0)
    assert [group.id for group in plan.groups] == [replaced.group_id]
    assert plan.filtered == {"all-1": 1, "all-0": 1, "broken": 1}


def test_no_prompt_comes_twice_in_a_version_while_its_capability_has_others() -> None:
    books = make_books([], pool=make_pool(24), groups_per_step=4, max_refills=2)
    books.open()
    draws = [draw for slot in books.buffer.slots() for draw in slot.draws]
    assert len(draws) == 24
    assert len({draw.prompt.id for draw in draws}) == 24


def test_draws_do_not_depend_on_the_order_in_which_groups_come_back() -> None:
    drawn = []
    for order in (1, -1):
        records: list[dict[str, object]] = []
        books = make_books(records, max_staleness=0, groups_per_step=4)
        draws = books.open()
        for version in (1, 2):
            waiting = list(draws)
            while waiting:
                draw = waiting.pop(0 if order == 1 else -1)
                books.send(draw)
                outcome = ALL_RIGHT if int(draw.prompt.answer) % 3 == 0 else MIXED
                refill = books.settle(draw, make_group(draw, outcome))
                waiting += [refill] if refill else []
            draws = books.publish(version)
        pending = [r for r in records if r["state"] == "pending"]
        drawn.append(sorted((r["draw"], r["prompt_id"], r["version"]) for r in pending))
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) > 12


def test_a_saved_state_goes_on_with_the_same_draws_and_every_open_draw_readmitted() -> None:
    pool, records = make_pool(20), []
    books = make_books(records, pool=pool)
    draws = books.open()
    books.send(draws[0])
    books.settle(draws[0], make_group(draws[0], ALL_WRONG))
    books.send(draws[1])
    books.settle(draws[1], make_group(draws[1], MIXED))
    state = json.loads(json.dumps(books.state_dict()))
    again = make_books(records, pool=pool)
    again.load_state_dict(state, {prompt.id: prompt for prompt in pool})
    assert again.buffer.take(0)[0].outcomes == books.buffer.take(0)[0].outcomes
    assert again.buffer.take(0)[0].outcomes[0].group == make_group(draws[0], ALL_WRONG)
    waiting = again.waiting()
    assert [draw.number for draw in waiting] == [1, 2, 4, 6]
    assert waiting[0] == books.buffer.take(0)[0].draw
    assert again.ledger.counts() == {"drawn": 5, "re-admitted": 4, "filtered/all-0": 1}
    for draw in waiting:
        again.send(draw)
        again.settle(draw, make_group(draw, MIXED))
    again.publish(1)
    again.publish(2)
    again.ledger.withdraw_all("test over")
    assert audit_ledger(records) == {"trained": 4, "filtered": 1, "withdrawn": 4}


def test_the_worked_example_of_the_documentation() -> None:
    """docs/async.md: two slots a step, staleness 1, one refill; draw 4 is flat."""
    records: list[dict[str, object]] = []
    books = make_books(records)
    opened, trained = [[(draw.number, draw.version) for draw in books.open()]], []
    for step in range(4):
        for draw in books.waiting():
            books.send(draw)
            refill = books.settle(draw, make_group(draw, ALL_RIGHT if draw.number == 4 else MIXED))
            if refill:
                books.send(refill)
                books.settle(refill, make_group(refill, MIXED))
        trained.append([int(group.id.split(".")[1]) for group in books.plan(step).groups])
        opened.append([(draw.number, draw.version) for draw in books.publish(step + 1)])
    assert opened == [
        [(0, 0), (2, 0), (4, 0), (6, 0)],
        [(8, 1), (10, 1)],
        [(12, 2), (14, 2)],
        [],
        [],
    ]
    assert trained == [[0, 2], [5, 6], [8, 10], [12, 14]]
    assert audit_ledger(records) == {"trained": 8, "filtered": 1}


def test_replay_refuses_draws_that_are_not_its_own() -> None:
    books, other = make_books([]), make_books([], seed=1)
    other.open()
    for draw in other.waiting()[:2]:
        other.send(draw)
        other.settle(draw, make_group(draw, MIXED))
    outcomes = other.plan(0).outcomes
    books.open()
    with pytest.raises(DataError, match=r"step 0 must have consumed draw \(0, "):
        books.replay(outcomes)
    again = make_books([], seed=1)
    again.open()
    with pytest.raises(DataError, match="the journal of step 0 is not whole"):
        again.replay(outcomes[:1])


def test_a_group_of_versions_that_cannot_be_is_filtered() -> None:
    books = make_books([])
    draws = books.open()
    for draw, version in zip(draws, (-1, 2, 1, 0), strict=True):
        books.send(draw)
        books.settle(draw, make_group(draw, MIXED, version))
    reasons = [slot.outcomes[0].reason for slot in books.buffer.slots()]
    assert reasons == ["misversioned", "misversioned", "", ""]


def test_what_is_late_comes_back_first_of_its_capability_and_is_then_waited_for() -> None:
    records: list[dict[str, object]] = []
    books = make_books(records, late_floor=0.5)
    draws = books.open()
    books.send(draws[1])
    books.send(draws[0])
    assert not books.is_ready(0)
    books.settle(draws[1], make_group(draws[1], MIXED))
    assert books.is_ready(0)
    assert books.drop_late(0) == [draws[0]]
    assert not books.waits_for(draws[0])
    assert [group.id for group in books.plan(0).groups] == [draws[1].group_id]
    assert books.plan(0).filtered == {"late": 1}
    again = next(draw for draw in books.publish(1) if draw.is_again)
    assert (again.number, again.prompt, again.version) == (0, draws[0].prompt, 1)
    assert (again.slot >= 4, again.group_id) == (True, draws[0].group_id)
    assert again.task_id != draws[0].task_id
    for draw in books.waiting():
        if draw != again:
            books.send(draw)
            books.settle(draw, make_group(draw, MIXED))
    books.drop_late(1)
    books.publish(2)
    assert not books.is_ready(2), "a draw that was late once is waited for"
    books.send(again)
    books.settle(again, make_group(again, MIXED))
    assert books.is_ready(2)


def test_opening_beyond_capacity_and_settling_twice_are_defects() -> None:
    books = make_books([])
    draws = books.open()
    with pytest.raises(ValueError, match="4 of 4 slots are held"):
        books.open()
    books.send(draws[0])
    books.settle(draws[0], make_group(draws[0], MIXED))
    with pytest.raises(ValueError, match="slot 0 does not wait for draw 0"):
        books.buffer.put(Outcome(draws[0]))
    with pytest.raises(ValueError, match="unsettled slots"):
        books.publish(1)


def test_a_draw_cannot_be_trained_twice_or_unsent() -> None:
    ledger = Ledger(lambda record: None)
    draw = make_books([]).open()[0]
    ledger.admit(draw)
    with pytest.raises(ValueError, match="draw 0 cannot go from pending to trained"):
        ledger.move(0, State.TRAINED)
    for state in (State.IN_FLIGHT, State.BUFFERED, State.TRAINED):
        ledger.move(0, state)
    with pytest.raises(ValueError, match="cannot go from closed to trained"):
        ledger.move(0, State.TRAINED)


@pytest.mark.parametrize(
    ("moves", "message"),
    [
        (["pending", "in flight"], "1 are not"),
        (["pending", "pending"], r"ledger.jsonl:2: draw 7 cannot go from pending to pending"),
        (["in flight"], "cannot go from undrawn to in flight"),
        (["pending", "in flight", "buffered", "trained", "trained"], "from trained to trained"),
    ],
)
def test_the_audit_refuses_a_ledger_that_does_not_close(moves: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        audit_ledger([{"draw": 7, "state": state} for state in moves])


def test_apportioning_sums_to_the_total() -> None:
    assert apportion({"a": 0.5, "b": 0.3, "c": 0.2}, 4) == {"a": 2, "b": 1, "c": 1}
    assert apportion({"a": 1.0}, 0) == {"a": 0}
    assert apportion({"b": 0.5, "a": 0.5}, 3) == {"a": 2, "b": 1}


class BooksMachine(RuleBasedStateMachine):
    """Random orders of sending, finishing, breaking, refusing, dropping, training and crashing."""

    @initialize(
        staleness=st.integers(0, 3),
        refills=st.integers(0, 2),
        seed=st.integers(0, 9),
        floor=st.sampled_from([0.5, 1.0]),
    )
    def start(self, staleness: int, refills: int, seed: int, floor: float) -> None:
        self.shape = {"max_staleness": staleness, "max_refills": refills, "seed": seed}
        self.floor = floor
        self.records: list[dict[str, object]] = []
        self.pool = make_pool(7)
        self.books = self.new_books()
        self.waiting, self.in_flight = self.books.open(), []
        self.trained: list[str] = []
        self.saved: tuple[str, int, int] = ("", 0, 0)
        self.refused: set[str] = set()

    def new_books(self) -> Books:
        return make_books(
            self.records, pool=self.pool, steps=6, late_floor=self.floor, **self.shape
        )

    @precondition(lambda self: self.waiting)
    @rule(data=st.data())
    def send(self, data: st.DataObject) -> None:
        draw = data.draw(st.sampled_from(self.waiting))
        self.waiting.remove(draw)
        self.books.send(draw)
        self.in_flight.append(draw)

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data(), passed=st.sampled_from([MIXED, MIXED, ALL_RIGHT, ALL_WRONG, None]))
    def settle(self, data: st.DataObject, passed: list[bool] | None) -> None:
        draw = data.draw(st.sampled_from(self.in_flight))
        self.in_flight.remove(draw)
        group = make_group(draw, passed, self.books.version) if passed else "broken"
        refill = self.books.settle(draw, group)
        self.waiting += [refill] if refill else []

    @precondition(lambda self: self.in_flight)
    @rule(data=st.data())
    def err_about_the_weights(self, data: st.DataObject) -> None:
        """A worker that claims older weights than its slot, or newer ones than there are."""
        draw = data.draw(st.sampled_from(self.in_flight))
        version = data.draw(st.sampled_from([draw.version - 1, self.books.version + 2]))
        self.in_flight.remove(draw)
        refill = self.books.settle(draw, make_group(draw, MIXED, version))
        self.waiting += [refill] if refill else []

    @precondition(lambda self: self.in_flight and self.books.curriculum.counts()["refused"] < 4)
    @rule(data=st.data())
    def refuse(self, data: st.DataObject) -> None:
        """The prompt does not fit; one that is drawn again until the publication still comes."""
        draw = data.draw(st.sampled_from(self.in_flight))
        if len(self.refused | {draw.prompt.id}) > 4:
            return
        self.refused.add(draw.prompt.id)
        self.in_flight.remove(draw)
        refill = self.books.settle(draw, "refused")
        self.waiting += [refill] if refill else []

    @precondition(lambda self: self.books.is_ready(self.books.version))
    @rule()
    def train(self) -> None:
        step = self.books.version
        late = self.books.drop_late(step)
        assert self.floor < 1 or not late
        assert not any(draw.is_again for draw in late), "put off at most once"
        assert len(late) <= 1, "half of a step's two slots must be in"
        for draws in (self.waiting, self.in_flight):
            draws[:] = [draw for draw in draws if draw not in late]
        for group in self.books.plan(step).groups:
            self.trained.append(group.id)
        for slot in self.books.buffer.take(step):
            assert 0 <= step - slot.draws[0].version <= self.shape["max_staleness"]
        opened = self.books.publish(step + 1)
        assert not {draw.prompt.id for draw in opened if not draw.is_again} & self.gone()
        self.waiting += opened

    def gone(self) -> set[str]:
        """Prompts that a publication has taken out of the pool."""
        refused = self.books.curriculum.state_dict()["refused"]
        assert isinstance(refused, list)
        return set(refused)

    @rule()
    def save(self) -> None:
        self.saved = (json.dumps(self.books.state_dict()), len(self.records), len(self.trained))

    @precondition(lambda self: self.saved[0])
    @rule()
    def crash(self) -> None:
        state, num_records, num_trained = self.saved
        del self.records[num_records:], self.trained[num_trained:]
        self.books = self.new_books()
        known = {prompt.id: prompt for prompt in self.pool}
        self.books.load_state_dict(json.loads(state), known)
        self.waiting, self.in_flight = self.books.waiting(), []

    @invariant()
    def sums_close(self) -> None:
        counts = self.books.ledger.counts()
        assert counts.pop("drawn") == sum(counts.values())
        buffer = self.books.buffer
        assert len(buffer) <= buffer.capacity
        settled = Counter(slot.number // 2 for slot in buffer.slots() if slot.is_settled)
        assert buffer.num_settled == settled.total()
        for step in {slot.number // 2 for slot in buffer.slots()}:
            assert buffer.num_waiting(step) == len(buffer.waiting(step)) == 2 - settled[step]
        assert len(self.trained) == len(set(self.trained)) == counts.get("trained", 0)

    def teardown(self) -> None:
        self.books.ledger.withdraw_all("end")
        totals = audit_ledger(self.records)
        assert sum(totals.values()) == self.books.ledger.counts()["drawn"]


BooksMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=60)
TestBooks = BooksMachine.TestCase
