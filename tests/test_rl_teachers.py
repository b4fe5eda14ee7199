"""Who asks the teacher, and what becomes of groups when teachers are lost."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import make_tiny_model
from rl_doubles import make_group
from rl_runs import STEPS, Run, nothing_left
from test_rl_controller import ScriptedFleet, first_is_right, make_controller, play

from distill.config import RolloutDistillSection
from distill.word import SaidRow, Word
from ground.errors import DataError, InfraError, PacktrainError, WorkersLostError
from ground.metrics import read_metrics
from ground.records import Group
from rl.balance import Balance
from rl.cluster import cluster
from rl.groups import outcome_of
from rl.teacher_use import TeacherUse
from rl.teachers import Teachers
from rollout.config import EngineSection, FleetSection
from rollout.fleet import FleetUse
from rollout.places import PlacementError, Places, require_places
from rollout.seat import WorkerDiedError
from rollout.simulation import run_virtual
from rollout.task import Loaded, Pong

FLEET = FleetSection(max_restarts=1, max_attempts=3, backoff_seconds=1.0)


def word_for(group: Group) -> Word:
    return Word("own", tuple(SaidRow(b"k", 1, b"c") for _ in group.rollouts))


@dataclass
class ScriptedTeacher:
    """Speaks after a second; `faults` say what happens at each asking of all teachers, in order."""

    faults: list[PacktrainError | float | None]
    heard: list[tuple[int, str]]
    """Number of the seat, and the group."""
    is_dead: bool = False
    seat: int = -1
    node: str = "here"
    is_placed: bool = True

    async def prepare(self) -> None: ...

    async def open(self, index: int, slots_share: float = 1.0) -> None:
        self.seat = index

    async def ping(self) -> Pong:
        if self.is_dead:
            raise WorkerDiedError("gone")
        return Pong()

    async def load(self, version: int, weights: object) -> Loaded:
        return Loaded(version, {}, 0.0)

    async def speak(self, group: Group) -> tuple[Word, float]:
        fault = self.faults.pop(0) if self.faults else None
        self.heard.append((self.seat, group.id))
        await asyncio.sleep(fault if isinstance(fault, float) else 1.0)
        if isinstance(fault, WorkerDiedError):
            self.is_dead = True
        if isinstance(fault, PacktrainError):
            raise fault
        return word_for(group), 1.0

    def kill(self) -> None:
        self.is_dead = True

    async def close(self) -> None: ...


def ask(
    *faults: PacktrainError | float | None, groups: int = 1, teachers: int = 1
) -> tuple[list[Word], list[tuple[int, str]], TeacherUse]:
    """Words on some groups asked for at once, the askings, and what it took."""
    heard, left = list[tuple[int, str]](), list(faults)
    section = RolloutDistillSection(num_teachers=teachers, speak_deadline_seconds=30)

    async def play() -> tuple[list[Word], TeacherUse]:
        crew = Teachers(section, FLEET, lambda: ScriptedTeacher(left, heard))
        await crew.start()
        try:
            asked = (crew.speak(make_group(number)) for number in range(groups))
            return list(await asyncio.gather(*asked)), crew.use()
        finally:
            await crew.close()

    words, use = run_virtual(play())
    return words, heard, use


def test_groups_are_dealt_out_over_the_teachers_and_their_time_is_counted() -> None:
    words, heard, use = ask(groups=4, teachers=2)
    assert words == [word_for(make_group(n)) for n in range(4)]
    assert sorted(seat for seat, _ in heard) == [0, 0, 1, 1]
    assert use == TeacherUse(teachers=2, seconds=4.0, rollouts=16)


def test_a_teacher_with_more_groups_than_hands_is_not_blamed_for_their_queue() -> None:
    """Six words of 20 s, one after the other, where one word has 30: 120 s in all, one life."""
    turn, born = asyncio.Lock(), list[ScriptedTeacher]()

    class Slow(ScriptedTeacher):
        async def speak(self, group: Group) -> tuple[Word, float]:
            async with turn:
                await asyncio.sleep(20)
            return word_for(group), 20.0

    def spawn() -> ScriptedTeacher:
        born.append(Slow([], []))
        return born[-1]

    async def play() -> TeacherUse:
        section = RolloutDistillSection(num_teachers=1, speak_deadline_seconds=30)
        crew = Teachers(section, FLEET, spawn)
        await crew.start()
        try:
            await asyncio.gather(*(crew.speak(make_group(number)) for number in range(6)))
            return crew.use()
        finally:
            await crew.close()

    assert run_virtual(play()).seconds == 120.0 and len(born) == 1


def test_whoever_waits_for_a_teacher_that_is_at_work_waits_without_a_deadline() -> None:
    """Six words of 400 s are 2,400 s; coming up may take 484 s at most (`patience_seconds`)."""
    turn = asyncio.Lock()

    class Slow(ScriptedTeacher):
        async def speak(self, group: Group) -> tuple[Word, float]:
            async with turn:
                await asyncio.sleep(400)
            return word_for(group), 400.0

    async def play() -> TeacherUse:
        section = RolloutDistillSection(num_teachers=1, speak_deadline_seconds=1000)
        crew = Teachers(section, FLEET, lambda: Slow([], []))
        await crew.start()
        try:
            await asyncio.gather(*(crew.speak(make_group(number)) for number in range(6)))
            return crew.use()
        finally:
            await crew.close()

    assert FLEET.patience_seconds < 2400
    assert run_virtual(play()).seconds == 2400.0


def test_a_teacher_that_dies_or_hangs_is_replaced_and_the_group_asked_again() -> None:
    for fault in (WorkerDiedError("killed"), 1000.0):
        words, heard, use = ask(fault)
        assert words == [word_for(make_group(0))] and len(heard) == 2
        assert use.rollouts == 4


def test_a_group_that_no_teacher_gets_through_with_is_an_infra_error_that_says_why() -> None:
    cramped = InfraError("must fit into memory")
    with pytest.raises(InfraError, match="in 3 attempts") as caught:
        ask(*[cramped] * 3)
    assert caught.value.why.count("must fit into memory") == 3


def test_when_no_teacher_is_left_the_run_ends_and_a_defect_of_his_is_told_at_once() -> None:
    with pytest.raises(WorkersLostError, match="at least 1 of 1 teachers must live, 0 are left"):
        ask(*[WorkerDiedError("killed")] * 9)
    with pytest.raises(DataError, match="got NaN"):
        ask(DataError("log-probs must be numbers, got NaN"))


class Speakers:
    """Says something to each group, in any order; `fails` names prompts it cannot speak to."""

    places = 3

    def __init__(self, fails: Callable[[Group], bool] = lambda group: False) -> None:
        self._fails, self._random = fails, random.Random(0)
        self.asked: list[str] = []

    async def speak(self, group: Group) -> Word:
        self.asked.append(group.id)
        await asyncio.sleep(self._random.random() * 0.01)
        if self._fails(group):
            raise InfraError("lost")
        return word_for(group)


def test_every_group_that_teaches_is_spoken_to_once_and_no_flat_one() -> None:
    fleet, records, speakers = ScriptedFleet(first_is_right, jitter=0.01), [], Speakers()
    flat = {"task 3", "task 4"}
    fleet._is_right = lambda task, i: i == 0 and task.prompt.messages[0].content not in flat

    async def run() -> None:
        controller = make_controller(fleet, records, teachers=speakers)
        await controller.begin(0, "weights")
        for step in range(4):
            plan, gauges = await controller.next_batch(step)
            assert set(plan.words) == {group.id for group in plan.groups}
            assert "groups_at_teacher" in gauges
            await controller.publish(step + 1, "weights")
        await controller.close("end")

    asyncio.run(run())
    trained = {r["draw"] for r in records if r["state"] == "trained"}
    flats = [r for r in records if r["state"] == "filtered"]
    assert trained and all(record["reason"] == "all-0" for record in flats)
    assert len(speakers.asked) == len(set(speakers.asked)) >= len(trained)


def test_an_untaught_group_is_drawn_again_and_never_trained_on() -> None:
    fleet, records = ScriptedFleet(first_is_right), []
    first: set[str] = set()

    def fails(group: Group) -> bool:
        """The first group of each of two prompts."""
        name = str(group.prompt.messages[0].content)
        if name[-1] in "05" and name not in first:
            first.add(name)
            return True
        return False

    async def run() -> list[tuple[str, ...]]:
        return await play(make_controller(fleet, records, teachers=Speakers(fails)))

    trained = {name for step in asyncio.run(run()) for name in step}
    untaught = {record["draw"] for record in records if record.get("reason") == "untaught"}
    assert untaught and not any(int(name.rsplit(".", 1)[1]) in untaught for name in trained)


def test_the_wait_for_a_step_names_the_teacher() -> None:
    class Silent(Speakers):
        async def speak(self, group: Group) -> Word:
            await asyncio.sleep(3600)
            raise AssertionError

    fleet = ScriptedFleet(first_is_right)

    async def run() -> None:
        controller = make_controller(fleet, [], teachers=Silent(), step_deadline_seconds=0.2)
        await controller.begin(0, "weights")
        await controller.next_batch(0)

    with pytest.raises(InfraError, match=r"slot 0 .* groups wait for the teacher's word"):
        asyncio.run(run())


class Counted:
    """A fleet and teachers of which only the books are kept."""

    def __init__(self) -> None:
        self.done, self.seconds = 0, 0.0

    def resize(self, num_workers: int) -> None:
        raise AssertionError

    def use(self) -> FleetUse:
        return FleetUse(2, 1.0 * self.done, self.done, 0.0)


class CountedTeachers:
    def __init__(self, fleet: Counted) -> None:
        self._fleet = fleet

    def use(self) -> TeacherUse:
        return TeacherUse(2, 3.0 * self._fleet.done, self._fleet.done)


def test_the_teachers_pace_is_measured_and_counts_in_the_prediction() -> None:
    """10 rollouts a step: learner 0.5, fleet 1 / 2, teachers 3 / 2 seconds a sample."""
    fleet = Counted()
    balance = Balance(fleet, FleetSection(), overlaps=True, teachers=CountedTeachers(fleet))
    for _ in range(4):
        fleet.done += 10
        gauges = balance.turn(5.0, 10)
    assert gauges["teacher_seconds_per_sample"] == 3.0 and gauges["teachers"] == 2
    assert gauges["predicted_seconds"] == 10 * 1.5


def test_teachers_without_room_are_refused_with_the_table_before_ray_starts(tmp_path: Path) -> None:
    section = RolloutDistillSection(num_teachers=4096)
    with (
        pytest.raises(PlacementError, match="they want 4097 processors") as caught,
        cluster(tmp_path, FleetSection(), EngineSection(), tmp_path, distill=section),
    ):
        pass
    assert "teachers         4096" in caught.value.why


def workers(count: int, bundle: dict[str, float]) -> Places:
    return Places("rollout workers", count, bundle)


def test_on_machines_of_a_cluster_teachers_and_workers_share_the_room() -> None:
    """A GPU each: 2 machines of 1 GPU seat a teacher and a worker, but not two workers as well."""
    nodes = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 4.0, "GPU": 1.0}]
    device = {"CPU": 1.0, "GPU": 1.0}
    teachers = [Places("teachers", 1, device)]
    require_places(workers(1, device), nodes, where="", fix="", besides=teachers)
    with pytest.raises(PlacementError, match="they want 3 places, there are 2"):
        require_places(workers(2, device), nodes, where="", fix="", besides=teachers)
    four = [Places("teachers", 4, {"CPU": 1.0})]
    require_places(workers(8, {"CPU": 0.5}), nodes, where="", fix="", besides=four)
    with pytest.raises(PlacementError, match="they want 13 places, there are 12"):
        require_places(workers(9, {"CPU": 0.5}), nodes, where="", fix="", besides=four)


@pytest.mark.slow
def test_a_run_with_a_teacher_in_a_process_of_its_own_that_is_killed(
    tmp_path: Path, tiny_model: Path
) -> None:
    """Real processes. The teacher is replaced; every step has its term, every group its word."""
    teacher = make_tiny_model(tmp_path / "teacher", seed=5, initializer_range=0.3)
    distill = {"k": 8, "weighting": "aligned"}
    with nothing_left(Run(tmp_path, tiny_model, teacher=teacher, rl={"distill": distill})) as run:
        run.wait_for_step(3)
        (victim,) = run.below("ray::TeacherWorker")
        victim.kill()
        output = run.finish()
        assert run.process.returncode == 0, output
        summary = run.check_finished()
        assert str(summary["teacher"]).startswith("teacher@")
        assert [event["role"] for event in run.events("restart")].count("teacher 0") == 1
        steps = [r for r in read_metrics(run.stage / "metrics.jsonl") if "loss" in r]
        assert len(steps) == STEPS and all(float(str(r["teacher_kl"])) > 0 for r in steps)
        assert float(str(steps[-1]["teacher_seconds_per_sample"])) > 0
        rows = [
            row
            for path in sorted((run.stage / "groups").glob("*.parquet"))
            for row in pq.read_table(path).to_pylist()
        ]
        words = {row["id"]: outcome_of(row).word for row in rows if row["state"] == "trained"}
        assert all(word and len(word.rows) == 4 for word in words.values())
        assert len({word.identity for word in words.values() if word}) == 1
