"""The parity gate sees each way of having other weights, and lets the right ones pass."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import make_tiny_model
from rl_doubles import make_group
from torch import Tensor
from weight_doubles import Post

from benchmarks.parity_faults import damages
from ground.errors import DataError, InfraError, ParityError
from ground.logprobs import model_logprobs
from ground.model import live_tensors, load_model, tensors_of
from rl.prober import Expert, Prober
from rollout.engine import Lent, Request
from rollout.fake_engine import FakeEngine
from rollout.gate import Gate
from rollout.hf_engine import HfEngine
from rollout.hf_weights import swap_weights
from rollout.parity import Drift, drift_of, is_within, prove, wrong_tensors
from rollout.weights import Probe, Probes

pytestmark = pytest.mark.usefixtures("ray_local")


class Handed:
    """A tiny model, one optimizer step from version 1 to version 2, and an engine that has it."""

    def __init__(self, path: Path, learning_rate: float) -> None:
        self.model = load_model(path)
        self.before = tensors_of(self.model)
        _step(self.model, learning_rate)
        self.now = tensors_of(self.model)
        self.engine = HfEngine(load_model(path), num_slots=8, max_length=128, pad_id=0, version=-1)
        self.post = Post()
        self.gate = Gate(self.engine, self.post.inbox)
        prober = Prober(self.model, max_length=128, seed=0)
        self.published = self.post.publish(2, live_tensors(self.model), prober.measure)

    def inject(self, weights: dict[str, Tensor]) -> None:
        """As if the loader had left these."""
        swap_weights(self.engine._model._model, weights)
        self.engine._model._head_fp32_VH = self.engine._model._head.float()


def _step(model: torch.nn.Module, learning_rate: float) -> None:
    """As large a change as one step of AdamW."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            signs = torch.randint(0, 2, parameter.shape, generator=generator) * 2 - 1
            parameter.add_(signs * learning_rate)


@pytest.fixture(scope="module")
def handed(tiny_model: Path, ray_local: None) -> Iterator[Handed]:
    handed = Handed(tiny_model, learning_rate=1e-5)
    yield handed
    handed.engine.close()


@pytest.mark.parametrize("fault", damages({"experts.down_proj": torch.empty(0)}))
def test_82_each_fault_is_seen_in_the_bytes_and_by_probes_alone(handed: Handed, fault: str) -> None:
    loaded = handed.gate.load(2, handed.published)
    assert loaded.version == 2 and loaded.drift <= handed.published.probes.typical
    damaged = damages(handed.now)[fault](handed.now, handed.before)
    handed.inject(damaged)
    wrong = wrong_tensors(handed.engine, handed.published.checksums)
    assert sorted(wrong) == [
        name for name in sorted(handed.now) if not torch.equal(damaged[name], handed.now[name])
    ]
    with pytest.raises(ParityError, match=rf"{len(wrong)} of .* tensors are others: .*off by"):
        prove(handed.engine, handed.published, handed.now)
    drift = drift_of(handed.engine, handed.published.probes)
    assert drift and not is_within(drift, handed.published.probes), drift
    with pytest.raises(ParityError, match=rf"token {drift.token} of probe {drift.row} must have"):
        prove(handed.engine, replace(handed.published, checksums={}), None)


def test_the_worst_tensor_is_named_first_with_its_error(handed: Handed) -> None:
    damaged = dict(handed.now)
    for name, error in (("model.norm.weight", 0.25), ("model.layers.0.input_layernorm.weight", 1)):
        damaged[name] = handed.now[name] + error
    handed.inject(damaged)
    with pytest.raises(
        ParityError,
        match=r"2 of 45 tensors are others: model.layers.0.input_layernorm.weight \(off by 1\), "
        r"model.norm.weight \(off by 0.25\)",
    ):
        prove(handed.engine, handed.published, handed.now)


def test_a_fault_keeps_the_engine_from_sampling(handed: Handed) -> None:
    handed.gate.load(2, handed.published)
    wrong = replace(handed.published, checksums={**handed.published.checksums, "x.weight": "00"})
    with pytest.raises(ParityError, match=r"x\.weight \(off by inf\)"):
        handed.gate.load(2, wrong)
    future = handed.engine.submit(Request("a", (5, 6), 3, 1.0, 0, ()))
    with pytest.raises(TimeoutError):
        future.result(0.3)
    handed.gate.load(2, handed.published)  # admitted again, it goes on
    assert len(future.result(10).segment.token_ids) == 3


def test_82_a_nan_that_came_in_on_the_way_is_the_workers_affair_and_not_the_runs(
    handed: Handed, monkeypatch: pytest.MonkeyPatch
) -> None:
    handed.gate.load(2, handed.published)

    def damaged(point: str, given: Lent) -> dict[str, Tensor]:
        return {**given, "model.norm.weight": given["model.norm.weight"] * math.nan}

    with monkeypatch.context() as patch:
        patch.setattr("rollout.gate.faults.corrupted", damaged)
        with pytest.raises(ParityError, match=r"1 tensors did not, the first is model\.norm"):
            handed.gate.load(2, handed.published)
    assert not wrong_tensors(handed.engine, handed.published.checksums)
    assert handed.gate.load(2, handed.published).version == 2


def test_weights_that_do_not_fit_leave_the_engine_as_it_was(handed: Handed) -> None:
    handed.gate.load(2, handed.published)
    part = {"model.norm.weight": handed.now["model.norm.weight"]}
    with pytest.raises(DataError, match="are missing"):
        handed.gate.load(3, Post().publish(3, part))
    assert handed.engine.version == 2
    future = handed.engine.submit(Request("b", (5, 6), 3, 1.0, 0, ()))
    assert {span.version for span in future.result(10).segment.versions} == {2}
    assert not wrong_tensors(handed.engine, handed.published.checksums)


def test_78_older_weights_and_another_version_than_was_said_are_refused(handed: Handed) -> None:
    handed.gate.load(2, handed.published)
    with pytest.raises(DataError, match="must rise, got 1 after 2"):
        handed.gate.load(1, replace(handed.published, version=1))
    with pytest.raises(DataError, match="sent as, 3, got those of 2"):
        handed.gate.load(3, handed.published)


def test_an_engine_without_tensors_proves_itself_by_its_function() -> None:
    engine = FakeEngine(lambda request: (1,), logprob=-0.5, version=-1)
    rows = (Probe((1, 2, 3), (-0.5, -0.5)), Probe((4, 5), (-0.5,)))
    post = Post()
    gate = Gate(engine, post.inbox)
    weights = {"w": torch.ones(2)}
    published = post.publish(0, weights, lambda: Probes(rows, typical=0.0, worst=0.0))
    loaded = gate.load(0, published)
    assert (loaded.version, loaded.drift, engine.loads) == (0, 0.0, [0])
    assert set(loaded.seconds) == {
        *("reserve", "copy", "probe"),
        *("fetch", "load", "bytes", "probes"),
    }
    off = (rows[0], Probe((4, 5), (-0.75,)))
    with pytest.raises(ParityError, match=r"token 1 of probe 1 .* -0.75, got -0.5") as caught:
        gate.load(1, post.publish(1, weights, lambda: Probes(off, typical=0.2, worst=0.2)))
    assert "off by 0.25 nats (allowed 0.2)" in caught.value.why
    assert gate.load(2, post.publish(2, weights)).drift == 0.0
    engine.close()


def test_drift_is_the_median_row_and_the_worst_token() -> None:
    engine = FakeEngine(lambda request: (1,), logprob=-1.0)
    rows = (
        Probe((1, 2, 3), (-1.0, -1.0)),
        Probe((1, 2, 3), (-1.3, -0.6)),  # off by .3 and .4: root mean square .3536
        Probe((1, 2, 3), (-1.1,)),  # only the first token is compared
    )
    drift = drift_of(engine, Probes(rows))
    assert drift
    assert drift.typical == pytest.approx(0.1) and drift.worst == pytest.approx(0.4)
    assert (drift.row, drift.token, drift.got, drift.wanted) == (1, 2, -1.0, -0.6)
    assert is_within(drift, Probes(rows, typical=0.11, worst=0.41))
    assert not is_within(drift, Probes(rows, typical=0.09, worst=0.41))
    assert not is_within(drift, Probes(rows, typical=0.11, worst=0.39))
    assert drift_of(engine, Probes()) is None
    engine.close()


def test_a_number_that_is_none_is_never_near() -> None:
    engine = FakeEngine(lambda request: (1,), logprob=math.nan)
    probes = Probes((Probe((1, 2), (-1.0,)),), typical=1e9, worst=1e9)
    drift = drift_of(engine, probes)
    assert drift and not is_within(drift, probes)
    engine.close()


def test_probes_reach_every_expert_and_carry_the_learners_numbers(tiny_model: Path) -> None:
    model = load_model(tiny_model).train()
    prober = Prober(model, max_length=128, seed=3)
    probes = prober.measure()
    assert len(probes.rows) >= 8 and not prober.unreached and model.training
    assert all(len(row.token_ids) == 32 for row in probes.rows)
    for row in probes.rows:
        tokens = torch.tensor([row.token_ids])
        with torch.no_grad():
            alone = model_logprobs(model, tokens, torch.ones_like(tokens))[0][0, 1:].tolist()
        assert row.logprobs == pytest.approx(alone[: len(row.logprobs)], abs=1e-5)
    assert prober.measure() == probes
    other = Prober(model, max_length=128, seed=4).measure()
    assert other.rows[0].token_ids != probes.rows[0].token_ids
    assert 1e-6 <= probes.typical < 1e-4 and 4e-6 <= probes.worst < 1e-3


def test_rows_are_added_until_every_expert_is_reached_or_it_is_said(
    tiny_model: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model(tiny_model)
    monkeypatch.setattr("rl.prober._ROWS", 1)
    monkeypatch.setattr("rl.prober._ROW_TOKENS", 4)
    prober = Prober(model, max_length=128, seed=0)
    probes = prober.measure()  # two layers of four experts: at most three are reached by a row
    assert 2 < len(probes.rows) < 40 and not prober.unreached and not caplog.text
    with torch.no_grad():
        router = model.model.layers[1].feed_forward.router
        router.weight[2] = router.weight[0]  # even with another one: never chosen beyond doubt
    prober.measure()
    assert (0, 2) in prober.unreached
    assert "no probe reaches experts" in caplog.text and "(0, 2)" in caplog.text
    warned = caplog.text.count("no probe reaches")
    prober.measure()
    assert caplog.text.count("no probe reaches") == warned


def test_75_ranks_that_route_apart_by_a_rounding_make_the_passes_of_rank_0(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rl.prober._ROWS", 1)
    monkeypatch.setattr("rl.prober._ROW_TOKENS", 4)
    told: list[set[Expert]] = []
    first = Prober(load_model(tiny_model), max_length=128, seed=0, shared=_kept_in(told))
    passes, others = [_passes_of(first)], iter(told)
    apart = load_model(tiny_model)
    with torch.no_grad():  # another rank's router never sees expert 2 of the first layer chosen
        router = apart.model.layers[1].feed_forward.router
        router.weight[2] = router.weight[0]
    passes.append(_passes_of(Prober(apart, max_length=128, seed=0)))
    second = Prober(apart, max_length=128, seed=0, shared=lambda own: next(others))
    passes.append(_passes_of(second))
    assert passes[0] == passes[2] < passes[1], "alone it would go on, and wait for ever"


def _kept_in(told: list[set[Expert]]) -> Callable[[set[Expert]], set[Expert]]:
    def shared(experts: set[Expert]) -> set[Expert]:
        told.append(set(experts))
        return experts

    return shared


def _passes_of(prober: Prober) -> int:
    """Forward passes of a measurement."""
    passes: list[object] = []
    with prober._logprobs.register_forward_pre_hook(lambda *_: passes.append(1)):
        prober.measure()
    return len(passes)


def test_a_row_ends_where_two_experts_are_all_but_even(tiny_model: Path) -> None:
    model = load_model(tiny_model)
    whole = Prober(model, max_length=128, seed=0).measure().rows
    router = model.model.layers[3].feed_forward.router
    with torch.no_grad():
        router.weight[:] = router.weight[:1]  # all experts even on every token
    assert Prober(model, max_length=128, seed=0).measure().rows == ()
    assert sum(len(row.logprobs) for row in whole) > 8 * 25


def test_one_probe_passes_llama_4s_temperature_threshold(tmp_path: Path) -> None:
    path = make_tiny_model(tmp_path / "model", floor_scale=80)
    model = load_model(path)
    probes = Prober(model, max_length=128, seed=0).measure()
    assert [len(row.token_ids) for row in probes.rows][8:] == [96]
    assert len(Prober(model, max_length=95, seed=0).measure().rows) == 8
    engine = HfEngine(load_model(path), num_slots=8, max_length=128, pad_id=0)
    assert is_within(_drift(engine, probes), probes)
    for layer in engine._model._model.model.layers:
        layer.self_attn.attn_temperature_tuning = False
    drift = _drift(engine, probes)
    assert not is_within(drift, probes) and drift.row == 8 and drift.token >= 80
    engine.close()


def _drift(engine: HfEngine, probes: Probes) -> Drift:
    drift = drift_of(engine, probes)
    assert drift
    return drift


def test_a_lent_tensor_is_used_and_any_other_is_copied(handed: Handed) -> None:
    mine = {name: tensor.clone() for name, tensor in handed.now.items()}
    handed.engine.load(2, mine)
    mine["model.norm.weight"].add_(1)
    assert not wrong_tensors(handed.engine, handed.published.checksums)
    handed.engine.load(2, Lent(mine))
    assert wrong_tensors(handed.engine, handed.published.checksums) == ["model.norm.weight"]


def test_a_parity_error_is_an_infrastructure_error() -> None:
    assert issubclass(ParityError, InfraError) and ParityError("x").exit_code == 6


def test_the_batch_just_trained_is_probed_and_cut_to_what_is_cheap(tiny_model: Path) -> None:
    prober = Prober(load_model(tiny_model), max_length=100, seed=0)
    groups = [make_group(number, prompt_length=4 + 200 * (number == 2)) for number in range(6)]
    rows = [row.token_ids for row in prober.measure(groups).rows][8:]
    assert rows[:2] == [(20, 21, 22, 23, 70, 71, 260), (21, 22, 23, 24, 70, 71, 260)]
    assert rows[2] == tuple(range(22, 22 + 64)) and len(rows) == 4
