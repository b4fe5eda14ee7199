"""The contract of every engine: what a caller may rely on, whichever engine it got.

Sampling itself (bits, distribution, log-probs) is in test_rollout_hf_engine.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from typing import Any

import numpy as np
import pytest
from conftest import make_tiny_llama, make_tiny_model

from ground.errors import DataError, InfraError
from ground.model import load_model, tensors_of
from ground.records import Segment, Span
from rollout.config import EngineSection
from rollout.engine import Completion, Engine, Request, completed, generate, spans_of
from rollout.engines import open_engine
from rollout.fake_engine import FakeEngine
from rollout.seeds import sample_seed, uniforms

MAX_LENGTH = 512
Weights = Callable[[], dict]


def _request(name: str, *, tokens: int = 6, stop: tuple[int, ...] = (), seed: int = 0) -> Request:
    return Request(name, (5, 6, 7), tokens, 1.0, seed, stop)


@pytest.fixture(
    scope="module",
    params=[
        "fake",
        "dense",
        "llama4",
        "vllm-llama4",
        pytest.param("vllm-dense", marks=pytest.mark.slow),
    ],
)
def opened(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Engine, Weights]]:
    """An engine, and a way to make weights that it will load."""
    if request.param == "fake":
        engine: Engine = FakeEngine(
            lambda request: range(10, 10 + request.max_new_tokens),
            seconds=lambda request: 0.003 * request.max_new_tokens,
            max_length=MAX_LENGTH,
            vocabulary=264,
        )
        yield engine, dict
        engine.close()
        return
    folder = tmp_path_factory.mktemp("model")
    if request.param == "vllm-dense":
        path = make_tiny_llama(folder)
    else:
        path = make_tiny_model(folder, **SHAPES[request.param])
    kind = "vllm" if request.param.startswith("vllm") else "hf"
    section = EngineSection(kind=kind, num_slots=8, max_length=MAX_LENGTH)
    engine, _ = open_engine(path, section)
    yield engine, lambda: tensors_of(load_model(path))
    engine.close()


SHAPES: dict[str, dict[str, Any]] = {
    "dense": {"moe_layers": [], "no_rope_layers": [1, 1, 1, 1]},
    "llama4": {"attention_chunk_size": 8, "floor_scale": 4},
    "vllm-llama4": {"attention_chunk_size": 128, "floor_scale": 4, "head_dim": 32},
}
"""vLLM asks for heads of 32 and chunks of 128 at least."""


@pytest.fixture
def engine(opened: tuple[Engine, Weights]) -> Engine:
    return opened[0]


def test_completions_come_in_the_order_of_the_requests(engine: Engine) -> None:
    requests = [_request(str(n), tokens=1 + n % 5, seed=n) for n in range(20)]
    seen: list[tuple[int, int]] = []

    completions = generate(
        engine, requests, timeout_seconds=60, progress=lambda *counts: seen.append(counts)
    )

    assert [completion.id for completion in completions] == [str(n) for n in range(20)]
    assert [len(c.segment.token_ids) for c in completions] == [1 + n % 5 for n in range(20)]
    assert {completion.finish for completion in completions} == {"length"}
    assert seen[0] == (1, 20) and seen[-1] == (20, 20)


def test_stop_id_ends_a_completion_and_is_its_last_token(engine: Engine) -> None:
    [free] = generate(engine, [_request("free", tokens=8)], timeout_seconds=60)
    stop = free.segment.token_ids[3]
    first = free.segment.token_ids.index(stop)

    [stopped] = generate(
        engine, [_request("stopped", tokens=8, stop=(1, stop))], timeout_seconds=60
    )

    assert stopped.finish == "stop"
    assert stopped.segment.token_ids == free.segment.token_ids[: first + 1]
    assert len(stopped.segment.logprobs) == first + 1


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (Request("a", (5,) * 500, 13, 1.0, 0, ()), "512, got 500 \\+ 13 = 513"),
        (Request("a", (), 4, 1.0, 0, ()), "at least one token"),
        (Request("a", (5,), 0, 1.0, 0, ()), "max_new_tokens must be at least 1, got 0"),
        (Request("a", (5, 264), 4, 1.0, 0, ()), "0…263, got 264"),
        (Request("a", (5, -1), 4, 1.0, 0, ()), "0…263, got -1"),
        (Request("a", (5,), 4, -0.1, 0, ()), "temperature .* got -0.1"),
        (Request("a", (5,), 4, float("nan"), 0, ()), "temperature .* got nan"),
    ],
)
def test_impossible_request_is_refused_at_once(
    engine: Engine, request_: Request, words: str
) -> None:
    with pytest.raises(DataError, match=words):
        engine.submit(request_)


def test_two_requests_in_flight_must_not_share_an_id(engine: Engine) -> None:
    first = engine.submit(_request("twin", tokens=100))
    with pytest.raises(DataError, match="must differ"):
        engine.submit(_request("twin"))
    engine.abort(["twin"])
    assert first.result(60).finish == "aborted"


def _when_running(engine: Engine) -> Future[Completion]:
    """A long request of which at least five tokens have been sampled."""
    long = engine.submit(_request("long", tokens=500))
    engine.submit(_request("short", tokens=5)).result(60)
    return long


def test_abort_keeps_the_tokens_so_far(engine: Engine) -> None:
    long = _when_running(engine)
    engine.abort(["long", "unknown"])
    completion = long.result(60)

    assert completion.finish == "aborted"
    assert 4 <= len(completion.segment.token_ids) < 500
    assert len(completion.segment.logprobs) == len(completion.segment.token_ids)


def test_paused_engine_samples_nothing_and_loses_nothing(engine: Engine) -> None:
    long = _when_running(engine)
    engine.pause()
    other = engine.submit(_request("other", tokens=2))
    with pytest.raises(FutureTimeoutError):
        other.result(0.2)
    engine.resume()
    assert len(other.result(60).segment.token_ids) == 2
    assert len(long.result(60).segment.token_ids) == 500


def test_weights_swap_in_flight_and_each_token_carries_its_version(
    opened: tuple[Engine, Weights],
) -> None:
    engine, weights = opened
    before = engine.version
    fresh = weights()
    long = _when_running(engine)
    engine.load(before + 7, fresh)
    assert engine.version == before + 7
    completion = long.result(60)

    old, new = completion.segment.versions
    assert (old.version, new.version) == (before, before + 7)
    assert old.length >= 4 and new.length >= 1 and old.length + new.length == 500
    [after] = generate(engine, [_request("after", tokens=3)], timeout_seconds=60)
    assert after.segment.versions == (Span(before + 7, 3),)


def test_generate_has_a_deadline_and_leaves_nothing_running(engine: Engine) -> None:
    requests = [_request(str(n), tokens=500) for n in range(64)]
    with pytest.raises(InfraError, match=r"within 0\.05 s, 0 of 64"):
        generate(engine, requests, timeout_seconds=0.05)
    # An id that is still in flight would be refused.
    again = [_request(str(n), tokens=1) for n in range(64)]
    assert len(generate(engine, again, timeout_seconds=60)) == 64


def test_score_gives_one_logprob_for_each_token_after_the_first(engine: Engine) -> None:
    scores = engine.score([(5, 6, 7), (5, 6)], top_k=1)
    assert [len(score.logprobs) for score in scores] == [2, 1]
    assert [len(score.top_ids) for score in scores] == [2, 1]
    assert engine.score([(5, 6)])[0].top_ids == ()


def test_closed_engine_fails_what_is_in_flight_and_refuses_more() -> None:
    engine = FakeEngine(lambda request: (1, 2), seconds=lambda request: 60.0)
    future = engine.submit(_request("a"))
    engine.close()
    engine.close()
    with pytest.raises(InfraError, match="closed"):
        future.result(60)
    with pytest.raises(InfraError, match="closed"):
        engine.submit(_request("b"))


def test_spans_are_the_run_lengths_of_versions() -> None:
    assert spans_of([3, 3, 4, 3]) == (Span(3, 2), Span(4, 1), Span(3, 1))
    assert spans_of([]) == ()


def test_sample_seeds_are_pinned_and_differ_in_every_part() -> None:
    """The number is part of what makes a run repeatable: changing it changes every rollout."""
    assert sample_seed(0, "9c1f", 0, 3) == 9092642360481920172
    parts = [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1)]
    parts += [(0, "a", "0", 0)]
    assert len({sample_seed(*part) for part in parts}) == 6


def test_uniforms_are_splitmix64_and_uniform() -> None:
    """Reference: splitmix64's first output for state 0 is 0xE220A8397B1DCDAF (Vigna's code)."""
    counters = np.arange(100_000, dtype=np.uint64)
    numbers = uniforms(np.full(100_000, 7, dtype=np.uint64), counters)
    assert numbers.min() >= 0 and numbers.max() < 1
    assert abs(numbers.mean() - 0.5) < 0.005
    assert np.histogram(numbers, 10, (0, 1))[0].min() > 9_600
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.01
    neighbours = uniforms(np.arange(100_000, dtype=np.uint64), np.zeros(100_000, dtype=np.uint64))
    assert abs(np.corrcoef(neighbours[:-1], neighbours[1:])[0, 1]) < 0.01


def test_futures_that_belong_together_wake_their_waiter_once_and_keep_their_order() -> None:
    wakes: list[object] = []

    async def wait(futures: list[Future[Completion]]) -> list[Completion]:
        loop = asyncio.get_running_loop()
        plain = loop.call_soon_threadsafe

        def counted(callback: Callable[[], object]) -> object:
            wakes.append(callback)
            return plain(callback)

        loop.call_soon_threadsafe = counted  # pyright: ignore[reportAttributeAccessIssue]
        waiter = asyncio.create_task(completed(futures))
        await asyncio.sleep(0)
        for number in (2, 0, 1):
            futures[number].set_result(Completion(str(number), Segment("policy", (), ()), "stop"))
        return await waiter

    found = asyncio.run(wait([Future() for _ in range(3)]))
    assert [each.id for each in found] == ["0", "1", "2"] and len(wakes) == 1
    assert asyncio.run(completed([])) == []


def test_of_futures_that_belong_together_one_that_fails_fails_them() -> None:
    unended, bad = Future[Completion](), Future[Completion]()
    bad.set_exception(InfraError("the engine is dead"))
    with pytest.raises(InfraError, match="the engine is dead"):
        asyncio.run(completed([unended, bad]))
