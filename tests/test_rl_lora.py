"""RL of an adapter: what is trained, kept, handed over and left, and that kills change nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_llama
from peft import PeftModel
from rl_doubles import make_group, make_learner, make_plan
from rl_local import Killer, LocalLoop, LocalRun
from rl_runs import Run, nothing_left
from safetensors.torch import load_file
from torch import Tensor

from ground import faults
from ground.errors import DataError
from ground.faults import Faults
from ground.merge import merged_targets
from ground.metrics import read_metrics
from ground.model import load_model, tensors_of
from ground.storage import verify_directory
from ground.strikes import kill9
from rl.audit import audit_run

LORA = {"rank": 4, "targets": ["q_proj", "v_proj", "down_proj"]}
NUMBERS = 4 * 4 * (64 + 48) + 4 * 2 * (96 + 64)
"""Four layers of q_proj and v_proj, two dense and two shared down_proj, rank 4."""


@pytest.fixture
def killer(monkeypatch: pytest.MonkeyPatch) -> Killer:
    killer = Killer()
    monkeypatch.setattr(faults, "point", killer.point)
    monkeypatch.setattr(faults, "corrupted", killer.corrupted)
    return killer


def numbers_of(run: LocalRun) -> list[dict[str, float]]:
    return [report.numbers for report in run.ear.reports if report.kind == "step"]


def test_synchronous_training_of_an_adapter_ends_alike_with_and_without_kills(
    tiny_model: Path, ram_path: Path, killer: Killer
) -> None:
    settings: dict[str, Any] = {"max_staleness": 0, "steps": 4, "lora": LORA}
    unbroken = LocalRun(ram_path / "unbroken", tiny_model, killer, **settings)
    assert unbroken.live()
    broken = LocalRun(ram_path / "broken", tiny_model, killer, jitter=0.01, **settings)
    for aim in (("step.applied", 3), ("cut.staged", 1), ("export", 1)):
        killer.aim(*aim)
        assert not broken.live()
    killer.rest()
    assert broken.live()
    assert broken.facts() == unbroken.facts()
    assert audit_run(broken.directory, broken.section)["lost"] == 0


@pytest.fixture
def sinking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each version does worse than the one before."""
    publish = LocalLoop.publish

    def scored(
        loop: LocalLoop, version: int, weights: Mapping[str, Tensor], evaluate: bool
    ) -> float | None:
        return None if publish(loop, version, weights, evaluate) is None else 1 / (version + 1)

    monkeypatch.setattr(LocalLoop, "publish", scored)


@pytest.mark.usefixtures("sinking")
def test_a_run_keeps_and_hands_over_what_it_has_trained_and_leaves_what_did_best(
    tiny_model: Path, ram_path: Path, killer: Killer
) -> None:
    """The best version is the second, the last one the third."""
    run = LocalRun(ram_path / "rl", tiny_model, killer, steps=3, lora=LORA)
    assert run.live()
    cut = load_file(run.directory / "checkpoints" / "step_000003" / "model.safetensors")
    assert sum(each.numel() for each in cut.values()) == NUMBERS
    moments = load_file(run.directory / "checkpoints" / "step_000003" / "optimizer.safetensors")
    assert sum(v.numel() for k, v in moments.items() if k.endswith("exp_avg")) == NUMBERS
    assert {numbers["handover_bytes"] for numbers in numbers_of(run)} == {4 * NUMBERS}
    for folder in ("model", "adapter"):
        verify_directory(run.directory / folder)
    base, left = tensors_of(load_model(tiny_model)), load_model(run.directory / "model")
    saved = load_file(run.directory / "adapter" / "adapter_model.safetensors")
    adapter = {name.removeprefix("base_model.model."): each for name, each in saved.items()}
    kept = run.directory / "checkpoints" / "best" / "step_000002" / "model.safetensors"
    best, name = load_file(kept), "model.layers.0.self_attn.q_proj.lora_B.weight"
    assert best.keys() == adapter.keys()
    assert all(torch.equal(best[name], each) for name, each in adapter.items())
    assert bool(adapter[name].any()) and not torch.equal(adapter[name], cut[name])
    wanted = base | dict(merged_targets(base, adapter, 8.0))
    assert all(torch.equal(each, wanted[name]) for name, each in tensors_of(left).items())
    theirs = PeftModel.from_pretrained(load_model(tiny_model), str(run.directory / "adapter"))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        got = theirs(input_ids=ids).logits
        torch.testing.assert_close(got, left(ids).logits, atol=1e-5, rtol=1e-5)


def test_a_cut_of_another_base_or_scale_is_not_gone_on_from(
    tmp_path: Path, ram_path: Path, killer: Killer
) -> None:
    path = make_tiny_llama(tmp_path / "one")
    first = LocalRun(ram_path, path, killer, steps=2, lora={"rank": 2})
    killer.aim("cut.committed", 1)
    assert not first.live()
    killer.rest()
    for model, lora, what in (
        (make_tiny_llama(tmp_path / "two", seed=1), {"rank": 2}, "another run: base"),
        (path, {"rank": 2, "alpha": 8}, "another run: lora"),
    ):
        other = LocalRun(ram_path, model, killer, steps=2, lora=lora)
        with pytest.raises(DataError, match=what):
            other.live()


def test_a_step_of_an_adapter_has_the_loss_of_the_merged_model_against_the_same_reference(
    tiny_model: Path,
) -> None:
    """Both have moved away from the base, which the KL term is measured to: for the adapter that is
    itself switched off. After the step the base is as it was."""
    plan = make_plan(*(make_group(number) for number in range(3)))
    loss = {"reference_kl": 0.3}
    ours = make_learner(tiny_model, lora=LORA, loss=loss)
    assert ours.adapter
    generator = torch.Generator().manual_seed(5)
    for tensor in ours.adapter.live().values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype) * 0.1)
    base = {name: each.clone() for name, each in ours.adapter.base().items()}
    merged = base | dict(merged_targets(base, ours.adapter.live(), ours.adapter.scale))
    whole = make_learner(tiny_model, loss=loss)
    whole.update.load(merged, {})
    numbers, wanted = ours.step(plan), whole.step(plan)
    for name in ("loss", "entropy", "ess_applied"):
        assert numbers[name] == pytest.approx(wanted[name], abs=1e-9)
    without = make_learner(tiny_model)
    without.update.load(merged, {})
    assert abs(without.step(plan)["loss"] - wanted["loss"]) > 1e-3  # the reference counts
    assert all(torch.equal(each, base[name]) for name, each in ours.adapter.base().items())
    parts = {key.split(".")[0] for key in ours.update.moments()}
    assert len(parts) == len(ours.adapter.live()) == 2 * 12


@pytest.fixture
def run(tiny_model: Path, tmp_path: Path) -> Iterator[Run]:
    plan = Faults(tmp_path).at("learner", "step.applied", 5).do(kill9)
    with nothing_left(Run(tmp_path, tiny_model, faults=plan, rl={"lora": LORA})) as run:
        yield run


@pytest.mark.slow
def test_a_killed_learner_comes_back_with_its_adapter_and_hands_its_base_over_again(
    run: Run,
) -> None:
    output = run.finish()
    assert run.process.returncode == 0, output
    summary = run.check_finished()
    (again,) = run.events("restart")
    adapter = summary["adapter"]
    assert isinstance(adapter, dict) and adapter["parameters"] == NUMBERS
    records = read_metrics(run.stage / "metrics.jsonl")
    handed = [each["handover_bytes"] for each in records if "handover_bytes" in each]
    assert handed and set(handed) == {4.0 * NUMBERS}
    later = [e for e in run.events("lost") if float(str(e["time"])) > float(str(again["time"]))]
    assert not later, "the first life's worker may be seen to end before its controller does"
    gaps = [float(str(each["fresh_gap_mean"])) for each in records if "fresh_gap_mean" in each]
    assert gaps and max(map(abs, gaps)) < 1e-4
