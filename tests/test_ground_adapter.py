"""A low-rank adapter in a model: its formula, what may have one, and what others load of it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import cast

import pytest
import torch
from conftest import make_tiny_llama, make_tiny_with_images
from launching import free_port, rank_environment
from peft import PeftModel
from pydantic import ValidationError
from torch import Tensor, nn
from transformers import (
    AutoModelForImageTextToText,
    GPT2Config,
    GPT2LMHeadModel,
)

from dpo.config import DpoSection
from ground.adapter import Adapter, base_identity, targets_of
from ground.config import Head
from ground.entry import Stage
from ground.errors import DataError, RecipeError, SetupError
from ground.launch import Launch
from ground.lora import LoraSection
from ground.merge import merged_targets, merged_weight
from ground.metrics import Metrics
from ground.model import load_model, tensors_of
from ground.run import RunDir
from ground.shape import read_shape
from ground.trail import Trail
from rl.adapter_shape import adapter_parameters
from rl.config import RlSection
from sft.config import SftSection

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(0))


def fill(tensors: dict[str, Tensor], deviation: float = 0.1) -> dict[str, Tensor]:
    """As after training: B is no longer zero."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if ".lora_B." in name:
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * deviation)
    return tensors


@pytest.fixture(scope="module")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(params=["tiny_model", "tiny_llama"])
def path(request: pytest.FixtureRequest) -> Path:
    """Llama 4 with experts, and a dense Llama with tied embeddings."""
    return request.getfixturevalue(request.param)


def test_the_product_is_scaled_and_added() -> None:
    a, b = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [4.0]])
    merged = merged_weight(torch.ones(2, 2), a, b, 0.5)  # 1 + 0.5 · [[3, 6], [4, 8]]
    assert merged.tolist() == [[2.5, 4.0], [3.0, 5.0]]
    base = {"x.weight": torch.ones(2, 2), "y.weight": torch.zeros(1)}
    adapter = {"x.lora_A.weight": a, "x.lora_B.weight": b}
    (found,) = merged_targets(base, adapter, 2.0)
    assert found[0] == "x.weight" and found[1].tolist() == [[7.0, 13.0], [9.0, 17.0]]


@pytest.mark.parametrize(
    ("adapter", "shapes"),
    [
        ({"x.lora_A.weight": torch.ones(1, 2)}, r"\(2, 2\), \(1, 2\) and|\(2, 2\), \(1, 2\), None"),
        ({"x.lora_B.weight": torch.ones(2, 1)}, r"\(2, 2\), None, \(2, 1\)"),
        ({"x.lora_A.weight": torch.ones(1, 3), "x.lora_B.weight": torch.ones(2, 1)}, r"\(1, 3\)"),
        ({"z.lora_A.weight": torch.ones(1, 2), "z.lora_B.weight": torch.ones(2, 1)}, "z has"),
    ],
)
def test_half_an_adapter_and_one_of_another_model_are_refused(
    adapter: dict[str, Tensor], shapes: str
) -> None:
    with pytest.raises(DataError, match=shapes):
        list(merged_targets({"x.weight": torch.ones(2, 2)}, adapter, 1.0))


def test_only_a_and_b_are_trained_and_the_base_keeps_its_names(path: Path) -> None:
    model = load_model(path)
    before = tensors_of(model)
    adapter = Adapter(model, LoraSection(rank=4), seed=0, stage="sft")
    trained = [each for each in model.parameters() if each.requires_grad]
    assert sum(each.numel() for each in trained) == adapter.parameters
    assert list(adapter.base()) == list(before)
    fill(adapter.live())
    optimizer = torch.optim.AdamW(trained, lr=1e-2)
    nn.functional.cross_entropy(model(IDS).logits.flatten(0, 1), IDS.flatten()).backward()
    optimizer.step()
    assert all(torch.equal(adapter.base()[name], before[name]) for name in before)
    assert all(bool((each != 0).any()) for each in adapter.live().values())


def test_the_size_by_hand_and_from_config_json_alone(tiny_model: Path, tiny_llama: Path) -> None:
    """Llama 4: hidden 32, queries 32, keys 16, dense MLPs 64, shared experts 32; rank 4.

    Attention of four layers: 4 · (64 + 48 + 48 + 64) · 4 = 3,584. Two dense MLPs: 2 · 3 · 96 · 4 =
    2,304. Two shared experts: 2 · 3 · 64 · 4 = 1,536. Neither routers, experts nor LM head.
    """
    adapter = Adapter(load_model(tiny_model), LoraSection(rank=4), seed=0, stage="sft")
    assert len(adapter.modules) == 4 * 4 + 4 * 3
    assert adapter.parameters == 3584 + 2304 + 1536
    for path in (tiny_model, tiny_llama):
        for targets in (None, ["q_proj"], ["mlp.down_proj", "down_proj", "self_attn.k_proj"]):
            wanted = [t for t in targets or [] if not t.startswith("mlp") or path == tiny_llama]
            lora = LoraSection(rank=4, targets=wanted or None)
            made = Adapter(load_model(path), lora, seed=0, stage="sft")
            assert made.parameters == adapter_parameters(read_shape(path), lora)


def test_off_is_the_base_bit_for_bit_and_folded_is_the_sum(path: Path) -> None:
    plain, model = load_model(path), load_model(path)
    adapter = Adapter(model, LoraSection(rank=4), seed=0, stage="sft")
    with torch.no_grad():
        assert torch.equal(model(IDS).logits, plain(IDS).logits)  # B is zero
        fill(adapter.live())
        live = model(IDS).logits
        with adapter.off():
            assert torch.equal(model(IDS).logits, plain(IDS).logits)
        with adapter.folded():
            folded = model(IDS).logits
        assert torch.equal(model(IDS).logits, live)
    assert bool(((live - plain(IDS).logits).abs() > 0.1).any())
    torch.testing.assert_close(folded, live, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(t, plain.state_dict()[name]) for name, t in adapter.base().items())
    assert all(p.requires_grad == ("lora" in name) for name, p in model.named_parameters())


def test_one_layer_at_a_time_is_folded_and_computes_as_the_folded_whole(path: Path) -> None:
    model = load_model(path)
    adapter = Adapter(model, LoraSection(rank=4), seed=0, stage="sft")
    fill(adapter.live())
    layers = [model.get_submodule(f"{name}.base_layer") for name in adapter.modules]
    own = [cast(nn.Linear, layer).weight.data_ptr() for layer in layers]
    seen: list[list[int]] = []

    def folded() -> list[int]:
        now = [cast(nn.Linear, layer).weight.data_ptr() for layer in layers]
        return [
            number for number, (one, other) in enumerate(zip(own, now, strict=True)) if one != other
        ]

    def look(*_: object) -> None:
        seen.append(folded())
        if len(seen) > len(layers) + 1:
            raise Interrupted

    with torch.no_grad():
        with adapter.folded():
            hooks = [layer.register_forward_pre_hook(look) for layer in layers]
            logits = model(IDS).logits
            assert sorted(seen) == [[number] for number in range(len(layers))]
            with pytest.raises(Interrupted):
                model(IDS)  # in the second layer, folded
            assert not folded()
        for hook in hooks:
            hook.remove()
        assert torch.equal(logits, adapter.merged()(IDS).logits)
    assert all(not layer._forward_pre_hooks and not layer._forward_hooks for layer in layers)


class Interrupted(Exception):
    """Raised in the middle of a pass."""


def test_what_is_saved_is_what_peft_loads_and_what_is_merged(path: Path, tmp_path: Path) -> None:
    model = load_model(path)
    adapter = Adapter(model, LoraSection(rank=4, alpha=6), seed=0, stage="sft")
    fill(adapter.live())
    wanted = dict(merged_targets(adapter.base(), adapter.live(), 1.5))
    with torch.no_grad():
        live = model(IDS).logits
    adapter.save(tmp_path, path)
    merged = adapter.merged()
    assert type(merged) is type(load_model(path))
    assert list(merged.state_dict()) == list(load_model(path).state_dict())
    assert all(torch.equal(merged.state_dict()[name], sum_) for name, sum_ in wanted.items())
    theirs = PeftModel.from_pretrained(load_model(path), str(tmp_path))
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=IDS).logits, live, atol=1e-6, rtol=1e-6)
    again = Adapter(load_model(path), LoraSection(rank=4, alpha=6), seed=9, stage="sft")
    again.load(tmp_path)
    assert all(torch.equal(again.live()[name], each) for name, each in adapter.live().items())


def test_peft_loads_an_adapter_of_a_llama_4_with_images(tmp_path: Path) -> None:
    model = load_model(make_tiny_with_images(tmp_path / "both"))
    adapter = Adapter(model, LoraSection(rank=4), seed=0, stage="sft")
    assert all(name.startswith("language_model.model.layers.") for name in adapter.modules)
    fill(adapter.live())
    adapter.save(tmp_path, tmp_path / "both")
    base = AutoModelForImageTextToText.from_pretrained(tmp_path / "both")
    theirs = PeftModel.from_pretrained(base, str(tmp_path))
    with torch.no_grad():
        live = model(input_ids=IDS).logits
        torch.testing.assert_close(theirs(input_ids=IDS).logits, live, atol=1e-6, rtol=1e-6)
        with adapter.off():
            assert bool(((live - model(input_ids=IDS).logits).abs() > 0.1).any())


def test_a_follows_from_the_seed_and_leaves_other_randomness_alone(tiny_llama: Path) -> None:
    def a(seed: int) -> Tensor:
        torch.manual_seed(77)
        made = Adapter(load_model(tiny_llama), LoraSection(rank=4), seed=seed, stage="rl")
        assert torch.equal(torch.rand(3), undisturbed)
        return made.live()["model.layers.0.self_attn.q_proj.lora_A.weight"]

    torch.manual_seed(77)
    load_model(tiny_llama)
    undisturbed = torch.rand(3)
    assert torch.equal(a(3), a(3)) and not torch.equal(a(3), a(4))


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (["q_porj"], r"no linear map called 'q_porj'; did you mean 'q_proj'\?"),
        (["lm_head"], "'lm_head' cannot be adapted: log-probs"),
        (["router"], "'router' cannot be adapted: it is not a plain linear map"),
        (["experts.down_proj"], "'experts.down_proj' cannot be adapted: routed experts"),
        (["embed_tokens"], "'embed_tokens' cannot be adapted: it is not a plain linear map"),
        (["q_proj", "no", "o_prj"], r"'no'\n  .* 'o_prj'; did you mean 'o_proj'"),
    ],
)
def test_targets_that_cannot_be_are_refused_with_the_nearest(
    tiny_model: Path, wanted: list[str], message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        targets_of(load_model(tiny_model), wanted, "rl.lora.targets")
    assert caught.value.where == "rl.lora.targets"


def test_a_model_without_linear_maps_is_refused_by_name() -> None:
    """GPT-2's maps are transformers' Conv1D; its LM head, which is linear, never has an adapter."""
    model = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=4, n_embd=4, n_layer=1, n_head=1))
    with pytest.raises(RecipeError, match="a GPT2LMHeadModel has no linear map"):
        Adapter(model, LoraSection(), seed=0, stage="sft")


def test_an_adapter_of_another_rank_or_of_other_modules_is_not_restored(tiny_llama: Path) -> None:
    adapter = Adapter(load_model(tiny_llama), LoraSection(rank=4), seed=0, stage="sft")
    other = Adapter(load_model(tiny_llama), LoraSection(rank=8), seed=0, stage="sft")
    with pytest.raises(DataError, match="28 are missing, unknown or of another shape"):
        adapter.restore(other.live())
    fewer = Adapter(
        load_model(tiny_llama), LoraSection(rank=4, targets=["q_proj"]), seed=0, stage="sft"
    )
    with pytest.raises(DataError, match="24 are missing"):
        adapter.restore(fewer.live())


def test_a_checkpoint_of_an_adapter_belongs_to_its_settings_and_its_base(
    tmp_path: Path, tiny_llama: Path
) -> None:
    section = LoraSection(rank=4)
    ours = base_identity(section, tiny_llama)
    assert ours == base_identity(section, tiny_llama)
    assert ours["base"] != base_identity(section, make_tiny_llama(tmp_path, seed=1))["base"]
    assert ours["lora"] != base_identity(LoraSection(rank=4, alpha=8), tiny_llama)["lora"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "greater than or equal to 1"),
        ({"alpha": 0}, "greater than 0"),
        ({"dropout": 1}, "less than 1"),
        ({"targets": []}, "at least 1 item"),
        ({"r": 8}, "Extra inputs"),
    ],
)
def test_settings_that_can_never_work_are_refused(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValidationError, match=message):
        LoraSection.model_validate(settings)


@pytest.mark.parametrize("section", [SftSection, DpoSection])
def test_dropout_is_for_the_light_stages_alone(
    section: Callable[..., SftSection | DpoSection],
) -> None:
    lora = section(lora=LoraSection(dropout=0.1)).lora
    assert lora and lora.dropout == 0.1
    with pytest.raises(ValidationError, match=r"lora.dropout must be 0 in RL.*got 0.1"):
        RlSection.model_validate({"steps": 1, "lora": {"dropout": 0.1}})


@pytest.mark.parametrize("spread", ["zero2", "zero3"])
def test_ranks_that_split_the_base_are_refused_as_the_recipe_is_read(spread: str) -> None:
    section = {"steps": 1, "lora": {}, "learner": {"num_ranks": 2, "spread": "ddp"}}
    assert RlSection.model_validate(section).lora
    section["learner"] = {"num_ranks": 2, "spread": spread}
    with pytest.raises(ValidationError, match=rf"lora goes with learner\.spread: ddp .* {spread}"):
        RlSection.model_validate(section)
    assert RlSection.model_validate(section | {"lora": None}).learner.spread == spread


def test_launchers_that_split_the_base_are_refused_by_name() -> None:
    for launch in (Launch(), Launch("ddp", 1, 2)):
        LoraSection().require_launch(launch, "sft")
    for kind in ("zero2", "zero3", "fsdp2"):
        with pytest.raises(SetupError, match=rf"rl\.lora runs on .* asks for {kind} on 2 ranks"):
            LoraSection().require_launch(Launch(kind, 0, 2), "rl")


@pytest.mark.parametrize(
    ("name", "section"),
    [
        ("sft", SftSection.model_validate({"lora": {}})),
        ("rl", RlSection.model_validate({"steps": 1, "lora": {}})),
        ("dpo", DpoSection.model_validate({"lora": {}})),
    ],
)
def test_each_stage_asks_so(
    name: str,
    section: SftSection | RlSection | DpoSection,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stage that did not ask would go on to its inputs, which are not there."""
    for variable, value in rank_environment("zero2", 0, free_port(), num_ranks=1).items():
        monkeypatch.setenv(variable, value)
    head, run = Head(name="t"), RunDir(tmp_path)  # pyright: ignore[reportCallIssue]
    trail, metrics = Trail(head, run, (name,)), Metrics(tmp_path / "metrics.jsonl")
    stage = Stage(name, head, section, run, tmp_path, trail, metrics, resume=False)
    with pytest.raises(SetupError, match=rf"{name}\.lora runs on .* asks for zero2 on 1 rank"):
        importlib.import_module(f"{name}.train").train(stage)
