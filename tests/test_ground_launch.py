"""What a launcher asked for, how ranks find each other, and what they are refused."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest
import torch
from launching import RECIPES, free_port, needs_deepspeed, rank_environment
from torch import nn
from torch.distributed import DistStoreError

from ground.errors import InfraError, RecipeError, SetupError
from ground.launch import HELD, Kind, Launch, launch_of, of_launcher, variables_of
from ground.ranks import Ranks, is_lost_rank, lost_ranks, require_possible, wrapper_of
from ground.roll import Roll
from ground.row_stream import RowStream
from ground.trainer_config import TrainerSection
from packtrain.launch_file import check_launch_file, require_launchable
from packtrain.recipe import Recipe
from rl.config import LearnerSection
from rl.train import require_known, require_one_starter

ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "RANK": "1", "WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, Launch("single", 0, 1)),
        ({"RANK": "1", "WORLD_SIZE": "4"}, Launch("ddp", 1, 4)),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, Launch("zero3", 1, 2)),
        (ZERO, Launch("zero2", 1, 2)),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"},
            Launch("fsdp2", 0, 2),
        ),
    ],
)
def test_what_was_asked_for_is_read_from_the_environment(
    environment: dict[str, str], wanted: Launch
) -> None:
    assert launch_of(environment) == wanted


@pytest.mark.parametrize("kind", ["ddp", "zero2", "zero3"])
def test_a_rank_that_no_launcher_starts_is_told_what_a_launcher_would_tell(kind: Kind) -> None:
    launch = Launch(kind, 2, 4)
    told = variables_of(launch, "10.0.0.7", 40123, attempt=5)
    assert launch_of(told) == launch
    assert (told["MASTER_ADDR"], told["MASTER_PORT"]) == ("10.0.0.7", "40123")
    assert of_launcher(told)["RANK"] == "2", "its own children must be that rank too"


def test_words_in_a_store_at_any_free_port_are_those_of_one_attempt() -> None:
    """The process that holds it speaks as rank 0, and is none of the ranks."""
    told = variables_of(Launch("ddp", 0, 2), "127.0.0.1", 0, attempt=1)
    held = Roll({name: value for name, value in told.items() if name != HELD})
    assert held.port > 0
    first, other, later = (
        Roll(variables_of(Launch("ddp", rank, 2), "127.0.0.1", held.port, attempt=attempt))
        for rank, attempt in ((0, 1), (1, 1), (1, 2))
    )
    held.tell("devices", "0")
    assert [roll.heard("devices") for roll in (first, other, later)] == ["0", "0", None]


def test_a_deepspeed_file_says_its_own_stage(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    environment = {**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    assert launch_of(environment).kind == "zero3"
    file.write_text("{}")
    with pytest.raises(SetupError, match=r"zero_optimization\.stage"):
        launch_of(environment)


@pytest.mark.parametrize(
    ("more", "what"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "FSDP version 1"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, "ZeRO stage 0"),
        ({**ZERO, "ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, "ZeRO stage 1"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, r"mixed precision \(bf16\)"),
        ({**ZERO, "ACCELERATE_MIXED_PRECISION": "fp16"}, r"mixed precision \(fp16\)"),
    ],
)
def test_what_packtrain_does_not_run_is_refused(more: dict[str, str], what: str) -> None:
    with pytest.raises(SetupError, match=f"asks for {what}, which packtrain does not run"):
        launch_of({"RANK": "0", "WORLD_SIZE": "2", **more})


def test_mixed_precision_is_refused_in_one_process_too() -> None:
    """accelerate gives a single process no rank, and the precision all the same."""
    with pytest.raises(SetupError, match=r"mixed precision \(bf16\)"):
        launch_of({"ACCELERATE_MIXED_PRECISION": "bf16"})
    assert launch_of({"ACCELERATE_MIXED_PRECISION": "no"}) == Launch()


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"bf16": {"enabled": True}}, r"mixed precision \(bf16\)"),
        ({"fp16": {"enabled": True}}, r"mixed precision \(fp16\)"),
        ({"zero_optimization": {"stage": 1}}, "ZeRO stage 1"),
    ],
)
def test_a_deepspeed_file_is_held_to_the_same(
    settings: dict[str, object], what: str, tmp_path: Path
) -> None:
    file = tmp_path / "ds.json"
    environment = {**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    usual: dict[str, object] = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}
    file.write_text(json.dumps(usual))
    assert launch_of(environment) == Launch("zero2", 1, 2)
    file.write_text(json.dumps(usual | settings))
    with pytest.raises(SetupError, match=f"asks for {what}"):
        launch_of(environment)


def test_offloading_is_seen_in_either_file_and_refused_by_rl(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    zero = {"stage": 3, "offload_param": {"device": "cpu"}, "offload_optimizer": None}
    file.write_text(json.dumps({"zero_optimization": zero}))
    named = {**ZERO, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}
    field = {**ZERO, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}
    assert not launch_of(
        {**field, "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none"}
    ).offloads
    for environment in (named, field):
        with pytest.raises(SetupError, match="rl does not run with DeepSpeed's offloading"):
            require_known(launch_of(environment))


def test_fsdp2_without_a_gpu_is_refused_because_it_would_be_ddp() -> None:
    launch = Launch("fsdp2", 0, 2)
    with pytest.raises(SetupError, match="FSDP2 needs a GPU") as refusal:
        require_possible(launch, has_gpu=False)
    assert "turns FSDP2 into DDP in silence" in refusal.value.why
    require_possible(launch, has_gpu=True)


def test_another_wrapper_or_number_of_ranks_than_asked_for_is_refused() -> None:
    module = nn.Linear(2, 2)
    assert wrapper_of(module) == "single"
    Ranks(Launch(), 0.0).check(1, module)
    with pytest.raises(SetupError, match="by zero3 on 2 ranks, but it is single on 2 ranks"):
        Ranks(Launch("zero3", 0, 2), 0.0).check(2, module)
    with pytest.raises(SetupError, match="by single on 1 rank, but it is data parallel on 1 rank"):
        Ranks(Launch(), 0.0).check(1, nn.DataParallel(module))
    with pytest.raises(SetupError, match="by ddp on 2 ranks, but it is ddp on 1 rank"):
        Ranks(Launch("ddp", 0, 2), 0.0).check(1)


def test_only_a_rank_s_own_child_inherits_what_makes_it_a_rank() -> None:
    environment = {**rank_environment("zero2", 1, 5000), "PATH": "/bin", "FSDP_VERSION": "2"}
    inherited = of_launcher(environment)
    assert environment.keys() - inherited.keys() == {"PATH"}
    assert launch_of(inherited) == Launch("zero2", 1, 2)


def test_deepspeed_s_checkpoints_fit_their_own_layout_alone() -> None:
    assert Launch("ddp", 0, 2).layout == Launch().layout == "whole"
    assert Launch("fsdp2", 0, 2).layout == "fsdp2 on 2 ranks"
    assert Launch("zero2", 0, 2).layout != Launch("zero2", 0, 4).layout


def test_the_words_of_a_rank_that_is_gone_become_ours() -> None:
    closed = RuntimeError("[…/gloo/transport/tcp/pair.cc:553] Connection closed by peer")
    assert is_lost_rank(closed) and is_lost_rank(DistStoreError("no such key"))
    assert not is_lost_rank(RuntimeError("the peer of recv has another shape; connection to nccl"))
    with pytest.raises(RuntimeError, match="gloo/"), lost_ranks(Launch(), "train on", 30):
        raise closed
    with (
        pytest.raises(InfraError, match="rank 1 must train on within 30 s, but another of the 2"),
        lost_ranks(Launch("ddp", 1, 2), "train on", 30),
    ):
        raise closed
    with pytest.raises(RuntimeError, match="shapes"), lost_ranks(Launch("ddp", 1, 2), "x", 1):
        raise RuntimeError("shapes differ")


def test_a_word_is_heard_when_it_comes_and_missed_by_name_when_it_does_not() -> None:
    port = free_port()
    first = Roll({**os.environ, **rank_environment("ddp", 0, port)})
    second = Roll({**os.environ, **rank_environment("ddp", 1, port)})
    threading.Timer(0.2, first.tell, ("verdict", "go")).start()
    assert second.hear("verdict", "hear", 10) == "go"
    first.beat()
    assert (second.beats(0), second.beats(1)) == (1, 0)
    with pytest.raises(InfraError, match=r"rank 0 of 2 must find rank 1 within 0\.2 s"):
        first.gather("world", 0.2)
    second.tell("world/here/1", "here")
    first.gather("world", 5)


def test_without_the_launcher_s_store_all_rolls_of_rank_0_and_its_child_share_one() -> None:
    given = {**os.environ, **rank_environment("ddp", 0, free_port())}
    first, second = Roll(given), Roll(given)
    first.tell("verdict", "go")
    assert second.heard("verdict") == Roll(of_launcher(given)).heard("verdict") == "go"


def test_what_ranks_told_before_a_launcher_s_restart_is_not_heard_after_it() -> None:
    given = {**os.environ, **rank_environment("ddp", 0, free_port())}
    before = Roll({**given, "TORCHELASTIC_RESTART_COUNT": "0"})
    before.tell("sft/verdict", "stop")
    after = Roll({**given, "TORCHELASTIC_RESTART_COUNT": "1"})
    assert before.heard("sft/verdict") == "stop" and after.heard("sft/verdict") is None


def test_a_store_that_cannot_be_reached_is_an_infra_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ground.roll._CONNECT_SECONDS", 0.1)
    given = {**os.environ, **rank_environment("ddp", 1, free_port())}
    with pytest.raises(InfraError, match=r"rank 1 of 2 must reach the store at 127\.0\.0\.1"):
        Roll(given)


def test_a_run_reads_one_shuffled_pass_after_another_and_ends_at_its_last_step() -> None:
    order = list(RowStream(5, 12, seed=3))
    assert len(order) == len(RowStream(5, 12, seed=3)) == 12
    assert sorted(order[:5]) == sorted(order[5:10]) == [0, 1, 2, 3, 4]
    assert order == list(RowStream(5, 12, seed=3)) != list(RowStream(5, 12, seed=4))
    generator = torch.Generator().manual_seed(3)
    assert order[:5] == torch.randperm(5, generator=generator).tolist()


def test_ranks_that_would_make_another_step_are_refused() -> None:
    section = TrainerSection(rows_per_step=64, rows_per_pass=16)
    for num_ranks in (1, 2, 4, 8, 64):
        section.require_divisible(num_ranks)
    with pytest.raises(RecipeError, match=r"3 ranks cannot share the 64 rows.*steps of 48"):
        section.require_divisible(3)
    with pytest.raises(RecipeError, match=r"128 ranks cannot share the 64 rows.*steps of 128"):
        section.require_divisible(128)


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("distributed_type: TPU\n", "distributed_type must be one of .*, got 'TPU'"),
        ("distributed_type: [\n", "must be YAML"),
        ("just words\n", "got 'just words'"),
        ("distributed_type: MULTI_CPU\nnum_processes: two\n", "num_processes .* must be numbers"),
    ],
)
def test_a_file_that_is_no_launch_file_is_refused(tmp_path: Path, content: str, what: str) -> None:
    path = tmp_path / "launch.yaml"
    path.write_text(content)
    with pytest.raises(RecipeError, match=what):
        check_launch_file(path)
    path.write_text("distributed_type: NO\n")
    assert check_launch_file(path) == Launch()


def test_deepspeed_that_is_not_installed_is_said_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    path = tmp_path / "launch.yaml"
    path.write_text("distributed_type: DEEPSPEED\n")
    with pytest.raises(SetupError, match="DeepSpeed, which is not installed"):
        check_launch_file(path)
    with pytest.raises(SetupError, match="zero2 needs DeepSpeed, which is not installed"):
        require_possible(Launch("zero2", 0, 2), has_gpu=False)


def test_ranks_that_both_a_launcher_and_ray_would_start_are_refused() -> None:
    two, one = LearnerSection(num_ranks=2), LearnerSection()
    require_one_starter(Launch(), two)
    require_one_starter(Launch("ddp", 0, 2), one)
    with pytest.raises(SetupError, match=r"has made ddp on 4 ranks, .* asks Ray for 2"):
        require_one_starter(Launch("ddp", 0, 4), two)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2", pytest.param("zero2", marks=needs_deepspeed)])
def test_a_shipped_launch_file_asks_for_what_its_name_says(kind: Kind) -> None:
    assert check_launch_file(RECIPES / f"{kind}.yaml") == Launch(kind, 0, 2)
    assert check_launch_file(RECIPES / "cpu.yaml") == Launch()


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("distributed_type: MULTI_GPU\nmixed_precision: bf16\n", r"mixed precision \(bf16\)"),
        ("distributed_type: FSDP\nfsdp_config: {}\n", "FSDP version 1"),
        ("distributed_type: NO\nmixed_precision: fp16\n", r"mixed precision \(fp16\)"),
    ],
)
def test_a_launch_file_is_held_to_what_packtrain_runs(
    tmp_path: Path, content: str, what: str
) -> None:
    path = tmp_path / "launch.yaml"
    path.write_text(content)
    with pytest.raises(SetupError, match=f"asks for {what}"):
        check_launch_file(path)


@needs_deepspeed
def test_offloading_is_read_from_the_launch_file_and_from_the_file_that_it_names(
    tmp_path: Path,
) -> None:
    path, named = tmp_path / "launch.yaml", tmp_path / "ds.json"
    shipped = (RECIPES / "zero3.yaml").read_text()
    path.write_text(shipped.replace("offload_param_device: none", "offload_param_device: cpu"))
    assert check_launch_file(path) == Launch("zero3", 0, 2, offloads=True)
    named.write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    path.write_text(
        f"distributed_type: DEEPSPEED\ndeepspeed_config: {{deepspeed_config_file: {named}}}\n"
    )
    assert check_launch_file(path) == Launch("zero2", 0, 1)


@pytest.mark.parametrize(
    ("stages", "launch", "what"),
    [
        ({"rl": {"lora": {}}}, Launch("zero3", 0, 2), r"rl\.lora runs on one rank or with DDP"),
        ({"sft": {"lora": {}}}, Launch("zero2", 0, 2), r"sft\.lora runs on one rank"),
        ({"dpo": {"lora": {}}}, Launch("fsdp2", 0, 2), r"dpo\.lora runs on one rank"),
        ({"sft": {"distill": {}}}, Launch("zero3", 0, 2), r"sft\.distill needs the whole model"),
        ({"sft": {"distill": {}}}, Launch("fsdp2", 0, 2), r"sft\.distill needs the whole model"),
        ({"rl": {"distill": {}}}, Launch("zero3", 0, 2), r"rl\.distill needs the whole model"),
        ({"rl": {}}, Launch("fsdp2", 0, 2), "rl does not run on FSDP2"),
        ({"rl": {"learner": {"num_ranks": 2}}}, Launch("ddp", 0, 2), "or Ray starts the learner"),
    ],
)
def test_what_a_stage_would_refuse_hours_later_is_refused_with_the_recipe(
    stages: dict[str, dict[str, object]], launch: Launch, what: str
) -> None:
    if "rl" in stages:
        stages = {"rl": {"steps": 1, **stages["rl"]}}
    recipe = Recipe.model_validate({"name": "x", **stages})
    require_launchable(Launch(), recipe)
    with pytest.raises(SetupError, match=what):
        require_launchable(launch, recipe)
    plain = Recipe.model_validate({"name": "x", "sft": {}, "dpo": {}})
    require_launchable(launch, plain)
