"""The learner's loop, its publications and its reasons to stop, without processes."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rl_doubles import ANSWERS, make_ensemble, make_group, make_learner, make_plan
from safetensors.torch import load_file
from torch import Tensor

import rl.loop
from ground.checkpoints import Checkpoints
from ground.errors import DivergedError, InfraError
from ground.signals import Pending
from ground.storage import verify_directory
from rl.buffer import Outcome, Plan
from rl.config import RlSection, ValidationSection
from rl.consumed import Consumed
from rl.job import Job, Report
from rl.learn import keep_batch
from rl.learner import Learner
from rl.loop import LearnerLoop
from rl.publisher import Best, Publisher
from rl.snapshot import Snapshot, read_books, read_snapshot, write_cut
from rl.source import Draw
from rl.versions import Versions


def never() -> bool:
    return False


class FakeLoop:
    """A controller that has every plan at once, and scores by the script."""

    def __init__(self, scores: Mapping[int, float] | None = None, fail_at: int = -1) -> None:
        self.published: list[int] = []
        self._scores, self._fail_at = scores or {}, fail_at
        self.stop_at = 99
        self.pending = Pending()

    def next_batch(
        self, step: int, stop: Callable[[], bool], step_seconds: float
    ) -> tuple[Plan, dict[str, float]] | None:
        if step == self.stop_at:
            self.pending.number = 15
        return None if stop() else (make_plan(make_group(step), step=step), {"buffered": 1.0})

    def publish(self, version: int, weights: Mapping[str, Tensor], evaluate: bool) -> float | None:
        if version == self._fail_at:
            raise InfraError("hand-over failed")
        self.published.append(version)
        return self._scores.get(version, 0.5) if evaluate else None

    def evaluate(self, version: int) -> float | None:
        return self._scores.get(version, 0.5)

    def leave(self) -> None:
        raise AssertionError("nobody asked to end")

    def state(self) -> dict[str, object]:
        return {"version": self.published[-1] if self.published else 0}


def make_publisher(loop: FakeLoop, directory: Path, told: list[tuple[int, float]]) -> Publisher:
    return Publisher(
        loop,
        Checkpoints(directory, keep=2),
        Checkpoints(directory / "best", keep=1),
        Versions(directory / "digests.jsonl", "digest"),
        Versions(directory / "validation.jsonl", "pass_rate"),
        lambda version, score: told.append((version, score)),
    )


def run_loop(
    model: Path,
    loop: FakeLoop,
    directory: Path,
    start: int = 0,
    keep_batch: Callable[[Plan], None] = lambda plan: None,
) -> tuple[int, list[Report], Publisher]:
    told: list[Report] = []
    publisher = make_publisher(loop, directory, [])
    learner_loop = make_loop(model, loop, publisher, directory, told, keep_batch)
    version = learner_loop.run(start, loop.pending)
    return version, [report for report in told if report.kind == "step"], publisher


def make_loop(
    model: Path,
    loop: FakeLoop,
    publisher: Publisher,
    directory: Path,
    told: list[Report],
    keep_batch: Callable[[Plan], None] = lambda plan: None,
) -> LearnerLoop:
    section = RlSection(
        steps=4,
        groups_per_step=1,
        checkpoint_every=3,
        max_empty_steps=1,  # with a staleness of 1 three in a row end the run
        validation=ValidationSection(evaluate_every=2),
    )
    learner = make_learner(model)
    return LearnerLoop(
        make_ensemble(learner),
        loop,
        publisher,
        Consumed(directory / "groups"),
        section,
        tell=told.append,
        keep_batch=keep_batch,
        pack=lambda version, trained: learner.model_tensors(),
    )


def test_75_the_rollouts_of_a_poisoned_step_are_kept_to_be_looked_at(tmp_path: Path) -> None:
    job = Job(
        section=RlSection(steps=4),
        seed=0,
        run_name="toy",
        incarnation=0,
        model=tmp_path,
        directory=tmp_path,
        log_directory=tmp_path,
    )
    keep_batch(job, make_plan(make_group(0), step=7))
    assert verify_directory(tmp_path / "diverged").facts["step"] == 7
    kept = load_file(tmp_path / "diverged" / "batch.safetensors")
    trained = kept["tokens"][kept["loss_mask"]].tolist()
    assert sorted(trained) == sorted(token for tokens, _ in ANSWERS for token in tokens)
    assert kept["advantages"][kept["loss_mask"]].unique().tolist() == [-0.5, 0.5]


def test_a_cut_keeps_what_the_guards_have_counted(tiny_model: Path, tmp_path: Path) -> None:
    _, _, publisher = run_loop(tiny_model, FakeLoop(), tmp_path)
    before = make_loop(tiny_model, FakeLoop(), publisher, tmp_path, [])
    before.load_guards({"braked_steps": 3, "no_signal": {"empty_steps": 2, "reasons": {"x": 9}}})
    snapshot = Snapshot(4, {"w": torch.zeros(1)}, {}, before.guards())
    write_cut(tmp_path, snapshot, {})
    after = make_loop(tiny_model, FakeLoop(), publisher, tmp_path, [])
    assert after.guards()["braked_steps"] == 0
    after.load_guards(read_snapshot(tmp_path, 4).guards)
    assert after.guards() == before.guards()


def test_a_replay_tells_which_versions_are_not_made_again_bit_for_bit(
    tiny_model: Path, tmp_path: Path
) -> None:
    run_loop(tiny_model, FakeLoop(), tmp_path)
    log = tmp_path / "digests.jsonl"
    digests = [json.loads(line) for line in log.read_text().splitlines()]
    assert [each["version"] for each in digests] == [1, 2, 3, 4]
    assert len({each["digest"] for each in digests}) == 4
    digests[2]["digest"] = digests[1]["digest"]
    log.write_text("".join(json.dumps(each) + "\n" for each in digests[:3]))
    told: list[Report] = []
    publisher = make_publisher(FakeLoop(), tmp_path, [])
    make_loop(tiny_model, FakeLoop(), publisher, tmp_path, told).repeat(0)
    steps = [report.numbers["replay_differs"] for report in told if report.kind == "step"]
    assert steps == [0.0, 0.0, 1.0, 0.0]
    told.clear()
    publisher = make_publisher(FakeLoop(), tmp_path, [])
    make_loop(tiny_model, FakeLoop(), publisher, tmp_path, told).repeat(0)
    steps = [report.numbers["replay_differs"] for report in told if report.kind == "step"]
    assert steps == [0.0] * 4, "the file now has those that were made again"


def test_every_version_is_published_and_the_last_is_saved_and_judged(
    tiny_model: Path, tmp_path: Path
) -> None:
    loop = FakeLoop({2: 0.7, 4: 0.6})
    version, told, publisher = run_loop(tiny_model, loop, tmp_path)
    assert (version, loop.published) == (4, [1, 2, 3, 4])
    assert [report.step for report in told] == [1, 2, 3, 4]
    assert told[0].numbers["kept_share"] == 1.0
    assert told[0].numbers["buffered"] == 1.0
    assert [path.name for path in Checkpoints(tmp_path).steps()] == ["step_000003", "step_000004"]
    assert publisher.best == Best(2, 0.7)


class Watch:
    """A clock that goes forward when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now


def test_a_step_tells_how_its_time_was_spent(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """3 s for the groups, 5 s for the step, 2 s for the copy: the learner idles in half of it."""
    watch, spent = Watch(), list[float]()
    monkeypatch.setattr(rl.loop, "time", watch)

    class Slow(FakeLoop):
        def next_batch(
            self, step: int, stop: Callable[[], bool], step_seconds: float
        ) -> tuple[Plan, dict[str, float]] | None:
            watch.now += 3
            spent.append(step_seconds)
            return super().next_batch(step, stop, step_seconds)

    step = Learner.step

    def slow_step(learner: Learner, plan: Plan) -> dict[str, float]:
        watch.now += 5
        return step(learner, plan)

    def pack(version: int, trained: object) -> dict[str, Tensor]:
        watch.now += 2
        return {}

    monkeypatch.setattr(Learner, "step", slow_step)
    told: list[Report] = []
    publisher = make_publisher(Slow(), tmp_path, [])
    loop = make_loop(tiny_model, Slow(), publisher, tmp_path, told)
    monkeypatch.setattr(loop, "_pack", pack)
    loop._one_step(0, Pending())
    publisher.finish(never)
    [report] = [report for report in told if report.kind == "step"]
    numbers = report.numbers
    assert (numbers["seconds"], numbers["step_seconds"], numbers["pack_seconds"]) == (10, 5, 2)
    assert numbers["learner_idle_share"] == 0.5
    assert numbers["tokens_per_second"] == numbers["trained_tokens"] / 10 == 1.2
    assert (report.started, report.ended) == (103.0, 108.0)
    loop._next_plan(1, Pending())
    assert spent == [0.0, 5.0]  # the copy, the publication and the wait are not the learner's work


def test_what_became_of_a_steps_draws_by_hand() -> None:
    """2 of 16 draws are kept."""
    filtered = {"all-0": 3, "all-1": 1, "flat": 1, "late": 1, "refused": 1, "misversioned": 2}
    filtered |= {"untaught": 1, "broken": 4}
    plan = replace(make_plan(make_group(0), make_group(1)), filtered=filtered)
    assert rl.loop._of_plan(plan) == pytest.approx(
        {
            "reward": 0.5,
            "pass_rate": 0.5,
            "rollouts": 8,
            "survey_rollouts": 0,
            "groups": 2,
            "kept_share": 2 / 16,
            "flat_share": 5 / 16,
            "all_0_share": 3 / 16,
            "all_1_share": 1 / 16,
            "late_share": 1 / 16,
            "refused_share": 1 / 16,
            "misversioned_share": 2 / 16,
            "untaught_share": 1 / 16,
            "broken_share": 4 / 16,
        }
    )


def test_compliance_is_told_by_constraint_over_all_answers_of_a_step() -> None:
    """Two of three answers kept theirs; the group that was filtered counts too."""
    kept, broken = {"compliance:bullets": 1.0}, {"compliance:bullets": 0.0, "task": 1.0}
    outcomes = []
    for number, (parts, reason) in enumerate([(kept, ""), (broken, "flat"), (kept, "late")]):
        group = make_group(number)
        answers = (replace(group.rollouts[0], reward_parts=parts),)
        draw = Draw(number, number, 0, 0, group.prompt, False)
        outcomes.append(Outcome(draw, reason, None, replace(group, rollouts=answers)))
    numbers = rl.loop._of_plan(replace(make_plan(make_group(0)), outcomes=tuple(outcomes)))
    told = {name: value for name, value in numbers.items() if name.startswith("compliance")}
    assert told == {"compliance": 2 / 3, "compliance/bullets": 2 / 3}


def test_a_stop_saves_the_version_it_has_and_trains_no_further(
    tiny_model: Path, tmp_path: Path
) -> None:
    loop = FakeLoop()
    loop.stop_at = 2
    version, told, _ = run_loop(tiny_model, loop, tmp_path)
    assert (version, len(told)) == (2, 2)
    latest = Checkpoints(tmp_path).latest()
    assert latest is not None
    assert latest.name == "step_000002"
    assert read_books(latest) == {"version": 2}


class NobodyLeft(FakeLoop):
    """No worker takes a version any more; the order to end comes once a step's plan was given.

    Args:
        version: whose publication nobody answers, before `leave`.
        ends_at: the step.
    """

    def __init__(self, version: int, ends_at: int) -> None:
        super().__init__()
        self._version, self._ends_at = version, ends_at
        self._left = threading.Event()

    def next_batch(
        self, step: int, stop: Callable[[], bool], step_seconds: float
    ) -> tuple[Plan, dict[str, float]] | None:
        found = super().next_batch(step, stop, step_seconds)
        if step == self._ends_at:
            self.pending.number = 15
        return found

    def publish(self, version: int, weights: Mapping[str, Tensor], evaluate: bool) -> float | None:
        score = super().publish(version, weights, evaluate)
        if version < self._version:
            return score
        assert self._left.wait(60)
        return None

    def leave(self) -> None:
        self._left.set()


def test_41_a_run_that_is_asked_to_end_saves_although_no_worker_is_left(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Version 1 has no look due: the cut is of the newest one."""
    version, _, _ = run_loop(tiny_model, NobodyLeft(1, ends_at=0), tmp_path)
    latest = Checkpoints(tmp_path).latest()
    assert version == 1 and latest is not None and latest.name == "step_000001"
    assert read_books(latest) == {"version": 1}


def test_41_a_look_that_nobody_can_make_any_more_is_made_after_a_restart(
    tiny_model: Path, tmp_path: Path
) -> None:
    """Version 2 is owed its look when 3 is made, whose cut is due: a restart must come by 2."""
    version, _, publisher = run_loop(tiny_model, NobodyLeft(2, ends_at=2), tmp_path)
    assert version == 3 and publisher.best is None and publisher.owes_look(2)
    assert Checkpoints(tmp_path).steps() == []
    again, told = FakeLoop(), list[Report]()
    publisher = make_publisher(again, tmp_path, [])
    loop = make_loop(tiny_model, again, publisher, tmp_path, told)
    version, _ = loop.repeat(0)
    assert version == 2
    loop.catch_up(0, version)
    assert loop.run(version, Pending()) == 4
    assert not publisher.owes_look(2) and publisher.best == Best(4, 0.5)


def test_41_the_version_that_is_owed_its_look_is_saved_itself(
    tiny_model: Path, tmp_path: Path
) -> None:
    run_loop(tiny_model, NobodyLeft(2, ends_at=1), tmp_path)
    assert [path.name for path in Checkpoints(tmp_path).steps()] == ["step_000002"]


def test_75_a_batch_that_diverges_is_kept_aside_and_not_counted_as_consumed(
    tiny_model: Path, tmp_path: Path
) -> None:
    class Poisoned(FakeLoop):
        def next_batch(
            self, step: int, stop: Callable[[], bool], step_seconds: float
        ) -> tuple[Plan, dict[str, float]] | None:
            logprob = float("nan") if step == 1 else -2.0
            return make_plan(make_group(step, logprob=logprob), step=step), {}

    kept: list[int] = []
    with pytest.raises(DivergedError, match="finite"):
        run_loop(tiny_model, Poisoned(), tmp_path, keep_batch=lambda plan: kept.append(plan.step))
    assert kept == [1]
    assert [path.name for path in Consumed(tmp_path / "groups").files()] == ["step_000001.parquet"]


def test_of_two_equal_scores_the_later_wins_and_a_restart_remembers_it(tmp_path: Path) -> None:
    told: list[tuple[int, float]] = []
    publisher = make_publisher(FakeLoop({1: 0.5, 2: 0.5, 3: 0.4}), tmp_path, told)
    for version in (1, 2, 3):
        snapshot = Snapshot(version, {"w": torch.full((2,), float(version))}, {})
        publisher.publish(snapshot, evaluate=True, save=False, stop=never)
    publisher.finish(never)
    assert told == [(1, 0.5), (2, 0.5), (3, 0.4)]
    again = make_publisher(FakeLoop(), tmp_path, [])
    assert again.best == Best(2, 0.5)
    weights = again.best_weights()
    assert weights is not None
    assert weights["w"].tolist() == [2.0, 2.0]


def test_what_fails_in_the_background_fails_the_next_call(tmp_path: Path) -> None:
    publisher = make_publisher(FakeLoop(fail_at=1), tmp_path, [])
    snapshot = Snapshot(1, {"w": torch.zeros(1)}, {})
    publisher.publish(snapshot, evaluate=False, save=True, stop=never)
    with pytest.raises(InfraError, match="hand-over failed"):
        publisher.publish(snapshot, evaluate=False, save=False, stop=never)
    assert Checkpoints(tmp_path).steps() == []


def test_77_a_run_without_signal_asks_its_last_step_again_when_it_is_resumed(
    tiny_model: Path, tmp_path: Path
) -> None:
    class Flat(FakeLoop):
        def next_batch(
            self, step: int, stop: Callable[[], bool], step_seconds: float
        ) -> tuple[Plan, dict[str, float]] | None:
            return Plan(step, (), {"all-1": 2}, rollouts=8, reward=1.0, pass_rate=1.0), {}

    with pytest.raises(DivergedError, match="in 3 steps must teach"):
        run_loop(tiny_model, Flat(), tmp_path)
    journaled = [path.name for path in Consumed(tmp_path / "groups").files()]
    assert journaled == ["step_000001.parquet", "step_000002.parquet"]


def test_the_best_of_versions_that_are_made_again_is_forgotten(tmp_path: Path) -> None:
    told: list[tuple[int, float]] = []
    publisher = make_publisher(FakeLoop({2: 0.4, 4: 0.9}), tmp_path, told)
    for version in (2, 4):
        snapshot = Snapshot(version, {"w": torch.full((1,), float(version))}, {})
        publisher.publish(snapshot, evaluate=True, save=False, stop=never)
    publisher.finish(never)
    assert publisher.best == Best(4, 0.9)
    publisher.forget_after(4)
    assert publisher.best == Best(4, 0.9)
    publisher.forget_after(3)
    assert publisher.best is None and publisher.best_weights() is None
    assert publisher.owes_look(4) and not publisher.owes_look(2)
