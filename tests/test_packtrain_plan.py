"""`packtrain plan`: the recipes that come with it, its arithmetic by hand, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from distill.teacher import LOGITS
from ground.config import JudgeSettings
from ground.errors import DataError, RecipeError
from ground.lora import LoraSection
from ground.recipe import load_recipe
from ground.shape import read_shape
from packtrain.cli import main
from packtrain.plan_text import judge_lines, seconds, short
from packtrain.recipe import read_recipe
from rl.config import RlSection
from rl.footprint import (
    TEACHER_LOGITS,
    engine_width,
    host_bytes,
    learner_footprint,
    require_machine,
)
from rl.forecast import Judges, forecast, useful_engines
from rl.hardware import DEVICES, Efficiency
from rl.roofline import Workload, decoding_step, handover_seconds, learner_seconds, workload_of
from rollout.places import PlacementError

ROOT = Path(__file__).parents[1]
LLAMA = read_shape(ROOT / "recipes" / "llama8b" / "shape")
H100 = DEVICES["h100"]


@pytest.mark.parametrize(
    ("name", "gpus", "kind", "workers"),
    [
        ("llama8b", 8, "h100", 2),
        ("scout", 256, "h100", 27),
        ("maverick", 512, "h100", 22),
        ("behemoth", 8192, "h200", 117),
    ],
)
def test_shipped_recipes_are_valid_and_planned_as_they_say(
    name: str, gpus: int, kind: str, workers: int, capsys: pytest.CaptureFixture[str]
) -> None:
    path = ROOT / "recipes" / name / "recipe.yaml"
    recipe = read_recipe(load_recipe(path))
    assert recipe.name == name and recipe.rl and recipe.rl.fleet.num_workers == workers
    assert main(["plan", str(path), "--gpus", str(gpus), "--gpu", kind]) == 0
    told = capsys.readouterr().out
    assert f"  {workers} engines x {recipe.rl.engine.num_slots} places" in told
    assert f"placement on {gpus:,} x {kind}" in told
    assert "for this plan" not in told  # num_workers is what the plan finds
    assert "a step takes about" in told and "model.path names /models/" in told


def test_behemoth_differs_from_scout_in_what_meta_said() -> None:
    small, large = (
        read_recipe(load_recipe(ROOT / "recipes" / name / "recipe.yaml"))
        for name in ("scout", "behemoth")
    )
    assert small.prune and large.prune and small.rl and large.rl
    assert (float(small.prune.share), float(large.prune.share)) == (0.5, 0.95)
    assert large.rl.groups_per_step == 4 * small.rl.groups_per_step
    assert len(large.systems.pools["any"]) > 1 and not small.systems.pools


def test_the_tiny_recipe_is_planned_on_this_machine(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(ROOT / "recipes" / "tiny" / "recipe.yaml")]) == 0
    told = capsys.readouterr().out
    assert "32 groups x 8 rollouts = 256 answers" in told and " x cpu" in told
    assert "(1 + 1) x 32 = 64 groups open at once" in told


def test_what_does_not_fit_is_exit_code_4_with_the_table(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = ["plan", str(ROOT / "recipes" / "scout" / "recipe.yaml"), "--gpus", "8"]
    assert main(line) == 4
    out, err = capsys.readouterr()
    assert "256 groups x 16 rollouts = 4,096 answers" in out  # what can be told is told
    assert "learner    34" in err and "rollout    64        8 x 8 side by side" in err
    assert "in all     98     8  devices" in err


def test_a_recipe_without_rl_or_shape_or_a_known_device_is_refused(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: r\nsft: {}\n")
    with pytest.raises(RecipeError, match="made for the rl stage"):
        _plan(str(recipe))
    recipe.write_text("name: r\nmodel: {path: /nowhere}\nrl: {steps: 1}\n")
    with pytest.raises(DataError, match=r"a plan needs the model's config\.json"):
        _plan(str(recipe))
    tiny = str(ROOT / "recipes" / "tiny" / "recipe.yaml")
    with pytest.raises(RecipeError, match="did you mean 'h100'"):
        _plan(tiny, "--gpu", "h10")
    with pytest.raises(RecipeError, match="at least 1"):
        _plan(tiny, "--gpus", "0")


def _plan(*words: str) -> None:
    from packtrain.cli import parse
    from packtrain.plan import command

    command(parse(["plan", *words]))


def _section(**changes: object) -> RlSection:
    return RlSection.model_validate({"steps": 10, "engine": {"max_length": 2048}, **changes})


def test_a_decoding_step_is_bytes_over_bandwidth() -> None:
    step = decoding_step(LLAMA, H100, 64, 1000, 1, Efficiency())
    read = 2 * (LLAMA.parameters - LLAMA.embedding) + 64 * 1000 * 131_072
    assert step == pytest.approx(read / (3.35e12 * 0.6) + 32 * 20e-6)
    assert step == pytest.approx(12.3e-3, rel=0.01)


def test_beyond_a_machine_stages_read_their_weights_for_each_micro_batch() -> None:
    """16 devices are two stages of 8: 64 rows are two micro-batches of 32, and each passes all the
    weights at the bandwidth of 8 devices. Twice the devices only halve the keys and values."""
    wide = decoding_step(LLAMA, H100, 64, 1000, 16, Efficiency(layer_seconds=0))
    weights = 2 * (LLAMA.parameters - LLAMA.embedding)
    assert wide == pytest.approx((weights + 32 * 1000 * 131_072) / (8 * 3.35e12 * 0.6))
    within = decoding_step(LLAMA, H100, 64, 1000, 8, Efficiency(layer_seconds=0))
    assert wide / within == pytest.approx(19.2 / 23.4, rel=0.01)


def test_a_large_batch_is_bound_by_arithmetic() -> None:
    step = decoding_step(LLAMA, H100, 4096, 1, 1, Efficiency(layer_seconds=0))
    assert step == pytest.approx(4096 * LLAMA.flops(1) / (989e12 * 0.4))


def test_the_learner_computes_three_passes_and_one_more_for_each_other_model() -> None:
    load = Workload(0, 1000, flat_share=0.0)
    three = learner_seconds(LLAMA, H100, load, _section(), Efficiency())
    assert three == pytest.approx(3 * 1000 * LLAMA.flops(500) / (989e12 * 0.4))
    loss = {"kind": "decoupled", "reference_kl": 0.1}
    five = learner_seconds(LLAMA, H100, load, _section(loss=loss), Efficiency())
    assert five == pytest.approx(5 / 3 * three)


def test_flat_groups_cost_samples_and_save_training() -> None:
    load = Workload(10, 10, flat_share=0.5, refills=2)
    assert load.sampled_per_slot == 1.75 and load.trained_per_slot == 0.875
    assert workload_of(_section(sampling={"max_new_tokens": 1024})).new_tokens == 512


def test_weights_travel_over_the_narrowest_network() -> None:
    size = 2 * LLAMA.parameters
    assert handover_seconds(LLAMA, H100, 4, 1, Efficiency()) == pytest.approx(size / 25e9)
    assert handover_seconds(LLAMA, H100, 2, 8, Efficiency()) == pytest.approx(size / 50e9)


def test_an_engine_is_as_wide_as_its_weights_and_cache_need() -> None:
    few = _section(engine={"num_slots": 8, "max_length": 2048})
    many = _section(engine={"num_slots": 512, "max_length": 2048})
    assert engine_width(LLAMA, H100, few, Efficiency()) == 1  # 16 + 2.1 GB of 72
    assert engine_width(LLAMA, H100, many, Efficiency()) == 4  # 16 + 137 GB
    behemoth = read_shape(ROOT / "recipes" / "behemoth" / "shape")
    assert engine_width(behemoth, H100, few, Efficiency()) == 64  # 4 TB over eight machines


def test_a_learner_holds_sixteen_bytes_a_parameter_over_all_its_devices() -> None:
    footprint = learner_footprint(LLAMA, H100, _section(), 1)
    assert sum(footprint.shared.values()) == 16 * LLAMA.parameters
    with_reference = learner_footprint(LLAMA, H100, _section(loss={"reference_kl": 0.1}), 1)
    assert sum(with_reference.shared.values()) == 20 * LLAMA.parameters
    assert footprint.on_each(8, 1)["weights"] == LLAMA.parameters / 2


def test_the_keeper_has_three_versions_in_the_learners_numbers() -> None:
    assert host_bytes(LLAMA) == 3 * 4 * LLAMA.parameters
    require_machine(LLAMA, H100)  # 96 GB of 2 TB
    behemoth = read_shape(ROOT / "recipes" / "behemoth" / "shape")
    with pytest.raises(PlacementError, match="they want 22259 GiB of a machine with h200") as error:
        require_machine(behemoth, DEVICES["h200"])  # 1,991.7e9 x 12 bytes
    assert "3 versions x 7,419.8" in error.value.why and "1863" in error.value.why


def test_an_adapter_has_gradients_and_moments_of_its_own_and_weights_on_each_device() -> None:
    """Rank 16 in a layer of Llama 3.1 8B: 2 · 16 · (4,096 + 4,096) for q and o, 2 · 16 · (4,096 +
    1,024) for k and v, 3 · 16 · (4,096 + 14,336) for the MLP: 1,310,720; 32 layers."""
    lora, trained, whole = LoraSection(rank=16), 32 * 1_310_720, LLAMA.parameters
    section = _section(lora={"rank": 16}, loss={"reference_kl": 0.1})
    parts = learner_footprint(LLAMA, H100, section, 1).on_each(8, 1)
    assert parts["weights"] == 4 * whole and "reference" not in parts
    assert (parts["gradients"], parts["moments (AdamW)"]) == (4 * trained, 8 * trained)
    assert host_bytes(LLAMA, lora) == 4 * (whole + 3 * trained)
    full, sent = (handover_seconds(LLAMA, H100, 2, 8, Efficiency(), each) for each in (None, lora))
    assert sent / full == pytest.approx(trained / whole)
    load = workload_of(section)
    ours, all_weights = (
        learner_seconds(LLAMA, H100, load, _section(**each), Efficiency())
        for each in ({"lora": {"rank": 16}}, {})
    )
    assert ours / all_weights == pytest.approx(2 / 3)


def test_an_engine_of_vllm_is_as_wide_as_the_recipe_says() -> None:
    def width(parallel: int) -> int:
        engine = {"kind": "vllm", "tensor_parallel": parallel, "max_length": 2048}
        return engine_width(LLAMA, H100, _section(engine=engine), Efficiency())

    assert (width(1), width(4)) == (1, 4)  # 1: the fewest that hold it
    with pytest.raises(RecipeError, match="a power of two that divides the 32 heads, got 6"):
        width(6)


def test_the_plan_names_the_engines_keys_and_a_library_that_is_missing(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(ROOT / "recipes" / "llama8b" / "recipe.yaml")
    assert main(["plan", path, "--gpus", "8"]) == 0
    told = capsys.readouterr().out
    assert "an engine of 2 devices: rl.engine.kind=vllm rl.engine.tensor_parallel=2" in told
    monkeypatch.setattr("rollout.installed.vllm_version", lambda: None)
    wide = ["rl.engine.kind=vllm", "rl.engine.tensor_parallel=4", "rl.fleet.num_workers=1"]
    assert main(["plan", path, "--gpus", "8", *wide]) == 0
    told = capsys.readouterr().out
    assert "1 x 4: " in told and "an engine of" not in told
    assert "  rl.engine.kind: vllm needs vLLM, which is not installed" in told
    assert "model.path names /models/" in told


def test_the_plan_of_an_adapter_says_what_it_leaves_out_and_recommends_nothing_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = str(ROOT / "recipes" / "llama8b" / "recipe.yaml")
    told = list[str]()
    for overrides in ([], ["rl.lora.rank=16"]):
        assert main(["plan", path, "--gpus", "8", *overrides]) == 0
        told.append(capsys.readouterr().out)
    assert ["not counted: each worker adds" in each for each in told] == [False, True]
    assert ["ZeRO" in each for each in told] == [True, False]


def test_more_engines_than_open_groups_can_fill_are_left_over() -> None:
    section = _section(groups_per_step=4, group_size=4, engine={"num_slots": 8, "max_length": 512})
    assert useful_engines(section) == 4  # (1 + 1) x 16 answers in places of 8
    planned = forecast(LLAMA, section, H100, 64, load=workload_of(section))
    assert planned.replicas("rollout") <= 4 and planned.placement.left_over > 0


def test_in_turns_a_step_is_the_sum_and_waits_for_the_longest_answer() -> None:
    sync, overlapped = (
        forecast(LLAMA, section, H100, 8, load=workload_of(section))
        for section in (_section(max_staleness=0), _section(max_staleness=1))
    )
    work = sum(sync.placement.paces.values()) * sync.samples
    assert sync.step_seconds >= work > overlapped.step_seconds
    assert overlapped.step_seconds == max(overlapped.placement.paces.values()) * sync.samples
    few = _section(max_staleness=0, groups_per_step=1, group_size=2)
    lonely = forecast(LLAMA, few, H100, 8, load=workload_of(few))
    assert lonely.step_seconds > lonely.answer_seconds > lonely.placement.paces["rollout"] * 2


def test_a_hopeless_placement_is_refused_before_anybody_waits() -> None:
    behemoth = read_shape(ROOT / "recipes" / "behemoth" / "shape")
    with pytest.raises(PlacementError, match="they want"):
        forecast(behemoth, _section(), H100, 64, load=workload_of(_section()))


def test_numbers_are_said_as_a_person_says_them() -> None:
    assert [short(n) for n in (418, 693_504, 8.03e9, 1.9917e12)] == [
        "418",
        "693.5k",
        "8.03B",
        "1.992T",
    ]
    assert [seconds(n) for n in (0.25, 85, 93, 200_000)] == ["0.25 s", "85 s", "1.6 min", "2.3 d"]


def test_a_teacher_is_placed_beside_the_others_as_often_as_the_recipe_says() -> None:
    """8B in FP32 are 32 GB; a forward pass over 1536 tokens at 40 % of 989e12, for 0.91 groups."""
    section = _section(distill={"num_teachers": 2})
    load = workload_of(section)
    planned = forecast(LLAMA, section, H100, 16, load=load, teacher=LLAMA)
    assert planned.placement.devices["teacher"] == 2
    assert planned.memory("teacher")["weights"] == LLAMA.parameters * 4
    cost = 0.91 * load.tokens * LLAMA.flops(load.tokens / 2, is_routed=False) / (989e12 * 0.4)
    assert planned.placement.paces["teacher"] == pytest.approx(cost / 2)
    with pytest.raises(PlacementError) as caught:
        forecast(LLAMA, section, H100, 3, load=load, teacher=LLAMA)
    assert "teacher     2" in caught.value.why


def test_judges_are_placed_beside_the_others_where_they_compute() -> None:
    """512 + 2 x 1024 tokens in two orders for 1.3 groups; vLLM's on two GPUs each, in BF16."""
    section = _section()
    load = workload_of(section, 1024)
    assert (load.prompt_tokens, load.new_tokens, load.sampled_per_slot) == (512, 1024, 1.3)
    settings = JudgeSettings(
        kind="vllm", replicas=3, tensor_parallel=2, max_length=4096, max_answer_tokens=2048
    )
    planned = forecast(LLAMA, section, H100, 16, load=load, judges=Judges(LLAMA, settings))
    assert planned.placement.devices["judge"] == 6
    assert planned.memory("judge")["weights"] == LLAMA.parameters * 2 / 2
    cost = 1.3 * 2 * 2560 * LLAMA.flops(1280) / (989e12 * 0.4)
    assert planned.placement.paces["judge"] == pytest.approx(cost / 6)
    short = settings.model_copy(update={"max_answer_tokens": 488, "both_orders": False})
    planned = forecast(LLAMA, section, H100, 16, load=load, judges=Judges(LLAMA, short))
    cost = 1.3 * 1488 * LLAMA.flops(744) / (989e12 * 0.4)
    assert planned.placement.paces["judge"] == pytest.approx(cost / 6)
    likelihood = settings.model_copy(update={"read": "likelihood", "both_orders": False})
    planned = forecast(LLAMA, section, H100, 16, load=load, judges=Judges(LLAMA, likelihood))
    cost = 1.3 * 2 * 1536 * LLAMA.flops(768) / (989e12 * 0.4)
    assert planned.placement.paces["judge"] == pytest.approx(cost / 6)
    assert planned.num_beside == 6
    with pytest.raises(RecipeError, match=r"judge\.tensor_parallel must be a power of two"):
        odd = settings.model_copy(update={"tensor_parallel": 3})
        forecast(LLAMA, section, H100, 16, load=load, judges=Judges(LLAMA, odd))
    beside = Judges(LLAMA, JudgeSettings(replicas=3))
    planned = forecast(LLAMA, section, H100, 16, load=load, judges=beside)
    assert "judge" not in planned.placement.devices
    assert [line for line in judge_lines(beside, H100) if line] == [
        "judges: 3 x 1 processors beside these devices, their time is not counted "
        "(judge.kind=vllm puts them there)"
    ]


def test_a_plan_counts_the_judge_that_the_recipe_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"extends: {ROOT}/recipes/tiny/recipe.yaml\njudge: {{replicas: 2}}\n")
    assert main(["plan", str(recipe), "--gpu", "cpu", "--gpus", "3"]) == 4
    assert "they want 4 devices, there are 3" in capsys.readouterr().err
    assert main(["plan", str(recipe), "--gpu", "cpu", "--gpus", "5", "--simulate"]) == 0
    said = capsys.readouterr().out
    assert "in turns on all 3 devices" in said and "they keep 2 of 5 devices" in said
    assert "judge         2 devices" in said and "as if every prompt had `reward: judge`" in said


def test_a_teachers_chunk_of_logits_is_that_of_its_code() -> None:
    assert TEACHER_LOGITS == LOGITS
