"""Several engines as one: who gets what, what comes of it when one is lost, and the same bytes."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager
from pathlib import Path

import pytest
from rl_runs import MORE, wait_until, write_project

from benchmarks.processes import EARLY
from ground.errors import DataError, InfraError, PacktrainError, SetupError, WorkersLostError
from ground.faults import Faults
from ground.records import Segment
from ground.strikes import kill9, raise_
from rollout.bundle import need_of
from rollout.cluster import cluster, patiently
from rollout.config import EngineSection, EnginesSection
from rollout.engine import Completion, PromptTooLong, Request, Scores
from rollout.engine_worker import UnseenModelError
from rollout.places import PlacementError
from rollout.preflight import ClusterStartError
from rollout.replicas import Replicas, running, told_of
from rollout.seat import WorkerDiedError
from rollout.task import Loaded, Pong

SLOTS, LENGTH = 16, 64


def request(number: int, tokens: int = 4) -> Request:
    return Request(f"r{number}", (1, 5), tokens, 1.0, seed=number, stop_ids=(2,))


def completion(asked: Request) -> Completion:
    return Completion(asked.id, Segment("policy", (asked.seed % 50, 2), (-0.5, -0.25)), "stop")


class Scripted:
    """An engine whose tokens follow from the seed; `faults` are what happens at each asking: an
    error, or None for an answer that never comes."""

    node, is_placed = "here", True

    def __init__(
        self, faults: list[PacktrainError | None], asked: list[int], gate: asyncio.Event
    ) -> None:
        self._faults, self.asked, self._gate = faults, asked, gate
        self._is_dead = False

    async def prepare(self) -> None: ...

    async def open(self, index: int, slots_share: float = 1.0) -> None: ...

    async def ping(self) -> Pong:
        if self._is_dead:
            raise WorkerDiedError("gone")
        return Pong()

    async def load(self, version: int, weights: object) -> Loaded:
        return Loaded(version, {}, 0.0)

    async def sample(self, requests: Sequence[Request]) -> list[Completion]:
        self.asked.append(len(requests))
        await self._gate.wait()
        await self._fail()
        return [completion(each) for each in requests]

    async def score(self, token_ids: Sequence[Sequence[int]], top_k: int) -> list[Scores]:
        self.asked.append(len(token_ids))
        await self._fail()
        return [Scores(tuple(float(-token) for token in ids[1:])) for ids in token_ids]

    def kill(self) -> None:
        self._is_dead = True

    async def close(self) -> None: ...

    async def _fail(self) -> None:
        if not self._faults:
            return
        fault = self._faults.pop(0)
        if fault is None:
            await asyncio.Event().wait()
        else:
            self._is_dead = isinstance(fault, WorkerDiedError)
            raise fault


@contextmanager
def engines(
    *faults: PacktrainError | None, replicas: int = 2, is_open: bool = True, seconds: float = 60.0
) -> Iterator[tuple[Replicas, list[int], asyncio.Event]]:
    """Engines that are up, the sizes of what they are asked, and what lets them answer."""
    loop, asked, gate = asyncio.new_event_loop(), list[int](), asyncio.Event()
    section = EnginesSection(
        engine=EngineSection(num_slots=SLOTS, max_length=LENGTH),
        replicas=replicas,
        answer_deadline_seconds=seconds,
    )
    left = list(faults)
    if is_open:
        gate.set()
    found = Replicas(
        section, lambda: Scripted(left, asked, gate), loop, where="mine", vocabulary=64
    )
    with running(loop):
        asyncio.run_coroutine_threadsafe(found.start(), loop).result(30)
        try:
            yield found, asked, gate
        finally:
            asyncio.run_coroutine_threadsafe(found.close(), loop).result(30)


def test_answers_come_to_their_requests_whoever_gives_them() -> None:
    with engines() as (both, asked, _):
        futures = [both.submit(request(number)) for number in range(100)]
        assert [f.result(30) for f in futures] == [completion(request(n)) for n in range(100)]
        assert sum(asked) == 100


def test_bundles_fill_an_eighth_of_the_slots_and_shrink_to_the_end() -> None:
    """Of 36: an eighth of 16 slots is 2, and two engines four times over want an eighth of what is
    left, which is less than 2 once no more than 8 are."""
    futures: list[Future[Completion]] = []
    with engines() as (both, asked, _):

        def submit() -> None:
            futures.extend(both.submit(request(number)) for number in range(36))

        both._loop.call_soon_threadsafe(submit)  # all at once, as the loop sees it
        wait_until(lambda: sum(asked) == 36, 30, "36 requests with engines")
    assert asked == [2] * 14 + [1] * 8


def test_what_a_lost_engine_had_begun_another_one_answers() -> None:
    with engines(WorkerDiedError("killed"), InfraError("late")) as (both, asked, _):
        futures = [both.submit(request(number)) for number in range(40)]
        assert [f.result(30) for f in futures] == [completion(request(n)) for n in range(40)]
        assert sum(asked) > 40


def test_what_is_wrong_with_a_request_is_told_at_once_and_costs_nobody() -> None:
    with engines() as (both, asked, _):
        with pytest.raises(PromptTooLong, match="must fit max_length 64, got 2 \\+ 63"):
            both.submit(request(1, tokens=63))
        with pytest.raises(DataError, match=r"token ids must lie in 0…63"):
            both.score([[1, 64]])
        assert not asked


def test_an_engine_that_answers_pings_and_nothing_else_is_replaced() -> None:
    with engines(None, replicas=1, seconds=0.2) as (one, asked, _):
        assert one.submit(request(1)).result(30) == completion(request(1))
        assert asked == [1, 1]


def test_when_no_engine_is_left_whoever_waits_is_told() -> None:
    faults = [WorkerDiedError("killed") for _ in range(2000)]
    with engines(*faults, replicas=1) as (one, _, _):
        futures = [one.submit(request(number)) for number in range(200)]
        for future in futures:
            with pytest.raises(WorkersLostError, match="engines"):
                future.result(60)
        with pytest.raises(WorkersLostError, match="engines"):
            one.score([[1, 2]])


def test_a_bundle_of_which_a_part_is_aborted_goes_on_for_the_rest() -> None:
    with engines(replicas=1, is_open=False) as (one, asked, gate):
        futures = [one.submit(request(number)) for number in range(20)]
        wait_until(lambda: sum(asked) == 20, 30, "all requests with the engine")
        one.abort([f"r{number}" for number in range(20) if number % 2])
        one._loop.call_soon_threadsafe(gate.set)
        for number in range(0, 20, 2):
            assert futures[number].result(30) == completion(request(number))
        assert all(future.cancelled() for future in futures[1::2])


def test_aborted_requests_are_forgotten_wherever_they_are() -> None:
    with engines(is_open=False) as (both, asked, gate):
        futures = [both.submit(request(number)) for number in range(400)]
        wait_until(lambda: len(asked) >= 16, 30, "all that engines have in hand")
        both.abort([f"r{number}" for number in range(400)])
        both._loop.call_soon_threadsafe(gate.set)
        for future in futures:
            with pytest.raises(CancelledError):
                future.result(30)
        assert both.submit(request(7)).result(30) == completion(request(7))


def test_scores_come_in_the_order_of_the_sequences() -> None:
    ids = [[1, number % 64] for number in range(30)]
    with engines(WorkerDiedError("killed")) as (both, asked, _):
        found = both.score(ids)
        assert both.score([]) == []
    assert [each.logprobs[0] for each in found] == [-float(n % 64) for n in range(30)]
    assert sorted(asked) == [2] + 8 * [4]  # the first asking was in vain


def test_a_machine_that_does_not_see_the_model_is_the_end_only_when_none_is_left() -> None:
    error = UnseenModelError("the model must be readable", where="mine", fix="share the folder")
    assert told_of(error, {"a"}, ["a", "b"]) is error
    end = told_of(error, {"a", "gone"}, ["a"])
    assert isinstance(end, DataError) and (end.what, end.fix) == (error.what, error.fix)


def test_ray_is_tried_again_once_what_the_last_try_left_is_swept() -> None:
    told: list[object] = []

    @contextmanager
    def enter(fails: int) -> Iterator[str]:
        told.append("try")
        if told.count("try") <= fails:
            raise ClusterStartError("Ray must come up", where="Ray", why="busy")
        yield "10.0.0.7:6379"

    with patiently(lambda: enter(1), lambda: told.append("sweep"), told.append) as address:
        assert (address, told) == ("10.0.0.7:6379", ["try", "sweep", 2.0, "try"])
    told.clear()
    with (
        pytest.raises(SetupError, match="Ray must come up, it failed 5 times in a row"),
        patiently(lambda: enter(5), lambda: told.append("sweep"), told.append),
    ):
        pass
    assert told.count("try") == 5 and told[-1] == "try"


def test_engines_without_room_are_refused_with_the_table_before_ray_starts(tmp_path: Path) -> None:
    section = EnginesSection(replicas=4096)
    with (
        pytest.raises(PlacementError, match="they want 4096 processors") as caught,
        cluster(tmp_path, need_of(section, "mine")),
    ):
        pass
    assert "mine: replicas x cpus_per_replica" in caught.value.why
    assert "lower mine.replicas" in caught.value.fix


def test_machines_must_have_room_for_all_engines_at_once() -> None:
    """Two machines of 3 processors hold two engines of 2, whatever their sum."""
    section, nodes = EnginesSection(replicas=2, cpus_per_replica=2), [{"CPU": 3.0}, {"CPU": 3.0}]
    need_of(section, "mine").check(nodes)
    with pytest.raises(PlacementError, match="they want 3 places, there are 2"):
        need_of(section.model_copy(update={"replicas": 3}), "mine").check(nodes)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stage_with_engines_of_which_one_is_killed_writes_the_same_bytes(
    tmp_path: Path, tiny_model: Path
) -> None:
    """Real processes: mine alone, then with two engines, one of which dies in the middle."""
    alone = mined(tmp_path / "alone", tiny_model, 0, None)
    faults = Faults(tmp_path).at("engine/1", "engine.sample", nth=2).do(kill9)
    assert mined(tmp_path / "two", tiny_model, 2, faults) == alone
    log = "".join(path.read_text() for path in (tmp_path / "two" / "run" / "log").glob("*.log"))
    assert "engine 1 is lost (1 in a row)" in log


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("judge", "point"),
    [
        pytest.param({"kind": "ifd"}, "engine.score", id="scores"),
        pytest.param(
            {"kind": "solve_rate", "samples": 2, "max_new_tokens": 16},
            "engine.sample",
            id="samples",
        ),
    ],
)
def test_a_judge_with_engines_of_which_one_is_killed_prunes_the_same_rows(
    tmp_path: Path, tiny_model: Path, judge: dict[str, object], point: str
) -> None:
    """Real processes; the other engine fails once as it opens."""
    alone = pruned(tmp_path / "alone", tiny_model, 0, None, judge)
    faults = Faults(tmp_path).at("engine/0", "engine.open").do(raise_("InfraError"))
    faults = faults.at("engine/1", point, nth=2).do(kill9)
    assert pruned(tmp_path / "two", tiny_model, 2, faults, judge) == alone
    log = "".join(path.read_text() for path in (tmp_path / "two" / "run" / "log").glob("*.log"))
    assert "engine 0 is lost (1 in a row)" in log and "engine 1 is lost (1 in a row)" in log


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_evaluation_with_engines_of_which_one_is_killed_finds_the_same(
    tmp_path: Path, tiny_model: Path
) -> None:
    """Samples and greedy answers."""
    alone = evaluated(tmp_path / "alone", tiny_model, 0, None)
    faults = Faults(tmp_path).at("engine/1", "engine.sample", nth=2).do(kill9)
    assert evaluated(tmp_path / "two", tiny_model, 2, faults) == alone
    [log] = (tmp_path / "two" / "run" / "log").glob("*.log")
    assert "engine 1 is lost (1 in a row)" in log.read_text()


def evaluated(folder: Path, model: Path, replicas: int, faults: Faults | None) -> bytes:
    """What `evaluate` finds out of each prompt."""
    folder.mkdir()
    write_project(folder, model)
    recipe = json.loads((folder / "recipe.yaml").read_text())
    (folder / "prompts.jsonl").rename(folder / "heldout.jsonl")
    recipe["data"] = {"heldout": "heldout.jsonl"}
    del recipe["rl"]
    recipe["evaluate"] = {
        **{"samples": 4, "k": [1], "max_new_tokens": 24, "greedy": True, "replicas": replicas},
        **{"engine": {"num_slots": 16, "max_length": 128}, "cpus_per_replica": 0.5},
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    made = "base/evaluation/prompts.parquet"
    return stage(folder, "rollout.evaluate", faults, made, "--of", "base")


def pruned(
    folder: Path,
    model: Path,
    replicas: int,
    faults: Faults | None,
    judge: dict[str, object],
) -> bytes:
    """The rows that `prune` keeps."""
    folder.mkdir()
    rows = [
        {
            "messages": [
                {"role": "user", "content": f"count to {number}"},
                {"role": "assistant", "content": " ".join(map(str, range(1 + number % 17)))},
            ],
            **{"capability": "count", "reward": "first", "answer": "any"},
        }
        for number in range(300)
    ]
    (folder / "rewards.py").write_text(EARLY + MORE)
    (folder / "sft.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "name": "toy",
        "model": {"path": str(model)},
        "teacher": {"path": str(model)},
        "data": {"sft": "sft.jsonl"},
        "rewards": ["rewards.py"],
        "prune": {
            "judge": {**judge, "max_unjudged": 1.0, "min_canaries": 0.0},
            "engine": {"num_slots": 16, "max_length": 128},
            "replicas": replicas,
            "cpus_per_replica": 0.5,
        },
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return stage(folder, "curation.prune", faults, "prune/kept.parquet")


def mined(folder: Path, model: Path, replicas: int, faults: Faults | None) -> bytes:
    """The rows that `mine` writes."""
    folder.mkdir()
    write_project(folder, model)
    recipe = json.loads((folder / "recipe.yaml").read_text())
    engine = {"num_slots": 16, "max_length": 128}
    sampled = {"samples": 6, "k": [1], "max_new_tokens": 24, "pilot": 3}
    recipe["mine"] = {**sampled, "engine": engine, "replicas": replicas, "cpus_per_replica": 0.5}
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    return stage(folder, "curation.mine", faults, "mine/prompts.parquet")


def stage(folder: Path, module: str, faults: Faults | None, made: str, *more: str) -> bytes:
    """What a stage writes, by a process of its own that leaves nothing behind."""
    place = folder / "tmp"
    place.mkdir()
    line = [sys.executable, "-m", module, str(folder / "recipe.yaml"), *more]
    done = subprocess.run(
        [*line, "--run", str(folder / "run")],
        env=os.environ
        | {"OMP_NUM_THREADS": "1", "TMPDIR": str(place)}
        | (faults.environment() if faults else {}),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list((folder / "run" / "log").glob("*.processes.json"))
    return (folder / "run" / made).read_bytes()
