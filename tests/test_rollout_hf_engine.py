"""The transformers engine samples what the model says: bits, log-probs, distribution, weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from conftest import make_tiny_model
from scipy.stats import chisquare
from transformers import (
    GenerationConfig,
    Llama4ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from ground.errors import DataError, DivergedError, InfraError, PacktrainError
from ground.model import load_model, tensors_of
from rollout.engine import Request, generate
from rollout.hf_engine import HfEngine
from rollout.hf_slots import sample

MAX_LENGTH = 96


def _dense(directory: Path) -> Path:
    """A Llama whose query heads share keys (4 to 2) and whose LM head is tied."""
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=264,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="module", params=["dense", "llama4"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dense Llama, or Llama 4: MoE, chunks of 8 tokens, a NoPE layer tempered from position 4."""
    directory = tmp_path_factory.mktemp(request.param)
    if request.param == "dense":
        return _dense(directory)
    return make_tiny_model(
        directory, attention_chunk_size=8, floor_scale=4, attn_scale=0.7, initializer_range=0.3
    )


def _engine(path: Path, num_slots: int = 8) -> HfEngine:
    return HfEngine(load_model(path), num_slots=num_slots, max_length=MAX_LENGTH, pad_id=0)


@pytest.fixture(scope="module")
def engine(path: Path) -> Iterator[HfEngine]:
    engine = _engine(path)
    yield engine
    engine.close()


def _requests(count: int) -> list[Request]:
    """Groups of 4 on prompts of 1 to 60 tokens, of many lengths and three temperatures."""
    rng = np.random.default_rng(0)
    prompts = [tuple(rng.integers(0, 256, rng.integers(1, 60)).tolist()) for _ in range(count)]
    return [
        Request(f"r{n}", prompts[n // 4], 1 + n * 7 % 36, (1.0, 0.6, 0.0)[n % 3], n, (2, 9))
        for n in range(count)
    ]


def _forward(model: PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()


def test_bits_do_not_depend_on_company_order_or_slot(path: Path, engine: HfEngine) -> None:
    requests = _requests(48)
    company = generate(engine, requests, timeout_seconds=120)
    backwards = generate(engine, requests[::-1], timeout_seconds=120)[::-1]
    alone = [generate(engine, [request], timeout_seconds=60)[0] for request in requests[::5]]
    other = _engine(path)
    elsewhere = generate(other, requests[7:30], timeout_seconds=120)
    other.close()

    assert backwards == company
    assert alone == company[::5]
    assert elsewhere == company[7:30]


def test_logprobs_are_those_of_a_plain_forward_pass(path: Path, engine: HfEngine) -> None:
    model = load_model(path)
    requests = _requests(24)
    for request, completion in zip(
        requests, generate(engine, requests, timeout_seconds=120), strict=True
    ):
        ids = completion.segment.token_ids
        logits = _forward(model, request.prompt_ids + ids)[len(request.prompt_ids) - 1 : -1]
        wanted = torch.log_softmax(logits / (request.temperature or 1.0), -1)
        wanted = wanted[torch.arange(len(ids)), torch.tensor(ids)]
        assert completion.segment.logprobs == pytest.approx(wanted.tolist(), abs=1e-4)


def test_greedy_is_what_transformers_generates(path: Path, engine: HfEngine) -> None:
    model = load_model(path)
    assert isinstance(model, LlamaForCausalLM | Llama4ForCausalLM)
    model.generation_config = GenerationConfig(do_sample=False, max_new_tokens=40)
    for length in (1, 7, 20, 40):
        prompt = tuple(range(30, 30 + length))
        request = Request("greedy", prompt, 40, 0.0, 0, ())
        [completion] = generate(engine, [request], timeout_seconds=60)
        wanted = model.generate(torch.tensor([prompt]))  # pyright: ignore[reportAttributeAccessIssue]
        assert isinstance(wanted, torch.Tensor)
        assert list(completion.segment.token_ids) == wanted[0, length:].tolist()


def test_equal_seeds_are_equal_and_different_seeds_differ(engine: HfEngine) -> None:
    requests = [Request(str(n), (40, 41), 12, 1.0, n // 2, ()) for n in range(40)]
    completions = generate(engine, requests, timeout_seconds=60)
    tokens = [completion.segment.token_ids for completion in completions]
    assert tokens[::2] == tokens[1::2]
    assert len(set(tokens)) == 20


def test_sampled_tokens_follow_the_softmax() -> None:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config).eval()
    engine = HfEngine(_copy(model), num_slots=64, max_length=32, pad_id=0)
    requests = [Request(str(n), (3, 1), 2, 0.8, n, ()) for n in range(4000)]
    completions = generate(engine, requests, timeout_seconds=120)
    engine.close()

    firsts, seconds = zip(
        *(completion.segment.token_ids for completion in completions), strict=True
    )
    likeliest = int(np.bincount(firsts).argmax())
    after = [second for first, second in zip(firsts, seconds, strict=True) if first == likeliest]
    assert _fit(firsts, _forward(model, (3, 1))[-1] / 0.8) > 0.01
    assert _fit(after, _forward(model, (3, 1, likeliest))[-1] / 0.8) > 0.01
    assert _fit(firsts, _forward(model, (3, 1))[-1]) < 1e-6


def _fit(drawn: Sequence[int], logits: torch.Tensor) -> float:
    """p value of tokens under softmax(logits)."""
    expected = len(drawn) * torch.softmax(logits.double(), -1).numpy()
    assert expected.min() > 5
    return float(chisquare(np.bincount(drawn, minlength=len(expected)), expected).pvalue)


def _copy(model: LlamaForCausalLM) -> LlamaForCausalLM:
    copy = LlamaForCausalLM(model.config)
    copy.load_state_dict(model.state_dict())
    return copy


def test_sample_inverts_the_distribution_function() -> None:
    """Probabilities 0.2, 0, 0.5, 0.3 → borders at 0.2, 0.2, 0.7, 1."""
    logits = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).log().repeat(6, 1)
    numbers = torch.tensor([0.0, 0.19, 0.21, 0.69, 0.71, 1 - 2.0**-52], dtype=torch.float64)
    tokens, logprobs = sample(logits, torch.ones(6), numbers)
    assert tokens.tolist() == [0, 0, 2, 2, 3, 3]
    assert logprobs.exp().tolist() == pytest.approx([0.2, 0.2, 0.5, 0.5, 0.3, 0.3])

    impossible_first = torch.tensor([[float("-inf"), 0.0]])
    tokens, _ = sample(impossible_first, torch.ones(1), numbers[:1])
    assert tokens.tolist() == [1]

    tokens, logprobs = sample(
        logits, torch.full((6,), 0.5), numbers, torch.tensor([True] + [False] * 5)
    )
    assert tokens.tolist() == [2, 2, 2, 2, 2, 3]
    assert logprobs[1].exp().item() == pytest.approx(0.25 / 0.38)


def test_new_weights_are_used_from_the_next_token_on(path: Path, tmp_path: Path) -> None:
    """After a swap a new request gets the bits of an engine that was born with those weights."""
    changed = load_model(path)
    with torch.no_grad():
        for parameter in changed.parameters():
            parameter.mul_(0.9)
    request = Request("a", (70, 71, 72), 20, 1.0, 5, ())
    born = HfEngine(changed, num_slots=8, max_length=MAX_LENGTH, pad_id=0)
    [wanted] = generate(born, [request], timeout_seconds=60)
    born.close()

    swapped = _engine(path)
    [before] = generate(swapped, [request], timeout_seconds=60)
    swapped.load(1, tensors_of(changed))
    [after] = generate(swapped, [request], timeout_seconds=60)
    swapped.load(2, path)
    [back] = generate(swapped, [request], timeout_seconds=60)
    swapped.close()

    assert after.segment.logprobs == wanted.segment.logprobs != before.segment.logprobs
    assert back.segment.logprobs == before.segment.logprobs
    assert back.segment.versions[0].version == 2


def test_tokens_before_a_swap_are_those_of_the_old_weights(path: Path) -> None:
    old = load_model(path)
    engine = HfEngine(load_model(path), num_slots=8, max_length=256, pad_id=0)
    noisy = tensors_of(old)
    for tensor in noisy.values():
        tensor.mul_(0.8)
    # Long enough to be still under way, however late this thread learns that the short one is done.
    long = engine.submit(Request("long", (50, 51), 240, 1.0, 1, ()))
    engine.submit(Request("short", (50,), 8, 1.0, 1, ())).result(60)
    engine.load(1, noisy)
    segment = long.result(60).segment
    engine.close()

    swapped_at = segment.versions[0].length
    assert 7 <= swapped_at < 240
    logits = _forward(old, (50, 51, *segment.token_ids))[1:-1]
    wanted = torch.log_softmax(logits, -1)[torch.arange(240), torch.tensor(segment.token_ids)]
    error = (wanted - torch.tensor(segment.logprobs)).abs()
    assert error[:swapped_at].max() < 1e-4
    assert error[swapped_at] > 1e-4


def test_unfit_weights_are_refused_and_nothing_changes(path: Path, engine: HfEngine) -> None:
    request = Request("a", (70, 71, 72), 20, 1.0, 5, ())
    [before] = generate(engine, [request], timeout_seconds=60)
    good = tensors_of(load_model(path))
    name = "model.layers.1.self_attn.q_proj.weight"
    nan = good[name].clone()
    nan[3, 3] = float("nan")
    for broken, words in (
        ({key: value for key, value in good.items() if key != name}, f"1 are missing: {name}"),
        ({**good, "model.q": good[name]}, r"1 are unknown: model\.q"),
        ({**good, name: good[name][:-1]}, "another shape or dtype: .*q_proj"),
        ({**good, name: good[name].half()}, "float32.* got .*float16"),
        ({**good, name: nan}, f"1 are not finite: {name}"),
    ):
        changed = {
            key: value + 1 if key == "model.norm.weight" else value for key, value in broken.items()
        }
        with pytest.raises(DataError, match=words):
            engine.load(9, changed)
    [after] = generate(engine, [request], timeout_seconds=60)
    assert (engine.version, after) == (0, before)


def test_tied_weights_must_agree(tmp_path: Path) -> None:
    model = load_model(_dense(tmp_path))
    engine = _engine(tmp_path)
    both = dict(model.state_dict())
    engine.load(1, both)
    with pytest.raises(DataError, match="tied to another but different"):
        engine.load(2, {**both, "lm_head.weight": both["lm_head.weight"] + 1})
    assert engine.version == 1
    engine.close()


def test_scores_are_a_plain_forward_pass_at_temperature_one(path: Path, engine: HfEngine) -> None:
    model = load_model(path)
    rng = np.random.default_rng(1)
    rows = [tuple(rng.integers(0, 256, size).tolist()) for size in (2, 40, 9, 96, 33, 5, 64, 31, 3)]
    for row, score in zip(rows, engine.score(rows, top_k=3), strict=True):
        wanted = torch.log_softmax(_forward(model, row), -1)[:-1]
        given = wanted[torch.arange(len(row) - 1), torch.tensor(row[1:])]
        assert score.logprobs == pytest.approx(given.tolist(), abs=1e-4)
        top = wanted.topk(3)
        assert [list(ids) for ids in score.top_ids] == top.indices.tolist()
        for got, expected in zip(score.top_logprobs, top.values.tolist(), strict=True):
            assert got == pytest.approx(expected, abs=1e-4)


def test_a_sequence_that_cannot_be_scored_is_named(engine: HfEngine) -> None:
    with pytest.raises(DataError, match=r"sequence 1: .*2…96 tokens, got 97"):
        engine.score([(1, 2), (1,) * 97])
    with pytest.raises(DataError, match=r"sequence 0: .*2…96 tokens, got 1"):
        engine.score([(1,)])
    with pytest.raises(DataError, match="0…263"):
        engine.score([(1, 264)])


def test_bad_logits_fail_their_request_alone(path: Path) -> None:
    """Token 77's embedding is infinite: whoever has it fails, nobody else sees a changed bit."""
    healthy = [Request(f"h{n}", (60, 90 + n), 12, 1.0, n, (77,)) for n in range(24)]
    engine = _engine(path)
    before = generate(engine, healthy, timeout_seconds=60)
    engine.close()
    model = load_model(path)
    with torch.no_grad():
        cast(torch.nn.Embedding, model.get_input_embeddings()).weight[77] = float("inf")
    if model.config.tie_word_embeddings:
        pytest.skip("with a tied LM head every row's logits are infinite")
    engine = HfEngine(model, num_slots=8, max_length=MAX_LENGTH, pad_id=0)
    futures = [engine.submit(request) for request in healthy[:12]]
    sick = [engine.submit(Request(f"s{n}", (60, 77) * 8, 12, 1.0, n, ())) for n in range(3)]
    futures += [engine.submit(request) for request in healthy[12:]]

    assert [future.result(60) for future in futures] == before
    for future in sick:
        with pytest.raises(DivergedError, match="logits must be finite"):
            future.result(60)
    engine.close()


def test_death_of_the_decode_thread_is_told_to_everyone(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = _engine(path)

    def crash(*args: object) -> None:
        raise RuntimeError("kernel says no")

    monkeypatch.setattr(engine._model, "decode", crash)
    futures = [engine.submit(Request(str(n), (5,), 4, 1.0, n, ())) for n in range(12)]
    for future in futures:
        with pytest.raises(PacktrainError, match="decoding failed: RuntimeError: kernel says no"):
            future.result(60)
    with pytest.raises(PacktrainError, match="kernel says no"):
        engine.submit(Request("late", (5,), 4, 1.0, 0, ()))
    with pytest.raises(PacktrainError, match="kernel says no"):
        engine.score([(1, 2)])
    engine.abort(["0"])
    engine.close()


def test_who_waits_for_a_slot_is_told(path: Path) -> None:
    engine = _engine(path)
    engine.pause()
    requests = [Request(str(n), (5,), 4, 1.0, 0, ()) for n in range(20)]
    futures = [engine.submit(request) for request in requests]
    assert engine.waiting() == {request.id for request in requests}
    engine.resume()
    for future in futures:
        future.result(60)
    assert engine.waiting() == frozenset()
    engine.close()


def test_close_fails_what_is_in_flight(path: Path) -> None:
    engine = _engine(path)
    future = engine.submit(Request("a", (5,), 90, 1.0, 0, ()))
    waiting = [engine.submit(Request(str(n), (5,), 90, 1.0, 0, ())) for n in range(20)]
    engine.close()
    engine.close()
    for each in (future, *waiting[-2:]):
        with pytest.raises(InfraError, match="closed"):
            each.result(60)


def test_shapes_that_the_model_cannot_have_are_refused(path: Path) -> None:
    positions = load_model(path).config.max_position_embeddings
    with pytest.raises(DataError, match=f"at most the model's {positions} positions"):
        HfEngine(load_model(path), num_slots=4, max_length=positions + 1, pad_id=0)
