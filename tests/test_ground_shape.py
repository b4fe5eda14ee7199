"""Shapes of models, against what is published and against real weights."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from safetensors import safe_open

from ground.errors import DataError
from ground.shape import ModelShape, read_shape

RECIPES = Path(__file__).parents[1] / "recipes"


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [("llama8b", 8.03e9, 8.03e9), ("scout", 107.8e9, 17.2e9), ("maverick", 400.7e9, 17.2e9)],
)
def test_published_models_have_their_published_sizes(
    name: str, total: float, active: float
) -> None:
    shape = read_shape(RECIPES / name / "shape")
    assert shape.parameters == pytest.approx(total, rel=1e-3)
    assert shape.active == pytest.approx(active, rel=2e-3)


def test_what_is_assumed_of_behemoth_gives_what_is_published() -> None:
    shape = read_shape(RECIPES / "behemoth" / "shape")
    assert shape.parameters == pytest.approx(2e12, rel=0.01) and shape.parameters < 2e12
    assert shape.active == pytest.approx(288e9, rel=0.005) and shape.experts == 16


@pytest.mark.parametrize("model", ["student", "teacher"])
def test_the_herd_has_as_many_parameters_as_its_shape_says(model: str) -> None:
    folder = RECIPES / "tiny" / "herd" / model
    with safe_open(folder / "model.safetensors", framework="np") as file:
        sizes = {key: math.prod(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    matrices = sum(size for key, size in sizes.items() if "norm" not in key)
    assert read_shape(folder).parameters == matrices


def test_a_token_costs_two_for_each_parameter_and_four_for_each_key_it_sees() -> None:
    shape = ModelShape(2, 8, heads=2, kv_heads=1, head_width=4, vocabulary=10, mlp_width=16)
    # attention 2 x 2 x 8 x 4 x (2 + 1) = 384, MLPs 3 x 8 x 2 x 16 = 768, head 80, embedding 80
    assert (shape.attention, shape.dense, shape.parameters) == (384, 1232, 1312)
    assert shape.flops(0) == 2 * 1232 and shape.flops(5) - shape.flops(0) == 4 * 2 * 8 * 5
    assert shape.cache_bytes(2) == 2 * 2 * 1 * 4 * 2


def test_experts_that_nobody_chose_are_not_read_and_unrouted_ones_are_all_computed() -> None:
    shape = ModelShape(
        *(1, 8, 2, 1, 4, 10, 16),
        expert_layers=1,
        experts=4,
        experts_per_token=1,
        expert_width=2,
        shared_width=2,
    )
    assert shape.one_expert == 48 and shape.dense == 192 + 48 + 32 + 80
    assert shape.read_in_a_step(1) == shape.dense + 48
    assert shape.read_in_a_step(2) == shape.dense + 48 * 1.75  # 4 x (1 - 0.75²)
    assert shape.flops(0, is_routed=False) - shape.flops(0) == 2 * 3 * 48


def test_a_config_without_a_size_is_an_error_with_its_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 8}))
    with pytest.raises(DataError, match="num_attention_heads must be a number") as caught:
        read_shape(tmp_path)
    assert caught.value.where == str(tmp_path / "config.json")


def test_mixtral_and_qwen_name_their_experts_otherwise(tmp_path: Path) -> None:
    common = {"hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 4}
    common |= {"vocab_size": 10, "intermediate_size": 6, "num_experts_per_tok": 2}
    mixtral = {**common, "model_type": "mixtral", "num_local_experts": 8}
    (tmp_path / "config.json").write_text(json.dumps(mixtral))
    shape = read_shape(tmp_path)
    assert (shape.expert_layers, shape.expert_width, shape.shared_width) == (4, 6, 0)
    qwen = {**common, "model_type": "qwen2_moe", "num_experts": 8, "decoder_sparse_step": 2}
    qwen |= {"moe_intermediate_size": 3, "shared_expert_intermediate_size": 5}
    (tmp_path / "config.json").write_text(json.dumps(qwen))
    shape = read_shape(tmp_path)
    assert (shape.expert_layers, shape.expert_width, shape.shared_width) == (2, 3, 5)
