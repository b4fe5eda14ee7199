"""The adapter on TRL's SFTTrainer: its loss by hand, exact resumption, nothing poisoned."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import make_tiny_model
from trl.trainer.sft_config import SFTConfig

from ground.adapter import Adapter
from ground.chat import ChatTemplate
from ground.checkpoints import Checkpoints
from ground.errors import DivergedError
from ground.launch import Launch
from ground.logprobs import model_logprobs
from ground.lora import LoraSection
from ground.metrics import Metrics, read_metrics
from ground.model import load_model, load_tokenizer, tensors_of
from ground.ranks import Ranks
from ground.records import Demonstration, Message
from ground.signals import Interrupted
from ground.trainer_config import TrainerSection
from ground.training import Fit
from ground.training_rows import IGNORED, TrainingRows, encode_demonstrations
from sft.trainer import run_sft

SECTION = TrainerSection(
    learning_rate=3e-3, rows_per_step=4, rows_per_pass=4, max_steps=6, save_every=3, log_every=1
)


class Bench:
    """A tiny model, twelve sums and a folder to train in."""

    def __init__(self, folder: Path, seed: int = 0, lora: LoraSection | None = None) -> None:
        self.folder = folder
        path = make_tiny_model(folder / "base", seed=seed)
        self.model, self.tokenizer = load_model(path), load_tokenizer(path)
        self.adapter = Adapter(self.model, lora, seed=seed, stage="sft") if lora else None
        demonstrations = [
            Demonstration(
                str(n), (Message("user", f"{n}+{n}"), Message("assistant", f"{2 * n}")), "sums"
            )
            for n in range(5, 17)
        ]
        chat = ChatTemplate(self.tokenizer)
        self.rows: TrainingRows = encode_demonstrations(demonstrations, chat, 100)
        self.checkpoints = Checkpoints(folder / "stage" / "checkpoints", keep=2)
        self.metrics_file = folder / "stage" / "metrics.jsonl"
        self.ranks = Ranks(Launch(), 0.0)

    def base(self) -> dict[str, torch.Tensor]:
        return self.adapter.base() if self.adapter else tensors_of(self.model)

    def train(self, section: TrainerSection = SECTION, *, resume: bool = False) -> int:
        with Metrics(self.metrics_file) as metrics:
            where = Fit(
                self.folder / "stage",
                metrics,
                self.checkpoints,
                section.max_seconds,
                self.ranks,
                self.adapter,
            )
            fitted = run_sft(
                self.model, self.tokenizer, self.rows, section, where, seed=1, resume=resume
            )
            return fitted.steps

    @property
    def losses(self) -> list[object]:
        return [record["loss"] for record in read_metrics(self.metrics_file)]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


def test_trl_s_loss_is_the_mean_over_trained_tokens(bench: Bench):
    """Contract: by hand from log-probs, over all twelve rows, in one step of several passes."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in bench.rows.rows:
            ids = torch.tensor([row.input_ids])
            logprobs, _ = model_logprobs(bench.model, ids, torch.ones_like(ids))
            trained = torch.tensor([label != IGNORED for label in row.labels])
            total -= float(logprobs[0, trained].sum())
            count += int(trained.sum())
    bench.train(
        SECTION.model_copy(
            update={"rows_per_step": 12, "rows_per_pass": 4, "max_steps": 1, "router_balance": 0.0}
        )
    )
    assert bench.losses[0] == pytest.approx(total / count, abs=1e-4)


def test_how_a_step_is_split_does_not_change_the_weights(tmp_path: Path):
    results = []
    for pass_size in (12, 3):
        bench = Bench(tmp_path / str(pass_size))
        section = {"rows_per_step": 12, "rows_per_pass": pass_size, "router_balance": 0.0}
        bench.train(SECTION.model_copy(update={**section, "max_steps": 3}))
        results.append(tensors_of(bench.model))
    for name in results[0]:
        torch.testing.assert_close(results[0][name], results[1][name], atol=2e-4, rtol=1e-3)


def test_the_sums_are_learnt_and_the_router_is_balanced(bench: Bench):
    steps = bench.train(SECTION.model_copy(update={"max_steps": 60, "save_every": 60}))
    assert steps == 60
    first, last = bench.losses[0], bench.losses[-1]
    assert isinstance(first, float) and isinstance(last, float) and last < 0.4 * first
    record = read_metrics(bench.metrics_file)[0]
    # Balanced experts give 1 per MoE layer; the shim is what lets TRL compute it.
    assert 0.5 < float(str(record["aux_loss"])) < 8
    assert {"grad_norm", "learning_rate", "entropy"} <= record.keys()
    assert (bench.folder / "stage" / "progress.json").exists()


def test_a_resumed_run_gives_the_same_bits(tmp_path: Path):
    whole, cut = Bench(tmp_path / "whole"), Bench(tmp_path / "cut")
    whole.train()
    cut.train(SECTION.model_copy(update={"max_steps": 6, "max_seconds": 1e-9}))
    assert [path.name for path in cut.checkpoints.steps()] == ["step_000001"]
    again = Bench(tmp_path / "again", seed=9)
    again.checkpoints = cut.checkpoints
    assert again.train(resume=True) == 6
    assert same(tensors_of(whole.model), tensors_of(again.model))
    assert [p.name for p in again.checkpoints.steps()] == ["step_000003", "step_000006"]


def test_an_adapter_s_checkpoint_holds_it_alone_and_resumes_to_the_same_bits(tmp_path: Path):
    """The base is the same; the resumed adapter begins with another A, and with dropout's state."""
    lora = LoraSection(rank=4, dropout=0.1)
    whole, cut = Bench(tmp_path / "whole", lora=lora), Bench(tmp_path / "cut", lora=lora)
    whole.train()
    cut.train(SECTION.model_copy(update={"max_seconds": 1e-9}))
    again = Bench(tmp_path / "again", lora=lora)
    assert again.adapter and whole.adapter
    for tensor in again.adapter.live().values():
        tensor.normal_()
    again.checkpoints = cut.checkpoints
    assert again.train(resume=True) == 6
    assert same(whole.adapter.live(), again.adapter.live())
    assert same(Bench(tmp_path / "plain").base(), again.adapter.base())
    checkpoint = again.checkpoints.steps()[-1]
    names = {file.name for file in checkpoint.iterdir()}
    assert "adapter_model.safetensors" in names and "model.safetensors" not in names
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert sum(each["exp_avg"].numel() for each in moments.values()) == whole.adapter.parameters


def test_steps_that_a_kill_made_vain_are_not_told_twice(bench: Bench):
    """Killed at step 5 with a checkpoint of step 3: steps 4 and 5 are done again."""
    bench.train(SECTION.model_copy(update={"max_steps": 3}))
    with Metrics(bench.metrics_file) as metrics:
        for step in (4, 5):
            metrics.log(step, {"loss": 99.0})
    again = Bench(bench.folder / "again", seed=9)
    again.checkpoints, again.metrics_file = bench.checkpoints, bench.metrics_file
    assert again.train(resume=True) == 6
    lines = [json.loads(line) for line in bench.metrics_file.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert max(line["loss"] for line in lines) < 99


def test_a_damaged_checkpoint_is_not_used(tmp_path: Path):
    bench = Bench(tmp_path / "first")
    bench.train()
    expected = tensors_of(bench.model)
    optimizer = bench.checkpoints.steps()[-1] / "optimizer.pt"
    content = bytearray(optimizer.read_bytes())
    content[len(content) // 2] ^= 1
    optimizer.write_bytes(content)
    again = Bench(tmp_path / "again", seed=9)
    again.checkpoints = bench.checkpoints
    assert again.train(resume=True) == 6
    assert same(expected, tensors_of(again.model))
    assert list(bench.checkpoints.root.glob("step_000006.damaged"))


def test_checkpoints_hold_what_resuming_needs_and_no_foreign_pickle(bench: Bench):
    bench.train()
    newest = bench.checkpoints.latest()
    assert newest is not None
    names = {file.name for file in newest.iterdir()}
    assert {"model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"} <= names
    assert not names & {"training_args.bin", "README.md"}
    assert not (bench.checkpoints.root / ".scratch").exists()


def test_nan_stops_before_the_weights_are_touched(bench: Bench):
    with torch.no_grad():
        bench.model.get_input_embeddings().weight[260] = float("nan")  # pyright: ignore[reportIndexIssue]
    before = tensors_of(bench.model)
    with pytest.raises(DivergedError, match=r"step 1: the loss must be finite") as caught:
        bench.train()
    assert caught.value.exit_code == 5
    after = tensors_of(bench.model)
    names = [name for name in before if "embed" not in name]
    assert same({name: before[name] for name in names}, after)


def test_a_gradient_that_is_not_finite_stops_before_the_weights_are_touched(bench: Bench):
    before = tensors_of(bench.model)
    weight = bench.model.get_parameter("model.norm.weight")
    weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(DivergedError, match="gradient must be finite"):
        bench.train()
    assert same(before, tensors_of(bench.model))


def test_a_signal_finishes_the_step_saves_and_interrupts(bench: Bench):
    steps_seen = 0

    def kill_at_second(*_: object) -> None:
        nonlocal steps_seen
        steps_seen += 1
        if steps_seen == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    bench.model.register_forward_pre_hook(kill_at_second)
    with pytest.raises(Interrupted) as caught:
        bench.train()
    assert caught.value.exit_code == 143
    assert [path.name for path in bench.checkpoints.steps()] == ["step_000002"]


class _Told(Ranks):
    """Another rank has got a signal, or has found that the time is up."""

    def __init__(self, number: int, is_late: int) -> None:
        super().__init__(Launch(), 0.0)
        self._said = number, is_late

    def greatest(self, *numbers: int) -> tuple[int, ...]:
        return self._said if len(numbers) == 2 else numbers


def test_a_signal_to_another_rank_interrupts_and_its_time_limit_does_not(tmp_path: Path):
    bench, late = Bench(tmp_path / "signal"), Bench(tmp_path / "late")
    bench.ranks, late.ranks = _Told(signal.SIGINT, 1), _Told(0, 1)
    with pytest.raises(Interrupted) as caught:
        bench.train()
    assert caught.value.exit_code == 130
    assert late.train() == 1
    for each in (bench, late):
        assert [path.name for path in each.checkpoints.steps()] == ["step_000001"]


class _Broken(Ranks):
    """Another rank's numbers are not finite."""

    def greatest(self, *numbers: int) -> tuple[int, ...]:
        return (1,)


def test_a_loss_of_another_rank_that_is_not_finite_stops_us_before_the_update(bench: Bench):
    bench.ranks, before = _Broken(Launch(), 0.0), tensors_of(bench.model)
    with pytest.raises(DivergedError, match=r"step 1: the loss .* that of another rank is not"):
        bench.train()
    assert same(before, tensors_of(bench.model))


def test_one_process_trains_on_one_gpu_of_several(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two in sight transformers would take twice the rows of every step."""

    def with_two(**arguments: Any) -> SFTConfig:
        config = SFTConfig(**arguments)
        config._n_gpu = 2
        return config

    monkeypatch.setattr("sft.trainer.SFTConfig", with_two)
    assert bench.train(SECTION.model_copy(update={"max_steps": 3})) == 3


def test_training_leaves_no_trace_in_the_config(bench: Bench):
    before = bench.model.config.to_dict()
    bench.train()
    assert bench.model.config.to_dict() == before


def test_the_step_is_split_over_processes():
    section = TrainerSection(rows_per_step=64, rows_per_pass=16)
    assert (section.pass_size(1), section.passes_per_step(1)) == (16, 4)
    assert (section.pass_size(2), section.passes_per_step(2)) == (16, 2)
    assert (section.pass_size(8), section.passes_per_step(8)) == (8, 1)
    small = TrainerSection(rows_per_step=4, rows_per_pass=16, epochs=2.5)
    assert (small.pass_size(1), small.passes_per_step(1)) == (4, 1)
    assert small.num_steps(9) == 8  # 3 steps an epoch, 2.5 epochs, rounded to even
    with pytest.raises(ValueError, match="multiple of rows_per_pass"):
        TrainerSection(rows_per_step=20, rows_per_pass=16)
