"""Adapters on their way: the base goes once, each version is an adapter, and the gate proves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import ray
import torch
from fleet_doubles import RealBirths, make_task, run_fleet
from ray.actor import ActorHandle
from remote_keeper import RemoteKeeper
from rl_doubles import make_group
from torch import Tensor
from weight_doubles import Post

from ground.adapter import Adapter
from ground.errors import DataError, ParityError
from ground.faults import Faults
from ground.lora import LoraSection
from ground.merge import merged_targets
from ground.model import copied, load_model, random_model
from ground.strikes import kill9
from rl.prober import Prober
from rollout.assembly import Assembly
from rollout.checksums import checksums, views
from rollout.config import EngineSection, FleetSection
from rollout.engine import Lent, Request
from rollout.fleet import Fleet
from rollout.gate import Gate
from rollout.handover import Inbox, Outbox
from rollout.hf_engine import HfEngine
from rollout.task import BASE, Arriving, WorkerConfig
from rollout.weights import Probes, Published, WeightKeeper, start_keeper, this_node

pytestmark = pytest.mark.usefixtures("ray_local")

STEP = 1e-4
"""What AdamW moves each number by in a step at a rate that is usual for adapters."""
Tensors = dict[str, Tensor]


def trained(adapter: Adapter, seed: int) -> Tensors:
    """As large a change as one step of AdamW; returns a copy of what it led to."""
    generator = torch.Generator().manual_seed(seed)
    for tensor in adapter.live().values():
        tensor.add_((torch.randint(0, 2, tensor.shape, generator=generator) * 2 - 1) * STEP)
    return copied(adapter.live())


class Learning:
    """A learner's side with an adapter that has taken twenty steps, and the one after them."""

    def __init__(self, path: Path, post: Post) -> None:
        self.path, self.post = path, post
        self.model = load_model(path)
        self.adapter = Adapter(self.model, LoraSection(rank=4), seed=0, stage="rl")
        self.prober = Prober(self.model, max_length=128, seed=0, otherwise=self.adapter.folded)
        self.prober.measure()
        post.outbox.found(self.adapter.base(), self.adapter.scale)
        for seed in range(20):
            self.before = trained(self.adapter, seed)
        self.now = trained(self.adapter, 20)
        self.probes = self.prober.measure([make_group(0)])

    def publish(self, version: int, adapter: Tensors) -> Published:
        """Said to be what the probes are of."""
        return self.post.publish(version, adapter, lambda: self.probes)


@pytest.fixture(scope="module")
def learning(tiny_model: Path, ray_local: None) -> Learning:
    return Learning(tiny_model, Post())


@pytest.fixture
def engine(learning: Learning) -> Iterator[HfEngine]:
    engine = blank_engine(learning.path)
    yield engine
    engine.close()


def blank_engine(path: Path) -> HfEngine:
    return HfEngine(random_model(path), num_slots=8, max_length=128, pad_id=0, version=-1)


def new_gate(engine: HfEngine) -> Gate:
    return Gate(engine, Inbox(this_node()))


def next_version(learning: Learning) -> int:
    return max(learning.post.keeper.versions(), default=-1) + 1


def test_an_adapter_alone_is_handed_over_and_arrives(learning: Learning, engine: HfEngine) -> None:
    version = next_version(learning)
    published = learning.publish(version, learning.now)
    assert set(published.checksums) == set(learning.now)
    assert published.layout.size < sum(each.nbytes for each in learning.adapter.base().values()) / 4
    loaded = new_gate(engine).load(version, published)
    assert loaded.version == engine.version == version
    assert 0 < loaded.drift <= learning.probes.typical
    wanted = learning.adapter.base() | dict(
        merged_targets(learning.adapter.base(), learning.now, learning.adapter.scale)
    )
    assert all(torch.equal(engine.tensors()[name], wanted[name]) for name in wanted)


def zeroed(half: str) -> Callable[[Learning], Tensors]:
    name = f"model.layers.1.self_attn.v_proj.lora_{half}.weight"
    return lambda learning: {**learning.now, name: torch.zeros_like(learning.now[name])}


def swapped(*halves: str) -> Callable[[Learning], Tensors]:
    def damage(learning: Learning) -> Tensors:
        damaged = dict(learning.now)
        for half in halves:
            one, other = (f"model.layers.{n}.self_attn.q_proj.lora_{half}.weight" for n in (0, 2))
            damaged[one], damaged[other] = learning.now[other], learning.now[one]
        return damaged

    return damage


def without_a_layer(learning: Learning) -> Tensors:
    return {k: v for k, v in learning.now.items() if "layers.3.self_attn.o_proj" not in k}


FAULTS: dict[str, Callable[[Learning], Tensors]] = {
    "stale": lambda learning: learning.before,
    "never trained": lambda learning: {k: torch.zeros_like(v) for k, v in learning.now.items()},
    "A of a layer missing": zeroed("A"),
    "B of a layer missing": zeroed("B"),
    "a layer missing": without_a_layer,
    "A and B of another layer": swapped("A", "B"),
    "A of another layer": swapped("A"),
    "B of another layer": swapped("B"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_gate_sees_by_its_probes_that_another_adapter_came(
    learning: Learning, engine: HfEngine, fault: str
) -> None:
    """Checksums cannot: these are the bytes that were published."""
    gate, version = new_gate(engine), next_version(learning)
    gate.load(version, learning.publish(version, learning.now))
    other = learning.publish(version + 1, FAULTS[fault](learning))
    with pytest.raises(ParityError, match="must compute as the learner does under version"):
        gate.load(version + 1, other)
    future = engine.submit(Request("a", (5, 6), 3, 1.0, 0, ()))
    assert not future.done()  # it stands still
    gate.load(version + 2, learning.publish(version + 2, learning.now))
    assert len(future.result(30).segment.token_ids) == 3


def test_the_roundings_of_adding_are_allowed_for_and_a_wrong_sum_is_not(
    learning: Learning, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both sides add with one formula: were it wrong, the learner's noise must not excuse it."""
    plain = Prober(learning.model, max_length=128, seed=0).measure()
    least = Prober(learning.model, max_length=128, seed=0, otherwise=learning.adapter.folded)
    right = least.measure()
    assert plain.typical <= right.typical < 30 * plain.typical
    monkeypatch.setattr("ground.adapter.merged_weight", lambda w, a, b, scale: w + b @ a)
    wrong = least.measure()
    assert (wrong.typical, wrong.worst) == (30 * plain.typical, 30 * plain.worst)


@pytest.mark.parametrize("factor", [0.5, 1.01, 2.0])
def test_the_gate_sees_a_wrong_scale(learning: Learning, engine: HfEngine, factor: float) -> None:
    version = next_version(learning)
    published = learning.publish(version, learning.now)
    assert published.scale
    with pytest.raises(ParityError, match="must compute as the learner does"):
        new_gate(engine).load(version, replace(published, scale=published.scale * factor))


def test_the_gate_sees_bytes_that_changed_on_the_way_of_adapter_base_and_sum(
    learning: Learning, engine: HfEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, version = new_gate(engine), next_version(learning)
    good = learning.publish(version, learning.now)
    name = "model.layers.0.self_attn.q_proj"
    adapter = {**good.checksums, f"{name}.lora_A.weight": "00"}
    with pytest.raises(ParityError, match=f"version {version} must arrive .* {name}.lora_A.weight"):
        gate.load(version, replace(good, checksums=adapter))
    assert good.base
    base = replace(good.base, checksums={**good.base.checksums, f"{name}.weight": "00"})
    with pytest.raises(ParityError, match=rf"the base must arrive .* first is {name}\.weight"):
        gate.load(version, replace(good, base=base))

    def unchanged(point: str, given: Lent) -> Tensors:
        """As if the engine had kept one matrix of the base: the adapter was not added to it."""
        return {**given, f"{name}.weight": learning.adapter.base()[f"{name}.weight"]}

    with monkeypatch.context() as patch:
        patch.setattr("rollout.gate.faults.corrupted", unchanged)
        with pytest.raises(ParityError, match=rf"1 of 45 tensors are others: {name}\.weight \(off"):
            gate.load(version, good)
    assert gate.load(version, good).version == version


def test_half_an_adapter_or_another_models_leaves_the_engine_as_it_was(
    learning: Learning, engine: HfEngine
) -> None:
    gate, version = new_gate(engine), next_version(learning)
    gate.load(version, learning.publish(version, learning.now))
    left_out = "model.layers.0.self_attn.q_proj.lora_B.weight"
    half = {name: each for name, each in learning.now.items() if name != left_out}
    with pytest.raises(DataError, match=r"layers\.0\.self_attn\.q_proj has weight, A and B of"):
        gate.load(version + 1, learning.publish(version + 1, half))
    assert engine.version == version
    future = engine.submit(Request("b", (5, 6), 3, 1.0, 0, ()))
    assert {span.version for span in future.result(30).segment.versions} == {version}


def test_an_adapter_without_a_base_is_refused_and_not_taken_for_whole_weights(
    learning: Learning, engine: HfEngine
) -> None:
    """Whatever its scale is, 0 as well."""
    version = next_version(learning)
    published = learning.publish(version, learning.now)
    for scale in (published.scale, 0.0):
        alone = replace(published, scale=scale, base=None)
        with pytest.raises(DataError, match=f"must come with the base .* version {version} came"):
            new_gate(engine).load(version, alone)
    assert engine.version == -1


def test_a_worker_that_came_late_has_the_bits_of_one_that_took_every_version(
    learning: Learning, engine: HfEngine
) -> None:
    """Nothing is ever subtracted again, and the base outlives the versions that are kept."""
    gate, late = new_gate(engine), blank_engine(learning.path)
    try:
        for adapter in (learning.now, learning.before, learning.now, learning.now):
            version = next_version(learning)
            published = learning.publish(version, adapter)
            if adapter is learning.before:
                published = replace(published, probes=Probes())
            gate.load(version, published)
        assert len(learning.post.keeper.versions()) == 2
        new_gate(late).load(version, published)
        ours, theirs = engine.tensors(), late.tensors()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    finally:
        late.close()


def test_base_and_adapter_of_a_learner_elsewhere_go_to_workers_everywhere(ray_local: None) -> None:
    keeper = WeightKeeper()
    outbox = Outbox(keeper, "elsewhere")
    for filled in (5.0, 1.0):  # a base that is handed over again takes the place of the other
        outbox.found({"x.weight": torch.full((2, 2), filled)}, 0.5)
    halves = {"x.lora_A.weight": torch.tensor([[1.0, 2]]), "x.lora_B.weight": torch.ones(2, 1)}
    outbox.send(outbox.pack(0, halves))
    _, published = keeper.current()
    assert published.base and published.base.node == published.node == this_node()
    assert (published.scale, published.base.scale) == (0.5, None)
    whole, wanted = Assembly(Inbox(this_node())).whole(published)
    assert whole["x.weight"].tolist() == [[1.5, 2.0], [1.5, 2.0]]
    assert wanted.checksums == checksums(whole)
    for sent in (published.base, published):
        carried = b"".join(bytes(ray.get(piece)) for piece in keeper.carry(sent.version))
        assert checksums(views(sent.layout, bytearray(carried))) == sent.checksums


def test_base_and_adapter_come_to_another_machine_in_pieces(ray_local: None) -> None:
    """A base of 1 MiB in four pieces, once; an adapter of 4 KiB with each version."""
    actor = start_keeper()
    try:
        keeper = RemoteKeeper(actor)
        outbox, inbox = Outbox(keeper, this_node()), Inbox("another machine")
        assembly = Assembly(inbox)
        outbox.found({"x.weight": torch.ones(512, 512)}, 0.5)
        came: list[Arriving | None] = []
        for version, filled in enumerate((2.0, 4.0)):
            halves = {
                "x.lora_A.weight": torch.full((1, 512), filled),
                "x.lora_B.weight": torch.ones(512, 1),
            }
            outbox.send(outbox.pack(version, halves))
            whole, _ = assembly.whole(keeper.current())
            assert torch.equal(whole["x.weight"], torch.full((512, 512), 1.0 + 0.5 * filled))
            came.append(inbox.arriving)
        assert [(each.version, each.bytes, each.total) for each in came if each] == [
            (BASE, 1 << 20, 1 << 20),
            (1, 4096, 4096),
        ]
        pieces = ray.get(actor.carry.remote(BASE))
        assert [len(ray.get(piece)) for piece in pieces] == [256 << 10] * 4
    finally:
        ray.kill(cast(ActorHandle, actor))


class AdapterBirths(RealBirths):
    """Real workers that get a base once, and then adapters."""

    def __init__(self, config: WorkerConfig) -> None:
        super().__init__(config)
        self.learning = Learning(config.model_path, self.post)

    def publish(self, version: int) -> object:
        return self.learning.publish(version, self.learning.now)


@pytest.mark.slow
def test_a_worker_killed_as_it_loads_comes_back_with_base_and_current_adapter(
    tiny_model: Path, tmp_path: Path, armed: Callable[[Faults], Faults]
) -> None:
    plan = armed(Faults(tmp_path).at("rollout/0", "weights.load", 2).do(kill9))
    engine = EngineSection(num_slots=8, max_length=256)
    fleet = FleetSection(num_workers=2, cpus_per_worker=0.5, backoff_seconds=0.1, spare=False)
    births = AdapterBirths(WorkerConfig(tiny_model, engine, fleet))

    async def scenario(fleet: Fleet) -> None:
        await fleet.start()
        await fleet.publish(0, births.publish(0))
        assert (await fleet.rollout(make_task("a"))).versions == {0}
        for version in (1, 2, 3):
            await fleet.publish(version, births.publish(version))
        await fleet._roster.until(lambda: set(fleet.stats().states) == {"healthy"})
        assert [worker.version for worker in fleet.stats().workers] == [3, 3]
        assert (await fleet.rollout(make_task("b"))).versions == {3}

    run_fleet(births, scenario)
    assert len(plan.fired()) == 1 and len(births.events_of("lost")) == 1
