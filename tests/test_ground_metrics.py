"""metrics.jsonl survives crashes and resumes; trackers never hold training up; plain progress."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from ground.console import plain_text, progress
from ground.errors import DataError, SetupError
from ground.metrics import Metrics, read_metrics
from ground.sinks import MAX_WAITING, Sink, open_sinks


class Tracker:
    """Keeps what it is given; waits at `gate` and fails at `fail_at` on order."""

    def __init__(self, gate: threading.Event | None = None, fail_at: int = -1) -> None:
        self.gate, self.fail_at = gate, fail_at
        self.records: list[tuple[int, Mapping[str, float]]] = []
        self.closed = False

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        if self.gate is not None:
            self.gate.wait(20)
        if step == self.fail_at:
            raise ConnectionError("tracker is down, key hf_abcdefghijklmnopqrstuv")
        self.records.append((step, numbers))

    def close(self) -> None:
        self.closed = True


def test_records_come_back_as_written(tmp_path: Path):
    path = tmp_path / "sft" / "metrics.jsonl"
    with Metrics(path) as metrics:
        metrics.log(1, {"loss": 2.5, "rows": 8})
        metrics.log(1, {"pass@1": 0.5}, phase="evaluate")
    first, second = read_metrics(path)
    assert first.pop("time") and second.pop("time")
    assert first == {"step": 1, "loss": 2.5, "rows": 8}
    assert second == {"step": 1, "phase": "evaluate", "pass@1": 0.5}
    assert read_metrics(tmp_path / "none.jsonl") == []


def test_numbers_that_are_not_finite_are_named(tmp_path: Path):
    with Metrics(tmp_path / "m.jsonl") as metrics:
        metrics.log(3, {"loss": math.nan, "norm": math.inf, "lr": 0.1})
    (record,) = read_metrics(tmp_path / "m.jsonl")
    assert record["loss"] is None and record["lr"] == 0.1
    assert record["nonfinite"] == ["loss", "norm"]


@pytest.mark.parametrize("torn", ["{", '{"step": 3, "loss": 1.0}', "x" * 10_000])
def test_a_torn_last_line_is_dropped_and_the_next_record_is_whole(tmp_path: Path, torn):
    path = tmp_path / "m.jsonl"
    with Metrics(path) as metrics:
        metrics.log(1, {"loss": 1.0})
        metrics.log(2, {"loss": 2.0})
    with path.open("a") as file:
        file.write(torn)
    assert [record["step"] for record in read_metrics(path)] == [1, 2]
    with Metrics(path) as metrics:
        metrics.log(3, {"loss": 3.0})
    assert [record["loss"] for record in read_metrics(path)] == [1.0, 2.0, 3.0]


def test_rewinding_forgets_later_steps_and_nothing_else(tmp_path: Path):
    with Metrics(tmp_path / "metrics.jsonl") as metrics:
        for step in (1, 2, 3):
            metrics.log(step, {"loss": float(step)})
        metrics.log(2, {"pass_rate": 0.5}, phase="validation")
        metrics.rewind(2)
        metrics.log(3, {"loss": 9.0})
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(r["step"], r.get("loss")) for r in records] == [
        (1, 1.0),
        (2, 2.0),
        (2, None),
        (3, 9.0),
    ]


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    with Metrics(path) as metrics:
        for step in (1, 2, 3, 4):
            metrics.log(step, {"loss": step})
        metrics.log(4, {"pass@1": 0.4}, phase="evaluate")
    with Metrics(path) as metrics:
        metrics.log(3, {"loss": 30})
    losses = [(r["step"], r["loss"]) for r in read_metrics(path) if "loss" in r]
    assert losses == [(1, 1), (2, 2), (3, 30)]
    assert any(record.get("phase") == "evaluate" for record in read_metrics(path))


def test_damage_in_the_middle_is_named_with_its_line(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\nnot json\n{"step": 2}\n')
    with pytest.raises(DataError, match=r"m\.jsonl:2"):
        read_metrics(path)


def test_many_threads_write_whole_lines(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    with Metrics(path) as metrics:
        threads = [
            threading.Thread(target=lambda: [metrics.log(1, {"x": i}) for i in range(200)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(read_metrics(path)) == 800


def test_a_secret_in_a_tag_does_not_reach_the_file(tmp_path: Path):
    path = tmp_path / "m.jsonl"
    with Metrics(path) as metrics:
        metrics.log(1, {}, note="hf_abcdefghijklmnopqrstuv")
    assert "hf_abc" not in path.read_text()


def test_a_tracker_gets_every_finite_number(tmp_path: Path):
    tracker = Tracker()
    with Metrics(tmp_path / "m.jsonl", [Sink("fake", lambda: tracker)]) as metrics:
        metrics.log(1, {"loss": 2.0, "bad": math.nan})
        metrics.log(2, {"loss": 1.0})
    assert tracker.records == [(1, {"loss": 2.0}), (2, {"loss": 1.0})]
    assert tracker.closed


def test_a_hanging_tracker_holds_nobody_up(tmp_path: Path, caplog):
    gate = threading.Event()
    sink = Sink("slow", lambda: Tracker(gate))
    metrics = Metrics(tmp_path / "m.jsonl", [sink])
    started = time.monotonic()
    for step in range(MAX_WAITING + 50):
        metrics.log(step, {"loss": 1.0})
    sink.close(timeout_seconds=0.2)
    assert time.monotonic() - started < 5
    assert sink.num_dropped >= 48
    assert len(read_metrics(tmp_path / "m.jsonl")) == MAX_WAITING + 50
    assert caplog.text.count("are being dropped") == 1
    gate.set()


def test_a_failing_tracker_warns_once_and_leaks_nothing(tmp_path: Path, caplog):
    sink = Sink("broken", lambda: Tracker(fail_at=2))
    with Metrics(tmp_path / "m.jsonl", [sink]) as metrics:
        for step in range(1, 6):
            metrics.log(step, {"loss": 1.0})
    assert caplog.text.count("tracker is down") == 1
    assert "hf_abc" not in caplog.text
    assert len(read_metrics(tmp_path / "m.jsonl")) == 5


def test_a_tracker_that_is_not_installed_is_told_before_training(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SetupError, match="wandb") as caught:
        open_sinks(["wandb"], tmp_path, "tiny/sft")
    assert "pip install wandb" in caught.value.fix


def test_progress_writes_a_line_and_a_file(tmp_path: Path, capsys, monkeypatch):
    stage = tmp_path / "sft"
    stage.mkdir()
    clock = iter([100.0, 110.0])
    monkeypatch.setattr("time.time", lambda: next(clock))
    progress(stage, 10, 30, loss=1.25)
    progress(stage, 20, 30, loss=float("nan"))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "stage=sft step=10 total=30 loss=1.25 seconds=0.0"
    # 10 steps took 10 s, so the last 10 take 10 s more.
    assert lines[1] == "stage=sft step=20 total=30 loss=nan seconds=10.0 eta_seconds=10.0"
    report = json.loads((stage / "progress.json").read_text())
    assert (report["step"], report["loss"], report["eta_seconds"]) == (20, None, 10.0)
    assert [file.name for file in stage.iterdir()] == ["progress.json"]


@pytest.mark.parametrize(
    ("hostile", "plain"),
    [
        ("\x1b[31mred\x1b[0m\x07", "red"),
        ("\x1b]0;title\x07a\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "alink"),
        ("\x1b]52;c;c2VjcmV0\x07", ""),
        ("a\u202ecod.exe\u202c", "acod.exe"),
        ("\u2066x\u2069\u200f", "x"),
        ("\x9b31mC1", "31mC1"),
        ("a\r\x08b\x00", "ab"),
        ("two\nlines\tkept é🦙", "two\nlines\tkept é🦙"),
        ("\x1bc\x1b(B\x1bPdata\x1b\\end\x1b", "end"),
    ],
)
def test_model_text_cannot_drive_the_terminal(hostile, plain):
    assert plain_text(hostile) == plain
