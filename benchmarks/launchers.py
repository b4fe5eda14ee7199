"""What a step costs under each launcher: ours against TRL alone, and two ranks against one.

    python -m benchmarks.launchers [--quick]

The same rows, model and batch go through `sft.train` and through TRL's SFTTrainer
(benchmarks/plain_sft.py), both under the same `accelerate launch`, in turns. A step's time is the
median distance between the ends of two steps, the first few left out; an overhead is the median
over the turns of ours by TRL's. On two cores two ranks of one thread each have what one rank has
with two threads, so the speed-up says what the launcher costs, not what a second machine brings.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.harness import ROOT, Figure, Report, run_benchmark
from ground.chat import ChatTemplate
from ground.metrics import read_metrics
from ground.model import load_tokenizer
from ground.records import Demonstration, Message
from ground.training_rows import encode_demonstrations

_MODEL = ROOT / "recipes" / "tiny" / "herd" / "student"
_FILES = ROOT / "recipes" / "accelerate"
_ROWS, _ROWS_PER_STEP, _ROWS_PER_PASS, _LENGTH = 256, 32, 8, 256
_LEFT_OUT = 5
_GOAL = 1.05
_SECONDS = 600


def measure(quick: bool) -> Report:
    """Each launcher in turns with TRL alone."""
    turns, steps = (1, 15) if quick else (5, 30)
    kinds = ["cpu", "ddp", *(["zero2", "zero3"] if importlib.util.find_spec("deepspeed") else [])]
    ours: dict[str, list[float]] = {kind: [] for kind in kinds}
    plain: dict[str, list[float]] = {kind: [] for kind in kinds}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        _write_work(place, steps)
        for turn in range(turns):
            for kind in kinds:
                ours[kind].append(_ours(place, kind, turn))
                plain[kind].append(_plain(place, kind, turn))
    figures = [
        Figure(
            f"overhead_{kind}",
            float(np.median(np.divide(ours[kind], plain[kind]))),
            "x",
            goal=_GOAL,
            better="lower",
            tolerance=0.1,
        )
        for kind in kinds
    ]
    one = float(np.median(ours["cpu"]))
    figures += [
        Figure(f"speedup_{kind}", one / float(np.median(ours[kind])), "x") for kind in kinds[1:]
    ]
    return Report(figures, {"ours_seconds": ours, "plain_seconds": plain, "steps": steps})


def _write_work(place: Path, steps: int) -> None:
    """The same rows as a recipe's data and as token ids."""
    demonstrations = [
        Demonstration(
            str(n),
            (Message("user", f"count from {n}"), Message("assistant", " ".join(_counted(n)))),
            "count",
        )
        for n in range(_ROWS)
    ]
    rows = encode_demonstrations(demonstrations, ChatTemplate(load_tokenizer(_MODEL)), _LENGTH)
    settings = {
        "learning_rate": 1e-4,
        "rows_per_step": _ROWS_PER_STEP,
        "rows_per_pass": _ROWS_PER_PASS,
    }
    ids = [{"input_ids": list(r.input_ids), "labels": list(r.labels)} for r in rows.rows]
    work = {"model": str(_MODEL), "steps": steps, "rows": ids, **settings}
    (place / "work.json").write_text(json.dumps(work))
    with (place / "sft.jsonl").open("w") as file:
        for each in demonstrations:
            messages = [{"role": m.role, "content": m.content} for m in each.messages]
            file.write(json.dumps({"messages": messages}) + "\n")
    recipe = {
        "name": "launchers",
        "model": {"path": str(_MODEL)},
        "data": {"sft": "sft.jsonl"},
        "sft": {
            "max_length": _LENGTH,
            "trainer": {**settings, "max_steps": steps, "log_every": 1, "save_every": 10**6},
        },
    }
    (place / "recipe.yaml").write_text(json.dumps(recipe))


def _counted(n: int) -> list[str]:
    return [str(n + more) for more in range(20)]


def _ours(place: Path, kind: str, turn: int) -> float:
    run = place / f"{kind}-{turn}"
    _launch(kind, "sft.train", str(place / "recipe.yaml"), "--run", str(run))
    records = read_metrics(run / "sft" / "metrics.jsonl")
    return _step_seconds([float(str(record["time"])) for record in records if "loss" in record])


def _plain(place: Path, kind: str, turn: int) -> float:
    out = place / f"plain-{kind}-{turn}.json"
    _launch(kind, "benchmarks.plain_sft", str(place / "work.json"), str(out))
    return _step_seconds(json.loads(out.read_text()))


def _step_seconds(ends: Sequence[float]) -> float:
    return float(np.median(np.diff(ends)[_LEFT_OUT:]))


def _launch(kind: str, module: str, *arguments: str) -> None:
    """One thread a rank, and one rank alone with two: as many cores for all."""
    file = _FILES / f"{kind}.yaml"
    threads = {"OMP_NUM_THREADS": "2" if kind == "cpu" else "1", "DS_ACCELERATOR": "cpu"}
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(file), "-m", module]
    done = subprocess.run(
        [sys.executable, *launcher, *arguments],
        cwd=ROOT,
        env={**os.environ, **threads},
        capture_output=True,
        text=True,
        timeout=_SECONDS,
    )
    if done.returncode:
        raise SystemExit(f"{module} under {file.name} failed:\n{done.stderr[-3000:]}")


if __name__ == "__main__":
    sys.exit(run_benchmark("launchers", measure))
