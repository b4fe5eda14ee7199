"""Judges as a fleet behind the fleet: verdicts added, losses mended, nothing taken for a zero."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fleet_doubles import is_running

from ground.config import JudgeSettings
from ground.constraints import Constraint
from ground.errors import DataError, InfraError, WorkersLostError
from ground.faults import Faults
from ground.records import Group, Message, Prompt, Rollout, Segment, Span
from ground.strikes import kill9
from rl.cluster import Others, need_of
from rl.config import LearnerSection
from rollout.compliance import Demand
from rollout.config import EngineSection, FleetSection, SamplingSection
from rollout.fleet import Event, Fleet
from rollout.judge_canaries import JudgeError, Sung
from rollout.judge_fleet import JUDGES, JudgedFleet, Unjudged, as_judge_event
from rollout.judge_source import JudgeSource
from rollout.judge_worker import JudgeConfig, JudgedGroup, JudgeTask, JudgeWorker
from rollout.places import PlacementError, Places, require_places, require_room
from rollout.reward_pool import ScoredText
from rollout.simulation import run_virtual
from rollout.task import GroupResult, GroupTask, Loaded, Pong

HERD = Path(__file__).parents[1] / "recipes" / "tiny" / "herd"
PARIS = Prompt.make((Message("user", "Capital?"),), capability="c", reward="judge", answer="Paris")
TEXTS = ("It is Paris", "Rome", "hm")
SEGMENT = Segment("policy", (5, 2), (-0.1, -0.2), (Span(3, 2),))
SECTION = FleetSection(
    num_workers=2, max_restarts=1, max_attempts=2, backoff_seconds=0.01, spare=False
)
JUDGE = JudgeSettings(read="likelihood", max_length=256, max_answer_tokens=100, canary_every=1)
UNJUDGED = ScoredText(0.0, False, error="unjudged: …")
VERDICTS = (ScoredText(0.9, True, {"judge": 0.9}), ScoredText(0.1, False), UNJUDGED)


def make_task(prompt: Prompt = PARIS, demand: Demand | None = None, name: str = "g") -> GroupTask:
    system = "Be brief." if demand else ""
    return GroupTask(name, prompt, system, SamplingSection(), (1, 2, 3), demand)


class Sampler:
    """Rollout workers that always say the same."""

    def __init__(self, *texts: str) -> None:
        self.published: list[int] = []
        self._texts = texts or TEXTS

    async def publish(self, version: int, weights: object) -> None:
        self.published.append(version)

    async def rollout(self, task: GroupTask) -> Group:
        rollouts = tuple(Rollout(n, (SEGMENT,), text) for n, text in enumerate(self._texts))
        return Group(task.id, task.prompt, (1,), rollouts)


class ScriptedReplica:
    """A judge that gives the same verdicts, or fails as it is told."""

    node = "here"
    is_placed = True

    def __init__(self, script: Script) -> None:
        self.script = script

    async def prepare(self) -> None:
        return

    async def open(self, index: int, slots_share: float = 1.0) -> None:
        return

    async def ping(self) -> Pong:
        return Pong()

    async def load(self, version: int, weights: object) -> Loaded:
        return Loaded(version, {}, 0.0)

    async def rollout(self, task: GroupTask, attempt: int) -> GroupResult:
        assert isinstance(task, JudgeTask)
        self.script.asked.append((task.id, attempt))
        if self.script.failures:
            raise self.script.failures.pop(0)
        await asyncio.sleep(self.script.seconds)
        group = task.group
        judged = JudgedGroup(
            group.id, group.prompt, group.prompt_ids, group.rollouts, group.system,
            self.script.verdicts, self.script.canaries,
        )  # fmt: skip
        return GroupResult(judged, 0.0, 0.0, 0.0, 0, attempt)

    def kill(self) -> None:
        return

    async def close(self) -> None:
        return


class Script:
    """What all replicas do."""

    def __init__(
        self,
        verdicts: tuple[ScoredText, ...] = VERDICTS,
        failures: tuple[Exception, ...] = (),
        canaries: tuple[Sung, ...] = (),
        seconds: float = 0.0,
    ) -> None:
        self.seconds = seconds
        self.verdicts, self.failures, self.canaries = verdicts, list(failures), canaries
        self.asked: list[tuple[str, int]] = []

    def __call__(self) -> ScriptedReplica:
        return ScriptedReplica(self)


def with_judges(script: Script, scenario: Any) -> Any:
    """Run a coroutine function with a fleet of scripted judges behind a sampler."""

    async def main() -> Any:
        sampler = Sampler()
        judges = Fleet(SECTION, script, crew=JUDGES)
        fleet = JudgedFleet(sampler, judges, JudgeSettings(max_unjudged=0.5))
        await fleet.start()
        try:
            return await scenario(fleet, sampler)
        finally:
            await fleet.close()

    return run_virtual(main())


def rolled(task: GroupTask) -> Any:
    async def scenario(fleet: JudgedFleet, sampler: Sampler) -> Group:
        return await fleet.rollout(task)

    return scenario


def test_a_group_comes_back_with_its_verdicts_and_without_what_is_unjudged() -> None:
    group = with_judges(Script(), rolled(make_task()))
    assert [(r.index, r.reward, r.passed, r.error) for r in group.rollouts] == [
        (0, 0.9, True, ""),
        (1, 0.1, False, ""),
    ]
    assert type(group) is Group and group.oldest_version == 3
    assert group.rollouts[0].reward_parts == {"judge": 0.9}


def test_what_other_rewards_have_scored_no_judge_is_asked() -> None:
    script = Script()
    exact = replace(PARIS, reward="exact")
    group = with_judges(script, rolled(make_task(exact)))
    assert len(group.rollouts) == 3 and not script.asked


def test_compliance_is_blended_in_after_the_judge() -> None:
    """Share .2: .8 · .9 + .2 for two words at most; "It is Paris" has three."""
    demand = Demand(Constraint("max_words", 2), share=0.2)
    group = with_judges(Script(), rolled(make_task(demand=demand)))
    assert group.rollouts[0].reward == pytest.approx(0.72) and group.rollouts[0].passed
    assert group.rollouts[1].reward == pytest.approx(0.8 * 0.1 + 0.2)


def test_a_verdict_that_is_lost_with_a_replica_comes_from_another() -> None:
    script = Script(failures=(InfraError("gone"),))
    group = with_judges(script, rolled(make_task()))
    assert script.asked == [("g", 0), ("g", 1)] and group.rollouts[0].reward == 0.9


def test_verdicts_lost_for_good_are_an_infrastructure_failure_and_no_zero() -> None:
    script = Script(failures=(InfraError("gone"), InfraError("gone too")))
    with pytest.raises(InfraError, match="must be done in 2 attempts"):
        with_judges(script, rolled(make_task()))


def test_a_judge_that_says_nothing_in_time_is_lost_and_gives_no_zero() -> None:
    script = Script(seconds=SECTION.rollout_deadline_seconds + 1)
    with pytest.raises(InfraError, match=r"must be done in 2 attempts.*") as lost:
        with_judges(script, rolled(make_task()))
    assert "judge 0: group g must be done within 300 s" in lost.value.why


def test_a_group_without_a_verdict_is_broken_and_not_hard() -> None:
    with pytest.raises(Unjudged, match="must have verdicts, it has none"):
        with_judges(Script(verdicts=(UNJUDGED,) * 3), rolled(make_task()))
    assert issubclass(Unjudged, InfraError)  # which the controller calls broken: no observation


def test_canaries_of_all_groups_are_counted_together() -> None:
    async def scenario(fleet: JudgedFleet, sampler: Sampler) -> None:
        for number in range(9):
            await fleet.rollout(make_task(replace(PARIS, id=str(number))))
        gauges = fleet.gauges()
        assert gauges["judge_false_positives"] == 1.0
        assert gauges["judge_unjudged"] == pytest.approx(1 / 3)
        assert "judge_seconds_per_sample" in gauges
        assert "judge_seconds_per_sample" not in fleet.gauges()  # nothing since
        with pytest.raises(JudgeError, match="10 of the last 10"):
            await fleet.rollout(make_task(replace(PARIS, id="tenth")))

    with_judges(Script(canaries=(Sung("order", False, True),)), scenario)


def test_weights_go_to_the_rollout_workers_alone() -> None:
    async def scenario(fleet: JudgedFleet, sampler: Sampler) -> None:
        await fleet.publish(4, "weights")
        assert sampler.published == [4]

    with_judges(Script(), scenario)


def test_judges_that_keep_dying_end_the_run_by_their_own_name() -> None:
    class Dying(ScriptedReplica):
        async def open(self, index: int, slots_share: float = 1.0) -> None:
            raise InfraError("no memory")

    async def main() -> None:
        fleet = JudgedFleet(Sampler(), Fleet(SECTION, lambda: Dying(Script()), crew=JUDGES), JUDGE)
        try:
            with pytest.raises(WorkersLostError, match=r"of 2 judges must live.*1 restarts"):
                await fleet.start()
        finally:
            await fleet.close()

    run_virtual(main())


def test_a_judged_group_is_an_event_of_its_own_kind() -> None:
    assert as_judge_event({"kind": "rollout", "role": "judge 0"})["kind"] == "judge"
    assert as_judge_event({"kind": "lost", "role": "judge 0"})["kind"] == "lost"


def test_judges_want_room_beside_workers_and_ranks() -> None:
    source = JudgeSource(
        settings=JUDGE.model_copy(update={"replicas": 2, "cpus_per_replica": 1.5}),
        model=HERD / "teacher",
        seed=0,
    )
    fleet, others = FleetSection(num_workers=2), Others(None, source)
    need = need_of(fleet, EngineSection(), LearnerSection(), others, HERD / "student")
    assert sum(want.count for want in need.processors) == 5.0
    with pytest.raises(PlacementError, match=r"want 5 processors, there are 4.9") as refused:
        require_room(need.processors, 4.9, "processors", where=need.where, fix=need.fix)
    assert "judges" in refused.value.why and "judge: replicas x" in refused.value.why


def test_a_cluster_must_hold_workers_and_judges_at_once() -> None:
    nodes = [{"CPU": 4.0, "GPU": 2.0}]
    device = {"CPU": 1.0, "GPU": 1.0}
    judges = Places("judges", 1, device)
    workers = Places("rollout workers", 1, device)
    require_places(workers, nodes, where="", fix="", besides=[judges])
    with pytest.raises(PlacementError, match="want 3 places, there are 2"):
        require_places(workers, nodes, where="", fix="", besides=[replace(judges, count=2)])
    with pytest.raises(PlacementError, match="want 4 places, there are 2"):
        require_places(workers, nodes, where="", fix="", besides=[replace(judges, count=3)])


def test_a_judge_without_a_model_says_where_it_looked(tmp_path: Path) -> None:
    source = JudgeSource(settings=JUDGE, model=tmp_path / "none", seed=0)
    config = JudgeConfig.of(source, incarnation=0, lease_seconds=60.0)
    worker = JudgeWorker(config, luggage=None)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=f"none at {tmp_path / 'none'}"):
        asyncio.run(worker.open(0))


@pytest.mark.slow
def test_a_replica_killed_while_it_judges_costs_a_restart_and_no_verdict(
    tmp_path: Path, armed: Callable[[Faults], Faults]
) -> None:
    """A real process with the herd's teacher, ended by SIGKILL while it has its second group."""
    from rollout.ray_worker import RayWorker

    plan = armed(Faults(tmp_path).at("judge/0", "judge.score", 2).do(kill9))
    source = JudgeSource(settings=JUDGE, model=HERD / "teacher", seed=0)
    config = JudgeConfig.of(source, incarnation=0, lease_seconds=120.0)
    born: list[RayWorker] = []
    events: list[Event] = []
    sums = (Message("user", "State the final answer to the following arithmetic problem: 4 + 5 ="),)
    prompt = Prompt.make(sums, capability="c", reward="judge", answer="9")

    def spawn() -> RayWorker:
        born.append(RayWorker(config, JudgeWorker))
        return born[-1]

    async def main() -> list[Group]:
        judges = Fleet(config.fleet, spawn, lambda e: events.append(as_judge_event(e)), crew=JUDGES)
        fleet = JudgedFleet(Sampler("4;+5=9=>9", "4;+5=9=>8", ":"), judges, JUDGE)
        try:
            async with asyncio.timeout(300):
                await fleet.start()
                asked = [make_task(prompt, name=f"g{n}") for n in range(4)]
                assert [(each.name, each.state) for each in fleet.stats()] == [
                    ("judge 0", "healthy")
                ]
                return await asyncio.gather(*map(fleet.rollout, asked))
        finally:
            await fleet.close()

    groups = asyncio.run(main())
    assert [firing.pid for firing in plan.fired()] == [born[0].pid]
    assert [event["role"] for event in events if event["kind"] == "lost"] == ["judge 0"]
    assert len(born) == 2 and any(event["attempt"] for event in events if event["kind"] == "judge")
    assert len({group.rewards for group in groups}) == 1  # whichever life has judged it
    right, wrong, nothing = groups[0].rollouts
    assert right.passed and not wrong.passed and right.reward > 0.9 > 0.1 > wrong.reward
    assert nothing.reward_parts == {"refused:wordless": 1.0}
    assert not [worker.pid for worker in born if worker.pid and is_running(worker.pid)]
