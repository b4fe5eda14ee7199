"""Real ranks for tests: launch files, `accelerate launch`, and ranks started by hand."""

from __future__ import annotations

import importlib.util
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "recipes" / "accelerate"
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
needs_deepspeed = pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed")
KINDS = ("ddp", *(pytest.param(kind, marks=needs_deepspeed) for kind in ("zero2", "zero3")))
"""What runs on two ranks of a CPU."""


def launch_file(kind: str, folder: Path) -> Path:
    """The shipped file; for ZeRO-3 one that splits every weight, however small.

    DeepSpeed leaves tensors below 100,000 elements whole, which is all that a tiny model has.
    """
    shipped = RECIPES / f"{kind}.yaml"
    if kind != "zero3":
        return shipped
    settings = zero3_settings()
    (folder / "zero3.json").write_text(json.dumps(settings))
    kept = [line for line in shipped.read_text().splitlines() if not _is_replaced(line)]
    place = kept.index("deepspeed_config:") + 1
    kept.insert(place, f"  deepspeed_config_file: {folder / 'zero3.json'}")
    path = folder / "zero3.yaml"
    path.write_text("\n".join(kept) + "\n")
    return path


def zero3_settings() -> dict[str, object]:
    """ZeRO-3 that splits every weight."""
    automatic = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_clipping")
    zero = {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
    }
    return {
        "zero_optimization": zero,
        "gradient_accumulation_steps": "auto",
        **dict.fromkeys(automatic, "auto"),
    }


def launch_line(file: Path, module: str, *arguments: str) -> list[str]:
    """`accelerate launch --config_file FILE -m MODULE …`."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(file)]
    return [*launch, "-m", module, *arguments]


def environment() -> dict[str, str]:
    """One thread a rank, and our modules from here."""
    roots = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "OMP_NUM_THREADS": "1",
        "DS_ACCELERATOR": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, roots)),
    }


@contextmanager
def started(line: Sequence[str]) -> Iterator[subprocess.Popen[str]]:
    """A launch; at the end neither it nor any rank of it may be left."""
    process = subprocess.Popen(
        line,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    below: list[psutil.Process] = []
    try:
        yield process
        below = ranks_of(process)
        deadline = time.monotonic() + 20
        while alive(below) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not alive(below), "ranks are left behind"
    finally:
        for left in [*below, *ranks_of(process)]:
            with suppress(psutil.Error):
                left.kill()
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def run_launch(file: Path, module: str, *arguments: str, seconds: float = 240) -> tuple[int, str]:
    """Exit code and output of a whole launch."""
    with started(launch_line(file, module, *arguments)) as process:
        output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def ranks_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The living ranks of a launch, rank 0 first."""
    try:
        below = psutil.Process(process.pid).children()
    except psutil.Error:
        return []
    found = {}
    for each in below:
        with suppress(psutil.Error):
            found[int(each.environ()["RANK"])] = each
    return [found[rank] for rank in sorted(found)]


def alive(processes: Sequence[psutil.Process]) -> list[psutil.Process]:
    """Those of them that run still."""
    found = []
    for each in processes:
        with suppress(psutil.Error):
            if each.is_running() and each.status() != psutil.STATUS_ZOMBIE:
                found.append(each)
    return found


def rank_environment(kind: str, rank: int, port: int, num_ranks: int = 2) -> Mapping[str, str]:
    """What a launcher gives to a rank; rank 0 holds the store."""
    given = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(num_ranks),
    }
    if kind.startswith("zero"):
        given |= {"ACCELERATE_USE_DEEPSPEED": "true"}
        given |= {"ACCELERATE_DEEPSPEED_ZERO_STAGE": kind.removeprefix("zero")}
        given |= {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "false"}
    return given


def free_port() -> int:
    """A port that nobody has, and that nobody is given who asks the kernel for any one.

    Whoever is told it binds it seconds later, while others start Ray; Ray's own range lies below,
    the kernel's above.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _is_replaced(line: str) -> bool:
    words = ("zero_stage:", "offload_", "zero3_", "mixed_precision:")
    return line.strip().startswith(words)
