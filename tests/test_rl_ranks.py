"""A step on two real ranks over gloo, behind DDP and DeepSpeed, is the step on one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import rl_rank
import rl_rank_losses
import torch
from conftest import make_tiny_model, make_tiny_with_images
from launching import (
    KINDS,
    environment,
    free_port,
    needs_deepspeed,
    rank_environment,
    zero3_settings,
)
from safetensors.torch import load_file

from ground.launch import Launch
from ground.ranks import Ranks

SECONDS = 240
pytestmark = pytest.mark.slow


def run_ranks(
    kind: str, model: Path, out: Path, *cut: Path, script: str = rl_rank.__file__
) -> None:
    """Run two ranks to their end."""
    port = free_port()
    given = environment()
    if kind == "zero3":
        (out / "zero3.json").write_text(json.dumps(zero3_settings()))
        given["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(out / "zero3.json")
    ranks = [
        subprocess.Popen(
            [sys.executable, script, str(model), str(out), *map(str, cut)],
            env={**given, **rank_environment(kind, rank, port)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        for process in ranks:
            _, said = process.communicate(timeout=SECONDS)
            assert process.returncode == 0, said[-3000:]
    finally:
        for process in ranks:
            process.kill()


def found_by(folder: Path) -> dict[str, Any]:
    """What rank 0 has written."""
    return json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def alone(
    tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any]]:
    """The folder and the numbers of one process."""
    folder = tmp_path_factory.mktemp("alone")
    learners = rl_rank.ensemble(tiny_model, Ranks(Launch(), 0.0), **rl_rank.SETTINGS)
    rl_rank.spoil(learners, folder)
    return folder, rl_rank.train(learners, folder)


def check_same(got: Path, want: Path, limit: float) -> None:
    weights = load_file(got)
    for name, tensor in load_file(want).items():
        assert (weights[name] - tensor).abs().max() < limit, name


@pytest.mark.parametrize("kind", KINDS)
def test_75_two_ranks_make_the_step_of_one_and_refuse_a_nan_together(
    kind: str, tiny_model: Path, tmp_path: Path, alone: tuple[Path, dict[str, Any]]
) -> None:
    folder, expected = alone
    run_ranks(kind, tiny_model, tmp_path)
    found = found_by(tmp_path)
    braked = [numbers["brake"] < 1 for numbers in expected["numbers"]]
    assert any(braked), "the brake must have something to do"
    for step, (got, want) in enumerate(zip(found["numbers"], expected["numbers"], strict=True)):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-6), f"step {step}"
    assert "must be finite, got nan" in found["error"] and "must be finite" in expected["error"]
    for ended in (found, expected):  # a finite loss, and a gradient that is not
        assert re.search(r"got -?[0-9.e-]+ and a gradient norm (nan|inf)", ended["spoilt"]), ended
    assert found["kept"] and expected["kept"]
    for got, want in zip(found["probes"], expected["probes"], strict=True):
        assert got == pytest.approx(want, abs=1e-4)
    check_same(tmp_path / "last.safetensors", folder / "last.safetensors", 2e-5)
    moments = load_file(tmp_path / "optimizer.safetensors")
    wanted = load_file(folder / "optimizer.safetensors")
    assert moments.keys() == wanted.keys()
    for name in wanted.keys() - {"rng"}:
        tensor = wanted[name]
        assert torch.allclose(moments[name], tensor, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_of_one_process_goes_on_on_two_ranks(
    kind: str, tiny_model: Path, tmp_path: Path, alone: tuple[Path, dict[str, Any]]
) -> None:
    """Two of three steps were taken: wrong moments would show in the weights of the third."""
    folder, expected = alone
    run_ranks(kind, tiny_model, tmp_path, folder)
    found = found_by(tmp_path)
    assert found["numbers"][0] == pytest.approx(expected["numbers"][2], rel=1e-4, abs=1e-6)
    check_same(tmp_path / "last.safetensors", folder / "last.safetensors", 2e-5)


@needs_deepspeed
def test_a_cut_of_two_zero_3_ranks_goes_on_in_one_process(
    tiny_model: Path, tmp_path: Path, alone: tuple[Path, dict[str, Any]]
) -> None:
    folder, expected = alone
    run_ranks("zero3", tiny_model, tmp_path)
    learners = rl_rank.ensemble(tiny_model, Ranks(Launch(), 0.0), **rl_rank.SETTINGS)
    (tmp_path / "one").mkdir()
    found = rl_rank.go_on(learners, tmp_path, tmp_path / "one")
    assert found["numbers"][0] == pytest.approx(expected["numbers"][2], rel=1e-4, abs=1e-6)
    check_same(tmp_path / "one" / "last.safetensors", folder / "last.safetensors", 2e-5)


@needs_deepspeed
def test_two_ranks_train_a_model_with_images_on_text_and_a_cut_of_one_process_goes_on(
    tmp_path: Path,
) -> None:
    """Its encoder of images, which text never reaches, comes first among its parameters."""
    model = make_tiny_with_images(tmp_path / "model")
    one, ddp, zero2 = (tmp_path / name for name in ("one", "ddp", "zero2"))
    for folder in (one, ddp, zero2):
        folder.mkdir()
    learners = rl_rank.ensemble(model, Ranks(Launch(), 0.0), **rl_rank.SETTINGS)
    rl_rank.spoil(learners, one)
    expected = rl_rank.train(learners, one)
    run_ranks("ddp", model, ddp)
    for got, want in zip(found_by(ddp)["numbers"], expected["numbers"], strict=True):
        assert got == pytest.approx(want, rel=1e-4, abs=1e-6)
    run_ranks("zero2", model, zero2, one)
    (went_on,) = found_by(zero2)["numbers"]
    assert went_on == pytest.approx(expected["numbers"][2], rel=1e-4, abs=1e-6)
    for folder in (ddp, zero2):
        check_same(folder / "last.safetensors", one / "last.safetensors", 2e-5)


def test_75_with_every_loss_and_an_adapter_two_ranks_have_the_numbers_gradients_and_weights_of_one(
    tiny_model: Path, tmp_path: Path
) -> None:
    teacher = make_tiny_model(tmp_path / rl_rank_losses.TEACHER, seed=5, initializer_range=0.3)
    run_ranks("ddp", tiny_model, tmp_path, script=rl_rank_losses.__file__)
    for case in rl_rank_losses.CASES:
        one = rl_rank_losses.ensemble(tiny_model, teacher, Ranks(Launch(), 0.0), case)
        plans = rl_rank_losses.plans(case, tiny_model, teacher)
        expected, wanted = rl_rank_losses.train(one, plans)
        found = json.loads((tmp_path / f"{case}.json").read_text())
        for step, (got, want) in enumerate(zip(found["numbers"], expected["numbers"], strict=True)):
            assert got == pytest.approx(want, rel=1e-6, abs=1e-9), f"{case}, step {step}"
        assert found["error"] == expected["error"]
        assert "must be finite, got nan and a gradient norm nan" in found["error"]
        assert found["kept"] and expected["kept"]
        tensors = load_file(tmp_path / f"{case}.safetensors")
        assert sum(name.startswith("gradient") for name in wanted) == 3
        for name, want in wanted.items():
            size = want.abs().max() if name.startswith("gradient") else 1.0
            assert size > 0
            assert (tensors[name] - want).abs().max() < 1e-6 * size, (case, name)
